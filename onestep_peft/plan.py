"""What a run would do and cost, before it does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onestep_peft.config import OneStepConfig
from onestep_peft.step.directions import DIRECTIONS, NATURAL, PARAMETER_DIRECTIONS, WHITENED, rank_of, rule_of
from onestep_peft.step.layers import Layer, Prompt
from onestep_peft.step.line_search import EVALUATIONS, PART_EVALUATIONS, PASS_FORWARDS
from onestep_peft.step.snapshot import LARGE
from onestep_peft.step.statistics import statistics_of

SMALL_STEPS = "small steps alone, by Adam; nothing is searched"
SHOWN_NAMES = 4
FP32 = 4  # bytes
# Rules whose direction is a whole matrix where nothing limits its rank; the others' are two factors.
WHOLE = frozenset({"kfac", "lora_one"})


@dataclass(frozen=True)
class Group:
    """Layers of one kind.

    Args:
        name: What their names have in common: the part behind a block's number.
        shape: `(d_out, d_in)`; None for parameters that are moved as they are.
        number: How many.
        parameters: How many numbers move in all of them.
        directions: What they are moved by.
    """

    name: str
    shape: tuple[int, int] | None
    number: int
    parameters: int
    directions: tuple[str, ...]

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" ({self.shape[0]}×{self.shape[1]})"
        return f"{self.number} × {self.name}{shape}{': ' * bool(self.directions)}{', '.join(self.directions)}"


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Args:
        method: "lora", "full" or "prompt_tuning".
        directions: The candidates by name, in the order in which they are searched.
        left_out: Candidates of "auto" that the search's budget of forwards has no room for.
        step_size: η, or None for a search.
        rank: The most that the rank of an update may be whose direction names none; None for the full one.
        steps: The most steps that are made.
        slices: In how many slices the rows are walked through, with a step after each.
        at_once: Whether all of these are small ones, and nothing is searched.
        rows: Number of rows for the "gradient", the "search", the "guard" and the "evaluation". Search and guard
            share theirs.
        groups: What moves; a layer whose gradient turns out to be rounding is left out then.
        moved: Number of parameters that a direction may move.
        fitted: Number of parameters of the fresh head, which is fitted by itself.
        unmoved: Trainable parameters that no direction moves, by name: their number.
        frozen: Number of parameters that are not trainable.
        memory: Bytes by what they hold: "weights", "gradients" (fp32), "statistics", "snapshot" (trainable parameters
            as they were, twice), "directions" (at most) and, where the rows have parts, "bodies" (with each part's
            sums). Activations are not known before the pass.
        snapshot_on_host: Whether the snapshot is kept in the host's memory.
        forwards: Work by part, in forwards of one row: "pass" (a backward counts as two), and at most: "search",
            "head" and "evaluation".
    """

    method: str
    directions: tuple[str, ...]
    left_out: tuple[str, ...]
    step_size: float | None
    rank: int | None
    steps: int
    slices: int
    rows: dict[str, int]
    groups: tuple[Group, ...]
    moved: int
    fitted: int
    unmoved: dict[str, int]
    frozen: int
    memory: dict[str, int]
    snapshot_on_host: bool
    forwards: dict[str, int]
    at_once: bool = False

    def text(self) -> str:
        """For a person to read."""
        size = "searched" if self.step_size is None else f"{self.step_size:g}"
        direction = f"{', '.join(self.directions)}{self._rank_said()}; step size {size}"
        lines = [
            f"rows       {', '.join(f'{number:,} {role}' for role, number in self.rows.items())}",
            f"steps      {'at most ' * (self.steps > 1)}{self.steps}{self._slices_said()}",
            f"method     {self.method}",
            f"direction  {SMALL_STEPS if self.at_once else direction}",
            *[f"left out   {', '.join(self.left_out)}: beyond `search_budget`"] * bool(self.left_out),
            *_listed("moves", [str(group) for group in self.groups]),
            f"parameters {self.moved:,} move, {self.frozen:,} are frozen",
        ]
        if self.fitted:
            lines.append(f"head       {self.fitted:,} parameters are new and fitted by themselves, before and after")
        if self.unmoved:
            shown = ", ".join(list(self.unmoved)[:SHOWN_NAMES])
            more = f" and {len(self.unmoved) - SHOWN_NAMES} more" if len(self.unmoved) > SHOWN_NAMES else ""
            lines.append(
                f"stays      {sum(self.unmoved.values()):,} trainable ones that no direction moves: {shown}{more}"
            )
        return "\n".join([*lines, *self._memory_lines(), *self._work_lines()]) + "\n"

    def _slices_said(self) -> str:
        if self.slices == 1:
            return ""
        each = self.step_size is not None or self.at_once
        then = "with a step after each" if each else "searched after the first, the longest"
        return f": the rows are walked through in {self.slices} slices, {then}"

    def _rank_said(self) -> str:
        """Of the directions whose names do not tell theirs."""
        if not any(rule_of(name) in DIRECTIONS and rank_of(name) is None for name in self.directions):
            return ""
        return "; updates of full rank" if self.rank is None else f"; updates of rank ≤ {self.rank}"

    def _memory_lines(self) -> list[str]:
        notes = {"snapshot": " (in the host's memory)" * self.snapshot_on_host, "directions": " at most"}
        parts = [f"{name} {_size(size)}{notes.get(name, '')}" for name, size in self.memory.items()]
        total = _size(sum(self.memory.values()))
        return [
            f"memory     {', '.join(parts)}",
            f"           {total} in all; a micro-batch's activations come on top, and are not known beforehand",
        ]

    def _work_lines(self) -> list[str]:
        parts = [
            f"{name} {'' if name == 'pass' else '≤ '}{number:,}" for name, number in self.forwards.items() if number
        ]
        epochs = sum(self.forwards.values()) / max(PASS_FORWARDS * self.rows["gradient"], 1)
        return [
            f"work       {', '.join(parts)}, in forwards of one row",
            f"           as much as {epochs:.1f} epochs of training, at most",
        ]


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title if i == 0 else '':10} {line}" for i, line in enumerate(lines)]


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def make_plan(
    model: nn.Module,
    config: OneStepConfig,
    *,
    method: str,
    directions: Sequence[str],
    left_out: Sequence[str],
    rank: int | None,
    layers: Sequence[Layer | Prompt],
    head: nn.Module | None,
    rows: dict[str, int],
    lead: int,
    parts: int = 1,
    by_token: bool = False,
    at_once: bool = False,
) -> Plan:
    """A run in numbers, from what it would be made of. Nothing is allocated, and the model is not called.

    Args:
        left_out: Candidates that the budget of the search has no room for.
        rank: The most that the rank of an update may be whose direction names none.
        layers: What moves, beside the parameters that `sgd` and `sign` move as they are.
        head: The fresh head's last layer, where it is fitted.
        rows: By role, "gradient", "search", "guard" and "evaluation".
        lead: How many rows the head is fitted to at first.
        parts: Into how many parts the rows are dealt, each with a body of its own.
        by_token: Whether the head is fitted to tokens: of them, what the search has seen is not kept.
        at_once: Whether a walk is of small steps alone.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fitted = set(head.parameters()) if head is not None else set()
    moved = {p for layer in layers for p in _parameters(layer)}
    plain = tuple(name for name in directions if name in PARAMETER_DIRECTIONS)
    if plain:
        moved |= set(trainable.values())
    groups = _groups(layers, directions if not at_once else ())
    if plain:
        name = "trainable parameter, as it is" if len(trainable) == 1 else "trainable parameters, as they are"
        groups.append(Group(name, None, len(trainable), _count(trainable.values()), plain))
    memory = {
        "weights": sum(t.nbytes for t in {*model.parameters(), *model.buffers()}),
        "gradients": FP32 * _count(trainable.values()),
        "statistics": _statistics_size(layers, directions, rows["gradient"]),
        "snapshot": 2 * sum(p.nbytes for p in trainable.values()),
        "directions": _directions_size(layers, directions, rank)
        + FP32 * ("sign" in plain) * _count(trainable.values()),
    }
    if parts > 1:
        kept = sum(layer.shape[0] * layer.shape[1] for layer in layers if _in_place(layer))
        memory["bodies"] = parts * (memory["statistics"] + FP32 * kept + memory["snapshot"] // 2)
    if at_once:  # Adam's two means, of the prompt and of its head
        memory["walk"] = memory["snapshot"] // 2 + 2 * FP32 * _count(
            {p for p in trainable.values() if p in moved | fitted}
        )
        memory["directions"] = 0
    elif config.walks:  # where it began, and where it last was well
        memory["walk"] = memory["snapshot"] + _metric_size(layers, directions)
    return Plan(
        method=method,
        directions=tuple(directions),
        left_out=tuple(left_out) if not at_once else (),
        step_size=config.fixed_step_size,
        rank=rank,
        steps=config.max_steps,
        slices=int(config.slices),
        rows=rows,
        groups=tuple(groups),
        moved=_count(moved),
        fitted=_count(fitted),
        unmoved={name: p.numel() for name, p in trainable.items() if p not in moved and p not in fitted},
        frozen=_count(p for p in model.parameters() if not p.requires_grad),
        memory=memory,
        snapshot_on_host=memory["snapshot"] // 2 > LARGE,
        forwards=_forwards(
            config,
            rows,
            lead=lead,
            points=0 if at_once else _points(config, layers, directions),
            fits_head=head is not None,
            parts=parts,
            forgets=by_token or (config.slices != 1 and not at_once),
            half=config.bf16 or any(parameter.dtype.itemsize < FP32 for parameter in fitted),
        ),
        at_once=at_once,
    )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _parameters(layer: Layer | Prompt) -> list[Tensor]:
    """What an update of a layer is written to: its own parameter, or the factors beside a frozen weight."""
    if layer.parameter is not None:
        return [layer.parameter()]
    return [parameter for parameter in layer.module.parameters() if parameter.requires_grad]


def _in_place(layer: Layer | Prompt) -> bool:
    """Whether the layer's gradient is its parameter's."""
    return isinstance(layer, Layer) and layer.parameter is not None


def _groups(layers: Sequence[Layer | Prompt], directions: Sequence[str]) -> list[Group]:
    found: dict[tuple[str, tuple[int, int], tuple[str, ...]], list[int]] = {}
    for layer in layers:
        known: Any = (NATURAL, *DIRECTIONS) if isinstance(layer, Prompt) else DIRECTIONS
        key = (_kind(layer.name), layer.shape, tuple(name for name in directions if rule_of(name) in known))
        found.setdefault(key, []).append(_count(_parameters(layer)))
    return [Group(name, shape, len(sizes), sum(sizes), by) for (name, shape, by), sizes in found.items()]


def _kind(name: str) -> str:
    """A layer's name behind the number of its block: what is the same in every block."""
    parts = ["*" if part.isdigit() else part for part in name.removeprefix("base_model.model.").split(".")]
    behind = parts[parts.index("*") + 1 :] if "*" in parts else []
    return ".".join(behind or parts)


def _statistics_size(layers: Sequence[Layer | Prompt], directions: Sequence[str], rows: int) -> int:
    whitened = not WHITENED.isdisjoint(map(rule_of, directions))
    total = 0
    for layer in layers:
        sums = statistics_of(layer, whitened, torch.device("meta")).sums()
        total += sum(tensor.nbytes for tensor in sums.values())
        if isinstance(layer, Prompt):  # rows' gradients, until their Gram matrix is smaller
            size = layer.shape[0] * layer.shape[1]
            total += FP32 * min(rows, size) * size
    return total


def _metric_size(layers: Sequence[Layer | Prompt], directions: Sequence[str]) -> int:
    """What a walk keeps of the covariances: their roots, in fp32."""
    whitened = not WHITENED.isdisjoint(map(rule_of, directions))
    total = 0
    for layer in layers:
        if isinstance(layer, Prompt):
            total += FP32 * sum(d * d for d in layer.shape)
            continue
        sums = statistics_of(layer, whitened, torch.device("meta")).sums()
        total += sum(sums[name].nbytes for name in ("input_covariance", "output_grad_covariance"))
    return total


def _directions_size(layers: Sequence[Layer | Prompt], directions: Sequence[str], rank: int | None) -> int:
    """What the candidates hold at once: a matrix, or two factors."""
    total = 0
    for layer in layers:
        d_out, d_in = layer.shape
        for name in directions:
            rule, limits = rule_of(name), [limit for limit in (rank_of(name) or rank, layer.rank) if limit is not None]
            if rule == NATURAL or (rule in WHOLE and not limits):
                total += FP32 * d_out * d_in
            elif rule in DIRECTIONS:
                total += FP32 * (d_out + d_in) * min(d_out, d_in, *limits)
    return total


def _points(config: OneStepConfig, layers: Sequence[Layer | Prompt], directions: Sequence[str]) -> int:
    """The most points that the search of one step looks at: each candidate's first part, and the winner's others."""
    if config.fixed_step_size is not None:
        return len(directions)
    parts = {layer.part for layer in layers if isinstance(layer, Layer)}
    return len(directions) * EVALUATIONS + max(0, len(parts) - 1) * PART_EVALUATIONS


def _forwards(
    config: OneStepConfig,
    rows: dict[str, int],
    *,
    lead: int,
    points: int,
    fits_head: bool,
    parts: int,
    forgets: bool,
    half: bool,
) -> dict[str, int]:
    held, steps, walks = max(rows["search"], rows["guard"]), config.max_steps, config.max_steps // int(config.slices)
    recomputed = int(bool(getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing))
    searches = walks if config.walks else steps
    # One look before the first step, at which the head is fitted too; at each point; before the later searches, but
    # that after a walk the head's fit has just looked, unless it is taken back or bodies have stood in; and after the
    # small steps of a walk.
    looks = 1 + searches * points + searches - 1 + walks * int(config.walks)
    if fits_head:
        # In half precision losses do not follow from the head's inputs: they take another forward after each fit.
        looks += walks * int(forgets) + (1 + walks) * int(half) + (walks - 1) * int(parts > 1)
    if config.stop_at is not None:
        looks += 1 + walks
    stages = 3 if fits_head else 2
    return {
        "pass": (PASS_FORWARDS + recomputed) * rows["gradient"] * walks,
        "search": looks * held,
        # Between walks also at the bodies of the parts.
        "head": (lead + rows["gradient"] * (walks + (walks - 1) * int(parts > 1))) * int(fits_head),
        "evaluation": (rows["evaluation"] or held) * stages,
    }
