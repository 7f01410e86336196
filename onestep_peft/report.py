"""StepReport: what happened, as data. The table, the picture and the card are drawn from it."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onestep_peft.step.line_search import SearchResult
from onestep_peft.step.outcome import StepOutcome

FILE = "onestep.json"
PICTURE = "search.png"
VERSION = 1
STAGES = ("base", "head", "after")
HELD_OUT = "held-out rows"
# Of more classes than these, the table shows the worst.
CLASSES_SHOWN, WORST_SHOWN = 20, 10
# The most searches that a picture shows at full size.
STACKED_MAX = 3


@dataclass
class StepReport:
    """All that a person may ask of a run afterwards; `onestep.json` is this, as JSON.

    Args:
        base_model: The base: a Hub id, or a path relative to the saved folder.
        base_revision: The base's commit, or None for a local base.
        task: The Hub's `pipeline_tag`.
        problem_type: Of a text classifier: "single_label_classification", "multi_label_classification" or
            "regression"; None for other tasks.
        method: "lora", "full" or "prompt_tuning".
        merged_from: "lora" where its update has been added to the base's weights since ("method" is "full" then).
        labels: Names of the classes in the order of their numbers; empty for a task without classes.
        outputs: Number of the head's outputs: classes, or numbers of a regression; 0 for a task without a head.
        rows: Number of rows for the "gradient", the "search" and the "guard".
        seconds: Wall time: "total" of the adaptation and its parts, and "evaluation", which "total" leaves out.
        peak_memory_bytes: The most memory held: of the accelerator, or of the process on the CPU.
        steps: One entry a step: "direction", "step_size", "candidates" (each with the points [step size, loss] that
            the search saw), "loss_before", "loss_after" (means over held-out rows, nats), "accepted", "reason",
            "share_moved" (the update's norm by that of the weights), "energy_lost" (share of the update's squared norm
            that the adapter's rank could not hold), "head_refitted" (whether the head was fitted again after the
            step, since held-out rows gained by it) and "last_fit" (of the last step, where the head was fitted to the
            held-out rows in the end: their number, "rows", and their mean "loss", each under a head that leaves it
            out; else None).
        threshold: Where the head was made to decide as an F1 asks: that "metric" by its name, the "value", from which
            probability on it says yes, and the score "expected" then of rows like the held-out ones; else empty.
        datasets: Ids on the Hub by what their rows did: "train", "search", "evaluation". Rows do not say where they
            come from: the command fills this in; in Python, set it before `save_model`.
        metrics: By stage: "base" (as loaded), "head" (its fresh head fitted; that of a walk that begins with a search
            to its first slice; None where it had none) and "after".
        scored_on: Which rows "metrics" speak of: "eval_dataset", or "held-out rows" where none was given.
        class_counts: Number of the scored items (rows, or tokens) by class.
        class_recall: By stage and class, the share of them that is found; classes without items are left out.
        files: sha256 by file name, once saved.
    """

    base_model: str = ""
    base_revision: str | None = None
    task: str = "text-classification"
    problem_type: str | None = None
    method: str = "lora"
    merged_from: str | None = None
    labels: list[str] = field(default_factory=list)
    outputs: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    datasets: dict[str, list[str]] = field(default_factory=dict)
    threshold: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float] | None] = field(default_factory=lambda: dict.fromkeys(STAGES))
    scored_on: str = "eval_dataset"
    class_counts: dict[str, int] = field(default_factory=dict)
    class_recall: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """JSON with numbers that every parser reads: what is not finite becomes null."""
        return json.dumps({"version": VERSION, **_finite(dataclasses.asdict(self))}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StepReport:
        """The report that `to_json` wrote.

        Raises:
            ValueError: Not such a JSON text, or of a version that this release does not know.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{FILE} is not a report of onestep_peft ({error}).") from error
        if version != VERSION:
            raise ValueError(f"{FILE} has version {version!r}, and this release reads {VERSION}. Upgrade onestep-peft.")
        names = {f.name for f in dataclasses.fields(cls)}
        report = cls(**{name: value for name, value in data.items() if name in names})
        fault = report._fault()
        if fault is not None:
            raise ValueError(f"{FILE} is not a report of onestep_peft: {fault}.")
        return report

    def _fault(self) -> str | None:
        """What is wrong with the kinds of the values, for whoever has read them from a file."""
        blank = StepReport()
        for name in (f.name for f in dataclasses.fields(self)):
            value, kind = getattr(self, name), type(getattr(blank, name))
            if not (isinstance(value, str | None) if kind is type(None) else type(value) is kind):
                return f"`{name}` is {type(value).__name__}"
        if not all(isinstance(label, str) for label in self.labels):
            return "`labels` holds more than names"
        if not all(isinstance(digest, str) for digest in self.files.values()):
            return "`files` holds more than checksums"
        if self.threshold and not _is_threshold(self.threshold):
            return f"`threshold` is {self.threshold}"
        if self.outputs < 0:
            return f"`outputs` is {self.outputs}"
        return None

    def table(self) -> str:
        """The metrics at each stage, as text."""
        stages = [stage for stage in STAGES if self.metrics.get(stage)]
        if not stages:
            return "There are no rows to compare by: give an eval_dataset.\n"
        text = table({stage: self.metrics[stage] or {} for stage in stages})
        recall = {stage: self.class_recall[stage] for stage in STAGES if self.class_recall.get(stage)}
        text += recall_table(recall, self.class_counts)
        return text + "".join(f"({told})\n" for told in (self.doubt, self.decision) if told)

    @property
    def doubt(self) -> str | None:
        """Why the scores may flatter; None where their rows had no other part."""
        if self.scored_on != HELD_OUT:
            return None
        doubt = "on the held-out rows, which also chose the step: expect a little less on other rows"
        taught = any(step.get("last_fit") for step in self.steps)
        doubt += "; the head was fitted to them after that" if taught else ""
        return doubt + ("; these scores are from before the head got its threshold" if self.threshold else "")

    @property
    def decision(self) -> str | None:
        """From where on the head says yes, where that is not one half."""
        if not self.threshold:
            return None
        value, expected = self.threshold["value"], self.threshold["expected"]
        return (
            f"for its F1 the head says yes from a probability of {value:.2g} on ({expected:.2f} is to be expected): "
            "by its bias, so its probabilities are too high, which the loss shows"
        )

    def summary(self) -> str:
        """What each step did, a line each."""
        lines = []
        for number, step in enumerate(self.steps, 1):
            before, after = step["loss_before"], step["loss_after"]
            fall = "" if before is None or math.isnan(before) else f", held-out loss {before:.4f} → {after:.4f}"
            fall += " with the head fitted again" if step.get("head_refitted") else ""
            if last := step.get("last_fit"):
                fall += f", then to the held-out rows, too ({last['loss']:.4f} where left out)"
            lines.append(
                f"step {number}: {step['direction']}, step size {step['step_size']:.4g}{fall}; {step['reason']}"
            )
        return "\n".join(lines) + "\n"

    def plot(self, path: Path) -> bool:
        """Draws the search, loss against step size, one line per candidate; False where nothing was searched."""
        searched = [step for step in self.steps if step["candidates"]]
        if not searched:
            return False
        # Here, not at the top: matplotlib takes a second to load and most calls draw nothing.
        from matplotlib.figure import Figure

        # A few steps one under the other, many as a sheet of small pictures.
        across, size = (1, (6.4, 4.0)) if len(searched) <= STACKED_MAX else (4, (4.0, 3.2))
        down = -(-len(searched) // across)
        figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for axis in axes[len(searched) :]:
            axis.remove()
        for number, (axis, step) in enumerate(zip(axes, searched, strict=False), 1):
            _draw(axis, step, f"step {number}, " if len(searched) > 1 else "")
        figure.savefig(path, dpi=120, metadata={"Software": None})
        return True


def _is_threshold(found: dict[str, Any]) -> bool:
    numbers = [found.get("value"), found.get("expected")]
    return isinstance(found.get("metric"), str) and all(isinstance(n, float) and 0 < n <= 1 for n in numbers)


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Scores by metric, in a line for each title, as text."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    width = max(10, *(len(name) for name in names)) + 2
    lines = ["".join([f"{'':8}", *(f"{name:>{width}}" for name in names)])]
    for title, found in scores.items():
        cells = (f"{found[name]:>{width}.4f}" if name in found else " " * width for name in names)
        lines.append("".join([f"{title:8}", *cells]))
    return "\n".join(lines) + "\n"


def recall_table(recall: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> str:
    """How many of each class' items are found, as text: a column for each title; of many classes the worst.

    Args:
        recall: Title -> class -> share that is found. The last title's order the worst.
        counts: Items of each class.
    """
    if not recall:
        return ""
    last = list(recall.values())[-1]
    shown, title = list(last), "recall of each class"
    if len(last) > CLASSES_SHOWN:
        shown = sorted(last, key=lambda label: last[label])[:WORST_SHOWN]
        title = f"recall of the {WORST_SHOWN} worst of {len(last)} classes"
    width = max(8, *(len(label) for label in shown))
    lines = [f"{title}:", "".join([f"{'':{width}}{'items':>10}", *(f"{stage:>10}" for stage in recall)])]
    for label in shown:
        cells = (f"{found[label]:>10.4f}" for found in recall.values())
        lines.append("".join([f"{label:{width}}{counts[label]:>10}", *cells]))
    return "\n".join(lines) + "\n"


def _draw(axis: Any, step: dict[str, Any], prefix: str = "") -> None:
    before, lowest = step["loss_before"], step["loss_before"]
    for candidate in step["candidates"]:
        points = [(s, loss) for s, loss in candidate["points"] if s > 0 and loss is not None and math.isfinite(loss)]
        if points:
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=candidate["direction"])
            axis.set_xscale("log")
            lowest = min(lowest, *(loss for _, loss in points))
    axis.axhline(before, color="grey", linestyle="--", linewidth=1, label="before the step")
    if step["step_size"] > 0:
        label = "chosen" if step["accepted"] else "best, refused"
        axis.plot([step["step_size"]], [_loss_at(step)], "k*", markersize=13, label=label)
    # A step that is far too large would flatten all that matters.
    axis.set_ylim(lowest - 0.1 * (before - lowest) - 1e-3, before + 0.25 * max(before - lowest, 0.05))
    axis.set_xlabel("step size")
    axis.set_ylabel("mean loss of the held-out rows (nats)")
    axis.set_title(f"{prefix}{step['direction']}: {'accepted' if step['accepted'] else 'refused'}")
    axis.legend()


def _loss_at(step: dict[str, Any]) -> float:
    """The loss that the search saw at the step size: a refit of the head comes after it."""
    for candidate in step["candidates"]:
        for step_size, loss in candidate["points"]:
            if candidate["direction"] == step["direction"] and step_size == step["step_size"]:
                return loss
    return step["loss_after"]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_record(outcome: StepOutcome) -> dict[str, Any]:
    """One entry of `StepReport.steps`."""
    candidates = [
        {"direction": name, "points": [list(point) for point in result.points]} for name, result in outcome.candidates
    ]
    return {
        "direction": outcome.direction,
        "step_size": outcome.step_size,
        "candidates": candidates,
        "loss_before": outcome.loss_before,
        "loss_after": outcome.loss_after,
        "accepted": outcome.accepted,
        "reason": outcome.reason,
        "energy_lost": outcome.energy_lost,
        "share_moved": outcome.share_moved,
        "parts": [{"part": name, "points": [list(point) for point in result.points]} for name, result in outcome.parts],
        "head_refitted": outcome.head_refitted,
        "last_fit": outcome.last_fit,
    }


def outcome_of(record: dict[str, Any]) -> StepOutcome:
    """The outcome that an entry of `StepReport.steps` was made of, its times aside."""

    def searches(key: str, name: str) -> list[tuple[str, SearchResult]]:
        return [(one[name], SearchResult([tuple(point) for point in one["points"]])) for one in record[key]]

    return StepOutcome(
        **{**record, "candidates": searches("candidates", "direction"), "parts": searches("parts", "part")}
    )


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` count from here on, where that can be: what a process has held it does not forget."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the accelerator since it was last reset, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
