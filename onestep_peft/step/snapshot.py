"""Parameters as they were, to the bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Copies of more than this many bytes are kept in the host's memory: beside a whole model and its gradient an
# accelerator has no room for them.
LARGE = 2**30


class Snapshot:
    """Copies of some parameters, for the case that they have to come back.

    Args:
        parameters: Held as they are.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        held = list(parameters)
        large = sum(parameter.nbytes for parameter in held) > LARGE
        self._copies = {
            parameter: parameter.detach().to("cpu" if large else parameter.device, copy=True) for parameter in held
        }

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._copies

    def of(self, parameter: Tensor) -> Tensor:
        """A parameter's copy."""
        return self._copies[parameter]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives every parameter the bits that it had."""
        for parameter, bits in self._copies.items():
            parameter.copy_(bits)
