"""Products of fp32 matrices on a CPU, as fast as oneDNN takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# What factors may be rounded to. oneDNN does so where the processor has matrix units for it. Elsewhere they stay in
# fp32, but on processors with wide vectors oneDNN's own product is often faster than the one that torch prefers.
PRECISION = "bf16"
# An entry that bfloat16 does not tell from 1, and fp32 does.
NEAR_ONE = 1 + 2.0**-12


@contextmanager
def quick_products() -> Iterator[None]:
    """While open, products of fp32 matrices on the CPU may round their factors to bfloat16; sums stay in fp32.

    Only matrix products belong in here: attention's many small ones take longer. Where torch does not know the switch
    (before 2.9) nothing changes.
    """
    switch: Any = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
    if switch is None:
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = PRECISION
    try:
        yield
    finally:
        switch.fp32_precision = before


@cache
def quick_ones_are_exact() -> bool:
    """Whether this processor takes quick products without rounding, as a product of a layer's size shows."""
    entries = torch.full((512, 512), NEAR_ONE)
    with quick_products():
        found = torch.zeros(512, 512).addmm_(entries.T, entries)
    return bool((found / 512 - NEAR_ONE**2).abs().max() < (NEAR_ONE - 1) / 10)
