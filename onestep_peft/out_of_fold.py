"""Heads that have not seen the rows that they answer for.

A head knows the rows that it was fitted to: its residuals on them are smaller than on any other row, and where they
are large it is for what could not be learnt by heart. A pass that starts from such residuals moves the body to what is
particular about the training rows. Here the rows are dealt into folds, and each fold's residuals come from a head that
was fitted to the others, as in stacked generalisation (Wolpert, Neural Networks 5, 1992). It costs no forward: the
heads are fitted to inputs that the first head's fit has cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onestep_peft import head
from onestep_peft.head import Features, HeadFit
from onestep_peft.held_out import content_key
from onestep_peft.tasks import Task

PREFIX = "fold_heads."


def fold_of_each(rows: Sequence[Mapping[str, Any]], folds: int) -> Tensor:
    """A fold for each row, `(rows,)`, by its content alone: not by its place or padding, and the same for equal rows.

    Rows of the same labels are dealt out evenly.
    """
    keys = [(repr(row["labels"]), content_key(row)) for row in map(_without_padding, rows)]
    number = {key: i % folds for i, key in enumerate(sorted(set(keys)))}
    return torch.tensor([number[key] for key in keys])


def _without_padding(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with only what its attention mask leaves of each token's values."""
    mask = row.get("attention_mask")
    if mask is None or all(mask):
        return row

    def kept(value: Any) -> Any:
        by_token = hasattr(value, "__len__") and len(value) == len(mask)
        return [one for one, real in zip(value, mask, strict=True) if real] if by_token else value

    return {name: kept(value) for name, value in row.items()}


@dataclass(frozen=True)
class FoldHeads:
    """A head for each fold, fitted to the rows of all others.

    Args:
        weight: `(folds, outputs, d)`.
        bias: `(folds, outputs)`, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        named = {f"{PREFIX}weight": self.weight}
        return named if self.bias is None else {**named, f"{PREFIX}bias": self.bias}

    @classmethod
    def among(cls, named: Mapping[str, Tensor]) -> FoldHeads | None:
        """Those whose `tensors` are among others; None where there are none."""
        weight = named.get(f"{PREFIX}weight")
        return None if weight is None else cls(weight, named.get(f"{PREFIX}bias"))

    @classmethod
    def interleaved(cls, parts: Sequence[FoldHeads | None]) -> FoldHeads | None:
        """Fold f of part p becomes fold f · parts + p; None where some part has no heads."""
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            return None
        weight = torch.stack([part.weight for part in there], 1).flatten(0, 1)
        biases = [part.bias for part in there if part.bias is not None]
        return cls(weight, torch.stack(biases, 1).flatten(0, 1) if biases else None)

    @contextmanager
    def answering(self, layer: nn.Module, folds: Tensor) -> Iterator[None]:
        """While open, the layer answers for each row of a batch as the head of its fold would.

        Args:
            layer: The head's last layer; its inputs are `(rows, ..., d)`.
            folds: `(rows,)`.
        """

        def instead(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            there = folds.to(x.device)
            logits = torch.einsum("nod,n...d->n...o", self.weight.to(x)[there], x)
            if self.bias is not None:
                bias = self.bias.to(x)[there]
                logits = logits + bias.reshape(len(bias), *[1] * (x.dim() - 2), -1)
            return logits.to(output.dtype)

        handle = layer.register_forward_hook(instead)
        try:
            yield
        finally:
            handle.remove()


def fit(found: Features, folds_of_items: Tensor, folds: int, whole: HeadFit, task: Task) -> FoldHeads | None:
    """A head for each fold, at the penalty of the head that was fitted to all rows, and from it on.

    Args:
        found: What the head is fitted to.
        folds_of_items: `(items,)`.
        folds: How many there are: the items may be a sample of the rows, without any of some fold.
        whole: The head of all rows.

    Returns:
        None where a fold holds all the items: there is no other then to fit a head to.
    """
    fitted = []
    for fold in range(folds):
        others = folds_of_items.ne(fold)
        if not bool(others.any()):
            return None
        fitted.append(head.refit(found.x[others], found.labels[others], whole, task))
    biases = [one.bias for one in fitted if one.bias is not None]
    weight = torch.stack([one.weight for one in fitted]).float()
    return FoldHeads(weight, torch.stack(biases).float() if biases else None)
