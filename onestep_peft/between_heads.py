"""How far to go from one head to another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from onestep_peft import head
from onestep_peft.head import HeadFit
from onestep_peft.tasks import TEXT_CLASSIFICATION, Task

# Held-out items are asked after each of so many equal strides on the way.
STRIDES = 20


def between(one: HeadFit, other: HeadFit, x: Tensor, labels: Tensor, task: Task = TEXT_CLASSIFICATION) -> HeadFit:
    """The head on the way from one to another whose loss on held-out items is the lowest; a tie goes to the first.

    Args:
        x: `(items, d)`.
        labels: `(items,)`, or `(items, outputs)`.
    """
    sums, items = losses_between(one, other, x, labels, task)
    best = lowest(sums)
    return replace(mixed(one, other, best), held_out_loss=float(sums[best]) / items)


@torch.no_grad()
def losses_between(one: HeadFit, other: HeadFit, x: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, int]:
    """The summed losses of the items with a label at equal strides from one head to another, and their number.

    Along the way the loss is convex, so that the mean of two heads is never worse than both.

    Args:
        x: `(items, d)`.
        labels: `(items,)`, or `(items, outputs)`.

    Returns:
        `(STRIDES + 1,)`, float64, on the CPU; and the number.
    """
    x, labels = head.labelled(x, labels, task)

    def loss(fit: HeadFit) -> float:
        return float(task.row_losses(fit.logits(x), labels).sum())

    return torch.tensor([loss(mixed(one, other, i)) for i in range(STRIDES + 1)], dtype=torch.float64), len(x)


def lowest(losses: Tensor) -> int:
    """After how many strides the loss is the lowest; the first of equal ones, and none that is not finite."""
    return int(losses.nan_to_num(nan=torch.inf).argmin())


def mixed(one: HeadFit, other: HeadFit, strides: int) -> HeadFit:
    """The head so many of `STRIDES` equal strides on the way from one to another."""
    share = strides / STRIDES
    weight = torch.lerp(one.weight.double(), other.weight.double(), share)
    if one.bias is None or other.bias is None:
        return HeadFit(weight, None, other.penalty, None)
    return HeadFit(weight, torch.lerp(one.bias.double(), other.bias.double(), share), other.penalty, None)
