"""Products of fp32 matrices on a CPU by oneDNN, where it is as exact as torch's own choice and often faster."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

# An entry that bfloat16 does not tell from 1, and fp32 does.
NEAR_ONE = 1 + 2.0**-12


class _Switch:
    """Lets oneDNN take products of fp32 matrices, and round their factors to bfloat16 if it likes.

    It is one for the whole process: the first who asks turns it, the last one turns it back.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        onednn: Any = torch.backends.mkldnn
        with self._lock:
            if self._users == 0:
                self._before = onednn.matmul.fp32_precision
                if self._before == onednn.fp32_precision:
                    self._before = "none"  # it follows that one, and is to go on doing so
                onednn.matmul.fp32_precision = "bf16"
            self._users += 1

    def __exit__(self, *_: object) -> None:
        onednn: Any = torch.backends.mkldnn
        with self._lock:
            self._users -= 1
            if self._users == 0:
                onednn.matmul.fp32_precision = self._before


_SWITCH = _Switch()


@cache
def are_exact() -> bool:
    """Whether this processor takes such products without rounding, as one of a layer's size shows.

    Processors with matrix units for bfloat16 round, others do not. Before torch 2.9 there is no switch.
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    entries = torch.full((512, 512), NEAR_ONE, dtype=torch.float32, device="cpu")
    with _SWITCH:
        found = torch.zeros_like(entries).addmm_(entries.T, entries)
    return bool((found / 512 - NEAR_ONE**2).abs().max() < (NEAR_ONE - 1) / 10)


def quick_products(device: torch.device) -> AbstractContextManager[None]:
    """While open, products of fp32 matrices on the CPU are oneDNN's, if these are exact here.

    Only products of a layer's size belong in here: attention's many small ones take longer.
    """
    return _SWITCH if device.type == "cpu" and are_exact() else nullcontext()
