"""What the results say: AdamW as one would have chosen it, the gap that a step recovers, a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from scipy.stats import binomtest, bootstrap, norm

from .baselines import PROMPT_RATES, RATES
from .settings import unpacked

Row = dict[str, Any]
# How the names of AdamW's runs begin.
LORA_ADAMW, PROMPT_ADAMW = "adamw", "prompt adamw"
OURS = ("one step, lora", "one step, full", "three steps, lora", "three steps, full", "one step of all rows, lora")
# AdamW's best setting, and the head alone, with the search rows among the training rows.
SEARCH_TOO = "tuned adamw, search rows too"
HEAD_TOO = "head alone, search rows too"
# AdamW's best setting with a threshold for the F1 that the search rows choose.
THRESHOLD_TOO = "tuned adamw, threshold too"
OTHERS = (
    HEAD_TOO, SEARCH_TOO, THRESHOLD_TOO, "lora_one step", "sign step", "lora_ga, 1 step", "lora_ga, 1 epoch", "setfit",
)  # fmt: skip
OUR_PROMPTS = ("one step, prompt", "three steps, prompt")
ADAMW, ADAMW_ON_A_PROMPT = "AdamW, tuned", "AdamW on a prompt, tuned"
# So many runs from a random head: two numbers of epochs for a LoRA, one for a prompt.
RUNS = {LORA_ADAMW: 2 * len(RATES), PROMPT_ADAMW: len(PROMPT_RATES)}
# Gaps within so many standard errors of the test scores say nothing.
ERRORS = 2
# Sets of test rows that are drawn for the standard error of an F1.
DRAWS = 2000
# Panels side by side in the picture.
COLUMNS = 4


def best_adamw(rows: Iterable[Row], arm: str = LORA_ADAMW) -> Row | None:
    """AdamW's run that is best on the search rows, whatever its epochs, rate and head; None before all rates ran."""
    runs = [row for row in rows if row["arm"].startswith(arm)]
    if sum("rate" in row["arm"] for row in runs) < RUNS[arm]:
        return None
    return max(runs, key=lambda row: (row["search"]["score"], -row["search"]["loss"]), default=None)


def on_cpu(row: Row) -> bool:
    return "CPU" in row["machine"]


def counted(rows: Iterable[Row]) -> dict[str, Row]:
    """By arm the row that counts: of an arm that ran twice, what an accelerator gave."""
    return {row["arm"]: row for row in sorted(rows, key=on_cpu, reverse=True)}


class Comparison:
    """All arms of one set, number of rows and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.arms = counted(rows)
        rows = list(self.arms.values())
        self.best = best_adamw(rows)
        self._best = {ADAMW: self.best, ADAMW_ON_A_PROMPT: best_adamw(rows, PROMPT_ADAMW)}
        # A prompt's head answers behind a prompt that has not moved, and is no start for what has none.
        self.head = next((row["head"] for row in rows if "head" in row and row["arm"] not in OUR_PROMPTS), None)
        self.prompt_head = next((row["head"] for row in rows if row["arm"] in OUR_PROMPTS), None)

    @property
    def tells(self) -> bool:
        """Whether AdamW is above the head by more than two standard errors, so that there is a gap to recover."""
        if self.best is None or self.head is None:
            return False
        gain, error = difference(self.best["test"], self.head)
        return gain > ERRORS * error

    def test(self, arm: str) -> dict[str, Any] | None:
        """An arm's scores on the test rows, if it ran."""
        row = self._best[arm] if arm in self._best else self.arms.get(arm)
        return row["test"] if row else None


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """By how much more of the test rows the first is right, and the standard error of that, rows paired.

    Of an F1 it is the difference itself, and its standard deviation over test rows drawn again.
    """
    if "positive" in one:
        rows = [np.array(unpacked(bits)) for bits in (one["right"], other["right"], one["positive"])]

        def statistic(first: np.ndarray, second: np.ndarray, positive: np.ndarray, axis: int) -> np.ndarray:
            return _f1(first, positive, axis) - _f1(second, positive, axis)

        drawn = bootstrap(rows, statistic, paired=True, n_resamples=DRAWS, method="percentile", rng=0)
        return one["score"] - other["score"], float(drawn.standard_error)
    pairs = zip(unpacked(one["right"]), unpacked(other["right"]), strict=True)
    each = [a - b for a, b in pairs]
    return statistics.mean(each), statistics.pstdev(each) / math.sqrt(len(each))


def _f1(right: np.ndarray, positive: np.ndarray, axis: int) -> np.ndarray:
    """Of class 1, over the test rows along an axis."""
    found, wrong = (right & positive).sum(axis), (~right).sum(axis)
    return 2 * found / np.maximum(2 * found + wrong, 1)


def comparisons(rows: Sequence[Row]) -> dict[tuple[str, int], list[Comparison]]:
    """By set and number of rows, one comparison a seed."""
    keys = dict.fromkeys((row["set"], row["rows"], row["seed"]) for row in rows)
    found: dict[tuple[str, int], list[Comparison]] = {}
    for key in keys:
        own = [row for row in rows if (row["set"], row["rows"], row["seed"]) == key]
        found.setdefault(key[:2], []).append(Comparison(own))
    return found


def pooled_gap(arm: str, all_of_them: Iterable[Comparison], than: str = ADAMW) -> tuple[float, int] | None:
    """Σ(arm − head) / Σ(AdamW − head) over comparisons whose gap tells, and their number.

    Args:
        than: Which AdamW; comparisons tell by the tuned one in any case.
    """
    pairs = [
        (test["score"] - one.head["score"], best["score"] - one.head["score"])
        for one in all_of_them
        if one.tells and one.head and (test := one.test(arm)) is not None and (best := one.test(than)) is not None
    ]
    total = sum(gap for _, gap in pairs)
    return (sum(gain for gain, _ in pairs) / total, len(pairs)) if total > 0 else None


def harm(rows: Sequence[Row]) -> str:
    """Whether an accepted step has lowered a test score: head against step, run by run, on the same test rows.

    By McNemar's exact test: only rows that one of the two gets right and the other wrong say something. Of an F1 by its
    difference in standard errors. The smallest p is corrected for the number of runs (Bonferroni).
    """
    worse, ps = 0, []
    for row in (row for seeds in comparisons(rows).values() for one in seeds for row in one.arms.values()):
        if not any(row.get("accepted", ())):
            continue
        gain, error = difference(row["test"], row["head"])
        worse += gain < 0
        if "positive" in row["test"]:
            ps.append(float(norm.cdf(gain / error)) if error > 0 else 1.0)
            continue
        before, after = unpacked(row["head"]["right"]), unpacked(row["test"]["right"])
        lost = sum(b and not a for b, a in zip(before, after, strict=True))
        won = sum(a and not b for b, a in zip(before, after, strict=True))
        ps.append(binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0)
    if not ps:
        return "No step was accepted."
    return (
        f"{len(ps)} runs with an accepted step; in {worse} of them the test score fell below the head alone, and the "
        f"smallest p of a loss, times {len(ps)}, is {min(1.0, min(ps) * len(ps)):.2g}."
    )


def table(rows: Sequence[Row]) -> str:
    """Mean score and log-loss over the seeds of each arm, set by set, and the pooled gap where AdamW ran too."""
    lines = ["| set, rows | arm | seeds | score | log-loss | gap recovered |", "|---|---|---|---|---|---|"]
    found = comparisons(rows)
    for (name, number), seeds in found.items():
        where = f"{name}, {number}"
        heads = [one.head for one in seeds if one.head]
        if heads:
            lines.append(_line(where, "head alone", heads))
        for arm in (ADAMW, *OURS, *OTHERS):
            tests = [test for one in seeds if (test := one.test(arm)) is not None]
            gap = pooled_gap(arm, seeds) if arm != ADAMW else None
            if tests:
                lines.append(_line(where, arm, tests, f"{gap[0]:.2f} ({gap[1]})" if gap else ""))
    for number in sorted({number for _, number in found}):
        each = [one for (_, rows_), seeds in found.items() if rows_ == number for one in seeds]
        for arm in OURS:
            for than, told in ((ADAMW, arm), (SEARCH_TOO, f"{arm}, against {SEARCH_TOO}")):
                if gap := pooled_gap(arm, each, than):
                    lines.append(f"| all, {number} | {told} | | | | **{gap[0]:.2f}** ({gap[1]}) |")
    return "\n".join(lines)


def prompt_table(rows: Sequence[Row]) -> str:
    """The same for prompts, with what each is above AdamW on the same prompt."""
    lines = ["| set, rows | arm | seeds | score | log-loss | above AdamW |", "|---|---|---|---|---|---|"]
    for (name, number), seeds in comparisons(rows).items():
        heads = [one.prompt_head for one in seeds if one.prompt_head]
        if heads:
            lines.append(_line(f"{name}, {number}", "head behind the first prompt", heads))
        for arm in (ADAMW_ON_A_PROMPT, *OUR_PROMPTS):
            pairs = [(test, one.test(ADAMW_ON_A_PROMPT)) for one in seeds if (test := one.test(arm)) is not None]
            above = [difference(test, best) for test, best in pairs if best is not None and test is not best]
            if pairs:
                lines.append(_line(f"{name}, {number}", arm, [test for test, _ in pairs], _pooled(above)))
    return "\n".join(lines)


def _pooled(differences: Sequence[tuple[float, float]]) -> str:
    """The mean of some differences, each with its standard error, and the standard error of the mean."""
    if not differences:
        return ""
    error = math.sqrt(sum(error**2 for _, error in differences)) / len(differences)
    return f"{statistics.mean(gain for gain, _ in differences):+.3f} ± {error:.3f}"


def _line(where: str, arm: str, tests: Sequence[dict[str, Any]], gap: str = "") -> str:
    score, loss = (statistics.mean(test[what] for test in tests) for what in ("score", "loss"))
    return f"| {where} | {arm} | {len(tests)} | {score:.3f} | {loss:.3f} | {gap} |"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Score against work, a panel for each set and number of rows.

    Work is counted in forwards of single rows, three of which are a row of an epoch: so runs of different machines have
    a place. What one step adds to its pass, covariances above all, does not show in it (`pass_cost.py` tells).
    """
    matplotlib.use("Agg")
    found = {key: [one for one in seeds if one.head] for key, seeds in comparisons(rows).items()}
    found = {key: seeds for key, seeds in found.items() if seeds}
    high = -(-len(found) // COLUMNS)
    figure, axes = pyplot.subplots(high, COLUMNS, figsize=(4 * COLUMNS, 3.4 * high), squeeze=False)
    places = list(axes.flat)
    for axis in places[len(found) :]:
        axis.set_axis_off()
    for axis, ((name, number), seeds) in zip(places, found.items(), strict=False):
        for one in seeds:
            for arm, row in one.arms.items():
                style, colour = _marker(arm)
                axis.plot(row["forwards"] / (3 * number), row["test"]["score"], style, color=colour, markersize=9)
            if one.head is not None:
                axis.axhline(one.head["score"], color="0.8", linewidth=1)
        axis.set_xscale("log")
        axis.set_xticks([0.5, 1, 2, 3, 5, 10], ["0.5", "1", "2", "3", "5", "10"])
        axis.minorticks_off()
        axis.set_title(f"{name}, {number:,} rows")
    for left in axes[:, 0]:
        left.set_ylabel("test score")
    figure.supxlabel("work, in epochs (a row forward and back is 3 forwards); grey lines: the head alone")
    legend = {label: _marker(arm) for label, arm in (("ours", OURS[0]), ("AdamW", LORA_ADAMW), ("others", OTHERS[-1]))}
    handles = [pyplot.Line2D([], [], marker=style, color=colour, linestyle="") for style, colour in legend.values()]
    figure.legend(handles, legend.keys(), loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _marker(arm: str) -> tuple[str, str]:
    if arm in OURS:
        return "*", "C3"
    return ".", "C0" if arm.startswith(LORA_ADAMW) or arm in (SEARCH_TOO, THRESHOLD_TOO) else "0.6"
