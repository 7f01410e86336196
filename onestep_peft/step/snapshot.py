"""Parameters as they were, to the bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Snapshot:
    """Copies of some parameters, for the case that they have to come back.

    Args:
        parameters: Held as they are; their copies stay on their device.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._copies = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives every parameter the bits that it had."""
        for parameter, bits in self._copies:
            parameter.copy_(bits)
