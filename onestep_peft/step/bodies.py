"""Bodies that have not moved by the rows that they answer for.

After a step the model knows the rows that moved it: their losses are lower than other rows', and a second gradient of
theirs says little that holds elsewhere. Here the rows are dealt into parts. Beside the model there is a body for each
part, which every step moves along with it by the rows of the *other* parts, and a later pass takes each
row's gradient at the body of its part. It is the cross-fitting of Chernozhukov et al., "Double/debiased machine
learning", Econometrics Journal 21, 2018, with the body of a network for the nuisance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onestep_peft.step import processes
from onestep_peft.step.candidates import Evidence, build_candidates
from onestep_peft.step.layers import Layer
from onestep_peft.step.snapshot import Snapshot
from onestep_peft.step.statistics import LayerStatistics

# A parameter's state in torch.optim's sense, which Trainer's checkpoints hold.
KEY = "bodies"
State = MutableMapping[Tensor, dict[str, Any]]


class Bodies:
    """What moves of the model, once for each part of the rows.

    Args:
        parameters: What a step moves; the head is not among them.
        parts: Into how many parts the rows are dealt; with one there is no body but the model's own.
        state: Returns the optimizer's state by parameter, where the bodies are kept, `(parts, *shape)` each. Asked for
            anew each time: loading a checkpoint replaces it.
    """

    def __init__(self, parameters: Sequence[Tensor], parts: int, state: Callable[[], State]) -> None:
        self.parts = parts
        self._parameters, self._state = list(parameters), state
        self._model: Snapshot | None = None  # the model's own parameters, while a body stands in for them
        self._inside: int | None = None
        self._closed: list[dict[str, Tensor]] = []
        self._total: dict[str, Tensor] = {}

    @property
    def apart(self) -> bool:
        """Whether the bodies have moved, and so differ from the model."""
        return self.parts > 1 and bool(self._parameters) and KEY in self._state().get(self._parameters[0], {})

    def forget(self) -> None:
        """There are no bodies any more but the model's own."""
        for parameter in self._parameters:
            self._state().get(parameter, {}).pop(KEY, None)

    def check(self) -> None:
        """Raises a ValueError where a checkpoint's bodies are of other parts."""
        found = len(self._state()[self._parameters[0]][KEY]) if self.apart else self.parts
        if found != self.parts:
            raise ValueError(
                f"The checkpoint goes on with `body_folds={found}`, and the run has {self.parts}. Resume with the same "
                "`body_folds`."
            )

    @torch.no_grad()
    def enter(self, part: int) -> None:
        """Lets a part's body stand in for the model's own, until `leave`."""
        if not self.apart or part == self._inside:
            return
        self._model = self._model or Snapshot(self._parameters)
        for parameter in self._parameters:
            parameter.copy_(self._state()[parameter][KEY][part])
        self._inside = part

    def leave(self) -> None:
        """The model as it is."""
        if self._model is not None:
            self._model.restore()
        self._model = self._inside = None

    @contextmanager
    def standing_in(self, part: int) -> Iterator[None]:
        """While open, a part's body stands in for the model's own."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def own(self, parameter: Tensor) -> Tensor:
        """The model's own parameter, whoever stands in for it."""
        return self._model.of(parameter) if self._model is not None and parameter in self._model else parameter

    # What the parts' rows say

    def begin_pass(self) -> None:
        """No part has been passed through."""
        self.leave()
        self._closed, self._total = [], {}

    def close_before(self, part: int, sums: Callable[[], Mapping[str, Tensor]]) -> None:
        """Notes, where a part begins, what the rows before it have summed up to.

        Args:
            sums: Returns `items` (all, and those that count for covariances), and by layer and name what its statistics
                and its gradient are so far.
        """
        while len(self._closed) < min(part, self.parts - 1):
            self._closed.append(_copied(sums()))

    def end_pass(self, sums: Mapping[str, Tensor]) -> None:
        """Notes the sums of all parts, and adds up what the processes have noted."""
        self._total = _copied(sums)
        for noted in (*self._closed, self._total):
            processes.sum_over(noted.values())

    def _others(self, part: int) -> dict[str, Tensor]:
        """The sums over the rows of all parts but this one."""
        until = self._closed[part] if part < len(self._closed) else self._total
        before = self._closed[part - 1] if part > 0 else {}
        return {name: total - until[name] + before.get(name, 0) for name, total in self._total.items()}

    def _evidence_of_others(self, evidence: Evidence, part: int) -> Evidence:
        """What a pass through the other parts alone would have left, for the layers."""
        sums, records = self._others(part), dict(evidence.statistics)
        items, covered = sums["items"].tolist()
        for layer in evidence.layers:
            record = records[layer.name]
            if isinstance(layer, Layer) and isinstance(record, LayerStatistics):
                prefix = f"{layer.name}/"
                own = {name.removeprefix(prefix): sums.pop(name) for name in list(sums) if name.startswith(prefix)}
                records[layer.name] = record.of(own, items, covered)
        return Evidence(evidence.layers, records, evidence.gradients, Snapshot(self._parameters))

    @torch.no_grad()
    def follow(
        self, evidence: Evidence, direction: str, reach: Mapping[str, float], *, damping: float, rank: int | None
    ) -> None:
        """Moves each body as the model has been moved: by the same rule, as far, by what the other parts' rows say.

        Not even a covariance is shared: whitened by its own δ, a row's gradient would be held back.

        Args:
            evidence: What the pass has left, with the parameters as they were before the step.
            direction: The step's.
            reach: By part of the model, the step size in units of the first one tried.
            damping: As in `build_candidates`.
            rank: As in `build_candidates`.
        """
        moved, before, apart = Snapshot(self._parameters), evidence.before, self.apart
        bodies: list[list[Tensor]] = []
        for part in range(self.parts):
            for parameter in self._parameters:
                parameter.copy_(self._state()[parameter][KEY][part] if apart else before.of(parameter))
            own = self._evidence_of_others(evidence, part)
            for candidate in build_candidates(own, [direction], damping=damping, rank=rank):
                for name, bundle in candidate.parts.items():
                    bundle.apply(reach.get(name, 0.0) * bundle.start)
            processes.broadcast(self._parameters)
            bodies.append([parameter.detach().clone() for parameter in self._parameters])
        self._closed, self._total = [], {}
        moved.restore()
        for parameter, copies in zip(self._parameters, zip(*bodies, strict=True), strict=True):
            self._state()[parameter][KEY] = torch.stack(copies)

    # What an unfinished pass keeps

    def tensors(self) -> dict[str, Tensor]:
        """The bodies and the sums of parts, by name."""
        named = {f"sums.{i}.{name}": total for i, sums in enumerate(self._closed) for name, total in sums.items()}
        if self.apart:
            named |= {f"moved.{i}": self._state()[parameter][KEY] for i, parameter in enumerate(self._parameters)}
        return named

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` returned."""
        device, self._closed = self._parameters[0].device, []
        for i, parameter in enumerate(self._parameters):
            if f"moved.{i}" in named:
                self._state()[parameter][KEY] = named[f"moved.{i}"].to(parameter)
        for i in range(self.parts - 1):
            if sums := below(f"sums.{i}", named):
                self._closed.append({name: total.to(device) for name, total in sums.items()})


def below(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names start with a prefix and a dot, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in named.items() if name.startswith(start)}


def _copied(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: total.clone() for name, total in sums.items()}
