"""Heads that have not seen the rows that they answer for.

A head knows the rows that it was fitted to: its residuals on them are smaller than on any other row, and where they
are large it is for what could not be learnt by heart. A pass that starts from such residuals moves the body to what is
particular about the training rows. Here the rows are dealt into folds, and each fold's residuals come from a head that
was fitted to the others, as in stacked generalisation (Wolpert, Neural Networks 5, 1992).

A row also has a say in the heads of the other folds, and when the body moves it, they follow. Where the head is fitted
again after a step, the gradient of the pass is therefore the mean of two, of the rows' loss under heads that stay, and
of that under heads that are fitted anew (at the penalty that they have) wherever the body goes: a row's own residual's,
and half of its pull on the heads, by implicit differentiation (see `head_problem`).

Both cost no forward: the heads are fitted to inputs that the first head's fit has cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onestep_peft import head
from onestep_peft.head import Features, HeadFit
from onestep_peft.held_out import content_key, without_padding
from onestep_peft.tasks import Task

PREFIX = "fold_heads."
# The search looks with a head that stays, and after the step the head goes to its new fit only as far as held-out rows
# want: so much of a row's pull counts.
FOLLOWING = 0.5
# (logits of some rows, their attention mask) -> what is added to each row's loss, `(rows,)`.
Pulling = Callable[[Tensor, Tensor | None], Tensor]


def fold_of_each(rows: Sequence[Mapping[str, Any]], folds: int) -> Tensor:
    """A fold for each row, `(rows,)`, by its content alone: not by its place or padding, and the same for equal rows.

    Rows of the same labels are dealt out evenly.
    """
    keys = [(repr(row["labels"]), content_key(row)) for row in map(without_padding, rows)]
    number = {key: i % folds for i, key in enumerate(sorted(set(keys)))}
    return torch.tensor([number[key] for key in keys])


@dataclass(frozen=True)
class FoldHeads:
    """A head for each fold, fitted to the rows of all others.

    Args:
        weight: `(folds, outputs, d)`.
        bias: `(folds, outputs)`, or None.
        pulls: How the loss of all other rows changes with what the head's last layer sees of a row, as far as it
            counts, `(rows, d)`, in nats; None where heads stay.
    """

    weight: Tensor
    bias: Tensor | None
    pulls: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        parts = {"weight": self.weight, "bias": self.bias, "pulls": self.pulls}
        return {f"{PREFIX}{name}": part for name, part in parts.items() if part is not None}

    @classmethod
    def among(cls, named: Mapping[str, Tensor]) -> FoldHeads | None:
        """Those whose `tensors` are among others; None where there are none."""
        weight = named.get(f"{PREFIX}weight")
        return None if weight is None else cls(weight, named.get(f"{PREFIX}bias"), named.get(f"{PREFIX}pulls"))

    @classmethod
    def interleaved(cls, parts: Sequence[FoldHeads | None]) -> FoldHeads | None:
        """Fold f of part p becomes fold f · parts + p; None where some part has no heads.

        A row's pull is that of the part it belongs to; in the others it is zero.
        """
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            return None
        weight = torch.stack([part.weight for part in there], 1).flatten(0, 1)
        biases = [part.bias for part in there if part.bias is not None]
        pulls = [part.pulls for part in there if part.pulls is not None]
        bias = torch.stack(biases, 1).flatten(0, 1) if biases else None
        return cls(weight, bias, torch.stack(pulls).sum(0) if pulls else None)

    @contextmanager
    def answering(self, layer: nn.Module, folds: Tensor, places: Tensor) -> Iterator[Pulling]:
        """While open, the layer answers for each row of a batch as the head of its fold would.

        Args:
            layer: The head's last layer; its inputs are `(rows, ..., d)`.
            folds: `(rows,)`.
            places: `(rows,)`, where among all rows they stand.

        Yields:
            What gives, for the model's logits, a zero for each row whose gradient is the row's pull.
        """
        seen: list[tuple[Tensor, Tensor]] = []

        def pulling(logits: Tensor, mask: Tensor | None) -> Tensor:
            if self.pulls is None:
                return torch.zeros(len(logits), device=logits.device)
            x = head.items_of(*seen[-1], logits, mask)
            return ((x - x.detach()) * self.pulls[places].to(x)).sum(-1)

        def instead(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            there = folds.to(x.device)
            logits = torch.einsum("nod,n...d->n...o", self.weight.to(x)[there], x)
            if self.bias is not None:
                bias = self.bias.to(x)[there]
                logits = logits + bias.reshape(len(bias), *[1] * (x.dim() - 2), -1)
            seen.append((x, answer := logits.to(output.dtype)))
            return answer

        handle = layer.register_forward_hook(instead)
        try:
            yield pulling
        finally:
            handle.remove()


def fit(
    found: Features, places: Tensor, folds_of_rows: Tensor, folds: int, whole: HeadFit, task: Task, *, pulls: bool
) -> FoldHeads | None:
    """A head for each fold, at the penalty of the head that was fitted to all rows, and from it on.

    Args:
        found: What the head is fitted to.
        places: Which row each item belongs to, `(items,)`.
        folds_of_rows: `(rows,)`.
        folds: How many there are: the items may be a sample of the rows, without any of some fold.
        whole: The head of all rows.
        pulls: Whether the rows' pulls on the heads are wanted, too. Of tokens there are none: the items are a sample.

    Returns:
        None where a fold holds all the items: there is no other then to fit a head to.
    """
    fitted, of_items = [], folds_of_rows[places].to(found.x.device)
    pulls = pulls and not task.by_token
    pulled = torch.zeros_like(found.x)
    for fold in range(folds):
        others = of_items.ne(fold)
        if not bool(others.any()):
            return None
        theirs, own = ((found.x[some], found.labels[some]) for some in (others, ~others))
        one = head.refit(*theirs, whole, task)
        if pulls and len(own[0]):
            pulled[others] += head.pull(*theirs, one, own, task)
        fitted.append(one)
    biases = [one.bias for one in fitted if one.bias is not None]
    weight = torch.stack([one.weight for one in fitted]).float()
    by_row = None
    if pulls:  # rows without a label, which fill up a batch, stand where the last one does, and pull at nothing
        by_row = torch.zeros(len(folds_of_rows), pulled.shape[1]).index_add_(0, places, FOLLOWING * pulled.cpu())
    return FoldHeads(weight, torch.stack(biases).float() if biases else None, by_row)
