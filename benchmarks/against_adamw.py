"""One step against tuned AdamW and others on classification: the matrix of runs, which goes on where it was stopped.

Protocol: for a set, a number of rows and a seed, every arm has the same training rows, the same 300 search rows (the
first of the validation split: they choose the step, and the rate of AdamW) and the same test rows (at most 1,000).
MiniLM-L6, LoRA of rank 8 and alpha 16 on every linear layer of the encoder, or 20 virtual tokens from the vocabulary
("prompt"), rows cut at 128 tokens. Each arm runs in a
process of its own, one after the other; scoring is not timed. No setting of the step differs between sets.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quality import baselines, one_step, setfit_arm, summary
from quality.settings import Setting
from results_file import Results
from transformers.utils import logging

SMALL_SETS = ("trec6", "sst2", "banking77", "legal_unfair_tos", "medical_abstracts")
LARGE_SETS = ("sst2", "ag_news")
# A prompt moves little and is compared with AdamW on a prompt.
PROMPT_SETS, PROMPT_EPOCHS = ("trec6", "sst2"), 10
SMALL, LARGE = 500, 6000
SEEDS = (0, 1, 2)
RESULTS = Results("against_adamw")

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
        "lora_one step": lambda s: one_step.one_step(s, direction="lora_one"),
        "sign step": lambda s: one_step.one_step(s, direction="sign"),
    }
    if setting.rows > SMALL:  # where the default is a walk
        found["one step of all rows, lora"] = lambda s: one_step.one_step(s, slices=1)
    for number in epochs(setting.rows):
        for rate in baselines.RATES:
            found[f"adamw, {number} epochs, rate {rate:g}"] = lambda s, r=rate, n=number: baselines.adamw(s, r, n)
    for number in epochs(setting.rows):
        found[f"adamw, {number} epochs, fitted head"] = lambda s, n=number: with_best_rate(
            s, n, lambda rate: baselines.adamw(s, rate, n, fitted=True)
        )
    if setting.name in PROMPT_SETS and setting.rows <= SMALL:
        found |= prompt_arms()
    found["lora_ga, 1 step"] = lambda s: with_best_rate(s, None, lambda rate: baselines.loraga(s, rate, steps=1))
    found["lora_ga, 1 epoch"] = lambda s: with_best_rate(s, None, lambda rate: baselines.loraga(s, rate))
    if setfit_python is not None:
        found["setfit"] = lambda s: setfit_arm.setfit(s, setfit_python, max(epochs(s.rows)))
    return found


def prompt_arms() -> dict[str, Arm]:
    """One step on a prompt, and AdamW on the same prompt; their names keep them apart from AdamW on a LoRA."""
    found: dict[str, Arm] = {
        "one step, prompt": lambda s: one_step.one_step(s, "prompt_tuning"),
        "three steps, prompt": lambda s: one_step.one_step(s, "prompt_tuning", max_steps=3),
    }
    name = f"{summary.PROMPT_ADAMW}, {PROMPT_EPOCHS} epochs"
    for rate in baselines.PROMPT_RATES:
        found[f"{name}, rate {rate:g}"] = lambda s, r=rate: baselines.prompt_adamw(s, r, PROMPT_EPOCHS)
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
    runs = {
        rate: row["search"]
        for n in numbers
        for rate in rates
        if (row := RESULTS.find(**setting.key, arm=f"{arm}, {n} epochs, rate {rate:g}"))
    }
    rate = max(runs, key=lambda one: (runs[one]["score"], -runs[one]["loss"]))
    return {"rate": rate, **run(rate)}


def alone(arm: Arm, setting: Setting) -> dict[str, Any]:
    """An arm's result from a process of its own, with its CPU time, scoring included, and the most memory it held.

    Where that process runs another, as SetFit's does, the CPU times add up (the start of the other's interpreter
    among them), and the larger memory counts.
    """
    context = multiprocessing.get_context("fork")  # what is imported here is there at once, the same for every arm
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        result = arm(setting)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds = sum(one.ru_utime + one.ru_stime for one in used)
        memory = max(one.ru_maxrss for one in used) * 1024
        theirs.send({**result, "cpu_seconds": seconds, "peak_memory_bytes": memory})

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError("The arm's process has failed; its error is above.") from None
    finally:
        process.join()


def settings(data: Path) -> list[Setting]:
    """The matrix, one seed after the other."""
    small = [Setting(data, name, SMALL, seed) for seed in SEEDS for name in SMALL_SETS]
    return [*small, *(Setting(data, name, LARGE, 0) for name in LARGE_SETS)]


def run_missing(setting: Setting, begins: tuple[str, ...], setfit_python: Path | None = None) -> None:
    for name, arm in arms(setting, setfit_python).items():
        if not name.startswith(begins) or RESULTS.find(**setting.key, arm=name):
            continue
        result = alone(arm, setting)
        RESULTS.add({**setting.key, "arm": name, **result})
        test, seconds = result["test"], result["seconds"]["total"]
        print(
            f"{setting.name} {setting.rows} seed {setting.seed}: {name}: {test['score']:.3f}, log-loss "
            f"{test['loss']:.3f}, {seconds:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder a set")
    parser.add_argument("--sets", nargs="+", help="only these")
    parser.add_argument("--rows", type=int, nargs="+", help="only these numbers of rows")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--arms", nargs="+", help="only arms whose names begin so")
    parser.add_argument("--setfit-python", type=Path, help="interpreter of SetFit's environment, to run that arm too")
    parser.add_argument("--table", action="store_true", help="table and picture from the results that are there")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for setting in settings(options.data) if not options.table else []:
        wanted = (options.sets or [setting.name], options.rows or [setting.rows], options.seeds or [setting.seed])
        if setting.name in wanted[0] and setting.rows in wanted[1] and setting.seed in wanted[2]:
            run_missing(setting, tuple(options.arms or ("",)), options.setfit_python)
    rows = RESULTS.rows()
    print(summary.table(rows), summary.prompt_table(rows), summary.harm(rows), sep="\n\n")
    summary.draw(rows, RESULTS.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
