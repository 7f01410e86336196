"""Gradients of parameters, summed over a pass in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class ParameterGradients:
    """Sums of the gradients of some parameters.

    Those of fp32 parameters stay where autograd adds them up, in `.grad`. A 16-bit `.grad` would lose a third of the
    sum over a few thousand micro-batches, so each micro-batch's is moved into an fp32 sum at once and freed.

    Args:
        parameters: Those that need a gradient.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._wide: dict[Tensor, Tensor] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        """While open, 16-bit gradients are moved into fp32 sums as they come."""
        narrow = [parameter for parameter in self.parameters if parameter.dtype.itemsize < 4]
        self._wide = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in narrow}
        handles = [parameter.register_post_accumulate_grad_hook(self._move) for parameter in narrow]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._wide = {}

    @torch.no_grad()
    def _move(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._wide[parameter] += parameter.grad
        parameter.grad = None

    def of(self, parameter: Tensor) -> Tensor | None:
        """The sum (after `divide` the mean) for a parameter; None where it took no part."""
        return self._wide.get(parameter, parameter.grad)

    def all(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that took part, with their sums."""
        return [(parameter, total) for parameter in self.parameters if (total := self.of(parameter)) is not None]

    def sums(self) -> dict[str, Tensor]:
        """The sums by the parameters' numbers, as text; those that took no part are left out."""
        found = {str(i): self.of(parameter) for i, parameter in enumerate(self.parameters)}
        return {number: total for number, total in found.items() if total is not None}

    def load(self, sums: Mapping[str, Tensor]) -> None:
        """Takes over what `sums` returned."""
        for number, total in sums.items():
            parameter = self.parameters[int(number)]
            if parameter in self._wide:
                self._wide[parameter].copy_(total)
            else:
                parameter.grad = total.to(parameter)

    def reset(self) -> None:
        """Empties the fp32 sums; `.grad` is emptied by whoever runs the loop."""
        for total in self._wide.values():
            total.zero_()

    @torch.no_grad()
    def divide(self, items: float) -> None:
        """Turns sums into means."""
        for _, total in self.all():
            total /= items
