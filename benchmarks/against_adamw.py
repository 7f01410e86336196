"""One step against tuned AdamW and others on classification: the matrix of runs, which goes on where it was stopped.

Protocol: for a set, a number of rows and a seed, every arm has the same training rows, the same 300 search rows (the
first of the validation split: they choose the step, and the rate of AdamW) and the same test rows (at most 1,000).
MiniLM-L6, LoRA of rank 8 and alpha 16 on every linear layer of the encoder, or 20 virtual tokens from the vocabulary
("prompt"), rows cut at 128 tokens. Each arm runs in a process of its own, one after the other or several at a time;
scoring is not timed. No setting of the step differs between sets.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from quality import baselines, one_step, setfit_arm, summary
from quality.settings import F1_SETS, Setting
from results_file import Results
from transformers.utils import logging

SMALL_SETS = ("trec6", "sst2", "banking77", "legal_unfair_tos", "medical_abstracts")
LARGE_SETS = ("sst2", "ag_news")
# A prompt moves little and is compared with AdamW on a prompt.
PROMPT_SETS, PROMPT_EPOCHS = ("trec6", "sst2"), 10
SMALL, LARGE = 500, 6000
SEEDS = (0, 1, 2)
RESULTS = Results("against_adamw")

# Arms that go by the rate that AdamW is best at.
LATE = ("fitted head", "lora_ga, 1 step", "lora_ga, 1 epoch")
# And what goes by its best setting, from the fitted head included.
LAST = (summary.SEARCH_TOO, summary.THRESHOLD_TOO)

Arm = Callable[[Setting], dict[str, Any]]


def epochs(rows: int) -> tuple[int, int]:
    """How long AdamW trains, in epochs."""
    return (1, 3) if rows > SMALL else (3, 10)


def arms(setting: Setting, setfit_python: Path | None = None) -> dict[str, Arm]:
    """All arms by name. Those that need AdamW's best setting find it in the results, so they come last.

    Args:
        setfit_python: Interpreter of the environment that SetFit is in; without it there is no such arm.
    """
    found: dict[str, Arm] = {
        "one step, lora": one_step.one_step,
        "one step, full": lambda s: one_step.one_step(s, "full"),
        "three steps, lora": lambda s: one_step.one_step(s, max_steps=3),
        "three steps, full": lambda s: one_step.one_step(s, "full", max_steps=3),
        "lora_one step": lambda s: one_step.one_step(s, direction="lora_one", slices=1),
        "sign step": lambda s: one_step.one_step(s, direction="sign", slices=1),
        summary.HEAD_TOO: baselines.head_too,
    }
    if setting.rows > SMALL:  # where the default is a walk
        found["one step of all rows, lora"] = lambda s: one_step.one_step(s, slices=1)
    for number in epochs(setting.rows):
        for rate in baselines.RATES:
            found[f"adamw, {number} epochs, rate {rate:g}"] = partial(baselines.adamw, rate=rate, epochs=number)
    for number in epochs(setting.rows):
        found[f"adamw, {number} epochs, fitted head"] = partial(from_fitted_head, epochs=number)
    if setting.name in PROMPT_SETS and setting.rows <= SMALL:
        found |= prompt_arms()
    found["lora_ga, 1 step"] = lambda s: with_best_rate(s, None, lambda rate: baselines.loraga(s, rate, steps=1))
    found["lora_ga, 1 epoch"] = lambda s: with_best_rate(s, None, lambda rate: baselines.loraga(s, rate))
    found[summary.SEARCH_TOO] = lambda s: once_more(replace(s, search_too=True))
    if setting.name in F1_SETS:
        found[summary.THRESHOLD_TOO] = lambda s: once_more(s, threshold=True)
    if setfit_python is not None:
        found["setfit"] = lambda s: setfit_arm.setfit(s, setfit_python, max(epochs(s.rows)))
    return found


def from_fitted_head(setting: Setting, epochs: int) -> dict[str, Any]:
    """AdamW at its best rate for so many epochs, from the fitted head."""
    return with_best_rate(setting, epochs, lambda rate: baselines.adamw(setting, rate, epochs, fitted=True))


def prompt_arms() -> dict[str, Arm]:
    """One step on a prompt, and AdamW on the same prompt; their names keep them apart from AdamW on a LoRA."""
    found: dict[str, Arm] = {
        "one step, prompt": lambda s: one_step.one_step(s, "prompt_tuning"),
        "three steps, prompt": lambda s: one_step.one_step(s, "prompt_tuning", max_steps=3),
    }
    name = f"{summary.PROMPT_ADAMW}, {PROMPT_EPOCHS} epochs"
    for rate in baselines.PROMPT_RATES:
        found[f"{name}, rate {rate:g}"] = partial(baselines.prompt_adamw, rate=rate, epochs=PROMPT_EPOCHS)
    found[f"{name}, fitted head"] = lambda s: with_best_rate(
        s, PROMPT_EPOCHS, lambda rate: baselines.prompt_adamw(s, rate, PROMPT_EPOCHS, fitted=True),
        summary.PROMPT_ADAMW, baselines.PROMPT_RATES,
    )  # fmt: skip
    return found


def with_best_rate(
    setting: Setting,
    number: int | None,
    run: Callable[[float], dict[str, Any]],
    arm: str = summary.LORA_ADAMW,
    rates: Sequence[float] = baselines.RATES,
) -> dict[str, Any]:
    """Runs at the rate that is best on the search rows, for so many epochs, or at all."""
    numbers = [number] if number is not None else epochs(setting.rows)
    counted = _counted(setting)
    runs = {rate: counted[name]["search"] for name, rate in _at_rates(arm, numbers, rates).items() if name in counted}
    rate = max(runs, key=lambda one: (runs[one]["score"], -runs[one]["loss"]))
    return {"rate": rate, **run(rate)}


def once_more(setting: Setting, threshold: bool = False) -> dict[str, Any]:
    """AdamW's best setting once more.

    Args:
        setting: With `search_too` from the search rows, too: they have done their choosing.
        threshold: Whether these choose the threshold of an F1.
    """
    best = summary.best_adamw(_counted(setting).values())
    assert best is not None
    number = next(number for number in epochs(setting.rows) if f" {number} epochs" in best["arm"])
    rates = _at_rates(summary.LORA_ADAMW, [number], baselines.RATES)
    rate, fitted = (best["rate"], True) if best["arm"].endswith("fitted head") else (rates[best["arm"]], False)
    result = baselines.adamw(setting, rate, number, fitted, threshold)
    return {"setting": best["arm"], "rate": rate, **result}


def _counted(setting: Setting) -> dict[str, dict[str, Any]]:
    """By arm the results of a setting that count."""
    return summary.counted(row for row in RESULTS.rows() if setting.key.items() <= row.items())


def _at_rates(arm: str, numbers: Sequence[int], rates: Sequence[float]) -> dict[str, float]:
    """By name of a run of AdamW its rate, the longest runs last."""
    return {f"{arm}, {number} epochs, rate {rate:g}": rate for number in numbers for rate in rates}


def alone(name: str, setting: Setting, setfit_python: Path | None = None) -> dict[str, Any]:
    """An arm's result from a process of its own, with its CPU time, scoring included, and the most memory it held.

    Where that process runs another, as SetFit's does, the CPU times add up (the start of the other's interpreter
    among them), and the larger memory counts.
    """
    # A process that has used a GPU cannot be forked. What this server imports (`main` tells it where it is) is there at
    # once, the same for every arm.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["against_adamw"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, setting, setfit_python, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"The process of {name} has failed; its error is above.") from None
    finally:
        process.join()


def _answer(name: str, setting: Setting, setfit_python: Path | None, to: Connection) -> None:
    quiet()
    result = arms(setting, setfit_python)[name](setting)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(one.ru_utime + one.ru_stime for one in used)
    memory = max(one.ru_maxrss for one in used) * 1024
    about = {"cpu_seconds": seconds, "peak_memory_bytes": memory}
    if torch.cuda.is_available():
        about["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    to.send({**result, **about})


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def settings(data: Path, seeds: Sequence[int] = SEEDS) -> list[Setting]:
    """The matrix, one seed after the other."""
    sizes = ((SMALL, SMALL_SETS), (LARGE, LARGE_SETS))
    return [Setting(data, name, rows, seed) for rows, sets in sizes for seed in seeds for name in sets]


Run = tuple[str, Setting]


def missing(wanted: Iterable[Setting], begins: tuple[str, ...], setfit_python: Path | None) -> list[Run]:
    """The runs that are not in the results yet."""
    return [
        (name, setting)
        for setting in wanted
        for known in [_counted(setting)]
        for name in arms(setting, setfit_python)
        if name.startswith(begins) and name not in known
    ]


def rates_known(setting: Setting, late: str) -> bool:
    """Whether AdamW has run at all rates that this late arm chooses among, and before the last one from both heads."""
    if late.startswith(summary.PROMPT_ADAMW):
        wanted = _at_rates(summary.PROMPT_ADAMW, [PROMPT_EPOCHS], baselines.PROMPT_RATES)
    else:
        wanted = _at_rates(summary.LORA_ADAMW, epochs(setting.rows), baselines.RATES)
    known = _counted(setting)
    heads = {f"{summary.LORA_ADAMW}, {number} epochs, fitted head" for number in epochs(setting.rows)}
    return wanted.keys() <= known.keys() and (late not in LAST or not heads.isdisjoint(known))


def run_all(runs: Sequence[Run], setfit_python: Path | None, workers: int, minutes: float) -> None:
    """Runs what is missing, so many at a time; nothing new is begun after so many minutes."""
    writing, end = threading.Lock(), time.monotonic() + 60 * minutes

    def run(one: Run) -> None:
        name, setting = one
        told = f"{setting.name} {setting.rows} seed {setting.seed}: {name}"
        if time.monotonic() > end:
            return
        if name.endswith((*LATE, *LAST)) and not rates_known(setting, name):
            print(f"{told} waits for all of AdamW's rates", flush=True)
            return
        try:
            result = alone(name, setting, setfit_python)
        except RuntimeError as error:  # the others go on
            print(error, flush=True)
            return
        with writing:
            RESULTS.add({**setting.key, "arm": name, **result, **({"beside": workers - 1} if workers > 1 else {})})
            test, seconds = result["test"], result["seconds"]["total"]
            print(f"{told}: {test['score']:.3f}, log-loss {test['loss']:.3f}, {seconds:.0f} s", flush=True)

    # What goes by AdamW's best rate waits for all of them, and what goes by its best setting for that, too.
    late = [one for one in runs if one[0].endswith(LATE)]
    last = [one for one in runs if one[0] in LAST]
    for some in ([one for one in runs if one not in late + last], late, last):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, sorted(some, key=lambda one: -one[1].rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder a set")
    parser.add_argument("--sets", nargs="+", help="only these")
    parser.add_argument("--rows", type=int, nargs="+", help="only these numbers of rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="these, default 0 1 2")
    parser.add_argument("--arms", nargs="+", help="only arms whose names begin so")
    parser.add_argument("--setfit-python", type=Path, help="interpreter of SetFit's environment, to run that arm too")
    parser.add_argument("--table", action="store_true", help="table and picture from the results that are there")
    parser.add_argument("--workers", type=int, default=1, help="so many runs at a time; their seconds tell little then")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    options = parser.parse_args()
    quiet()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    if not options.table:
        wanted = [
            one
            for one in settings(options.data, options.seeds)
            if one.name in (options.sets or [one.name]) and one.rows in (options.rows or [one.rows])
        ]
        runs = missing(wanted, tuple(options.arms or ("",)), options.setfit_python)
        run_all(runs, options.setfit_python, options.workers, options.minutes)
    rows = RESULTS.rows()
    print(summary.table(rows), summary.prompt_table(rows), summary.harm(rows), sep="\n\n")
    summary.draw(rows, RESULTS.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
