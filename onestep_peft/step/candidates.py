"""Rays in parameter space: where each direction of a step leads, at any step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onestep_peft.step.directions import (
    DIRECTIONS,
    NATURAL,
    PARAMETER_DIRECTIONS,
    WHITENED,
    as_it_is,
    rank_of,
    rule_of,
    whiten,
)
from onestep_peft.step.layers import PARTS, Layer, LowRank, Part, Prompt
from onestep_peft.step.natural import RowGradients
from onestep_peft.step.parameter_gradients import ParameterGradients
from onestep_peft.step.snapshot import Snapshot
from onestep_peft.step.statistics import LayerStatistics, Statistics

# The first step size tried moves the weights by this share of their norm: where the best ones were on sms_spam,
# ag_news and held-out training rows of other sets. `kfac` moves few layers far, the others all layers alike.
RELATIVE_START = 0.05
RELATIVE_STARTS = {"kfac": 0.1}


def share_at_start(direction: str) -> float:
    """By which share of the weights' norm a search for this direction first moves them."""
    return RELATIVE_STARTS.get(rule_of(direction), RELATIVE_START)


class Ray(Protocol):
    """One direction of one part of the model.

    Attributes:
        weight: Frobenius norm of what moves.
        length: Frobenius norm of the direction.
    """

    weight: float
    length: float

    def apply(self, step_size: float) -> float:
        """Goes there from the start; returns the share of the update's energy that could not be written."""
        ...


class ParameterRay:
    """θ ← θ − η D, for a parameter as it is.

    Args:
        parameter: θ.
        start: θ before the step, on whatever device it is kept.
        direction: D, as a matrix.
        as_matrix: The view of θ that D belongs to.
    """

    def __init__(
        self, parameter: Tensor, start: Tensor, direction: Tensor | LowRank, as_matrix: Callable[[Tensor], Tensor]
    ) -> None:
        self._parameter, self._start, self._direction, self._as_matrix = parameter, start, direction, as_matrix
        self.weight = float(start.float().norm())
        self.length = float(direction.norm())

    @torch.no_grad()
    def apply(self, step_size: float) -> float:
        start = self._start.to(self._parameter.device)
        if step_size == 0.0:
            self._parameter.copy_(start)
            return 0.0
        direction = self._direction.dense() if isinstance(self._direction, LowRank) else self._direction
        # In fp32, and rounded once: a bf16 weight would drop a small update.
        moved = self._as_matrix(start).float() - step_size * direction.float()
        self._as_matrix(self._parameter).copy_(moved)
        return 0.0


class ProductRay:
    """W ← W + W_so_far − η D, for a layer whose update is a product."""

    def __init__(self, layer: Layer, direction: LowRank) -> None:
        assert layer.read is not None and layer.write is not None
        self._write, self._direction, self._so_far = layer.write, direction, layer.read()
        self.weight, self.length = layer.weight_norm, direction.norm()

    @torch.no_grad()
    def apply(self, step_size: float) -> float:
        update = self._direction.scaled(-step_size)
        return self._write(update if self._so_far is None else self._so_far.plus(update))


class Bundle:
    """Rays that go equally far.

    Args:
        rays: One a layer or parameter.
        share: Of the norm of what moves that the first step tried moves it by.

    Attributes:
        start: The step size to try first.
    """

    def __init__(self, rays: Sequence[Ray], share: float) -> None:
        self._rays = rays
        weights = math.sqrt(sum(ray.weight**2 for ray in rays))
        length = math.sqrt(sum(ray.length**2 for ray in rays))
        moved = share * (weights or 1.0)  # weights that are all zero have no scale of their own
        self.start = moved / length if length > 0 else moved

    def apply(self, step_size: float) -> float:
        """Puts them at this step size; returns the largest share of energy that a layer could not hold."""
        return max((ray.apply(step_size) for ray in self._rays), default=0.0)


class Candidate:
    """A direction for all that it moves.

    Weights, vectors (biases and gains) and embeddings are told apart: what is known of their curvature is of
    different quality (for vectors and embeddings a diagonal, for an output layer a trace), so one step size for all
    of them would be the most cautious one.

    Args:
        name: The direction's.
        rays: By part.

    Attributes:
        parts: By name, in the order in which they are searched.
    """

    def __init__(self, name: str, rays: Mapping[Part, Sequence[Ray]]) -> None:
        self.name = name
        self.parts = {part: Bundle(rays[part], share_at_start(name)) for part in PARTS if rays.get(part)}

    @property
    def first(self) -> Bundle:
        """The part by which candidates are compared."""
        return next(iter(self.parts.values()))

    def apply(self, step_size: float) -> float:
        """Puts all parts at one step size; returns the largest share of energy that a layer could not hold."""
        return max(part.apply(step_size) for part in self.parts.values())


@dataclass(frozen=True)
class Evidence:
    """What a pass leaves for the directions.

    Args:
        layers: What the directions for layers move.
        statistics: By layer name.
        gradients: Of the trainable parameters.
        before: The parameters as they were before the step.
    """

    layers: Sequence[Layer | Prompt]
    statistics: Mapping[str, Statistics]
    gradients: ParameterGradients
    before: Snapshot


def build_candidates(
    evidence: Evidence, directions: Sequence[str], *, damping: float, rank: int | None
) -> list[Candidate]:
    """All candidates from one pass, in the order of `directions`; those that would move nothing are left out.

    A layer is whitened once, whatever the number of rules that use it.

    Args:
        rank: Of the directions whose names ask for none; None for the full one.
    """
    rays: dict[str, dict[Part, list[Ray]]] = {name: {part: [] for part in PARTS} for name in directions}
    for layer in evidence.layers:
        record = evidence.statistics[layer.name]
        if record.is_noise():
            continue
        for name, direction in _layer_directions(layer, record, directions, damping, rank):
            rays[name][layer.part].append(_layer_ray(layer, direction, evidence.before))
    for name in directions:
        rule = PARAMETER_DIRECTIONS.get(name)
        if rule is not None:
            rays[name]["weights"] += [_ray(p, evidence.before, rule(total)) for p, total in evidence.gradients.all()]
    return [Candidate(name, rays[name]) for name in directions if any(rays[name].values())]


def _layer_directions(
    layer: Layer | Prompt, record: Statistics, names: Sequence[str], damping: float, rank: int | None
) -> Iterator[tuple[str, LowRank | Tensor]]:
    if isinstance(record, RowGradients) and NATURAL in names:
        yield NATURAL, record.natural(damping)
    assert isinstance(record, LayerStatistics | RowGradients)
    rules = {name: rule_of(name) for name in names if rule_of(name) in DIRECTIONS}
    white = whiten(record, damping) if not WHITENED.isdisjoint(rules.values()) else None
    plain = as_it_is(record) if not WHITENED.issuperset(rules.values()) else None
    for name, rule in rules.items():
        source = white if rule in WHITENED else plain
        assert source is not None
        yield name, DIRECTIONS[rule](source, least(layer.rank, rank_of(name) or rank))


def least(one: int | None, other: int | None) -> int | None:
    """The smaller of two ranks; None is the full one."""
    return other if one is None else one if other is None else min(one, other)


def _layer_ray(layer: Layer | Prompt, direction: LowRank | Tensor, before: Snapshot) -> Ray:
    if isinstance(layer, Prompt):
        return _ray(layer.parameter(), before, direction)
    if layer.parameter is None:
        assert isinstance(direction, LowRank)  # a layer that takes products has a rank
        return ProductRay(layer, direction)
    parameter = layer.parameter()
    return ParameterRay(parameter, before.of(parameter), direction, layer.as_matrix)


def _ray(parameter: Tensor, before: Snapshot, direction: Tensor | LowRank) -> ParameterRay:
    return ParameterRay(parameter, before.of(parameter), direction, lambda tensor: tensor)
