"""The head's last fit, to all rows with a label: the held-out ones, too, once they have done their choosing.

Held-out rows choose the step, how far it goes and the head's penalty, and judge the whole; then they would lie idle.
The head has more from them than from as many rows of the pass: the body has not moved by them, so that it sees of
them what it will see of new rows (which is why stacked generalisation fits its last level to such inputs: Wolpert,
Neural Networks 5, 1992).

How far to go to that head they cannot say as it stands, for it knows them. So they are dealt into folds, and each fold
is asked about a head that is fitted to all rows but its own, as in cross-validation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onestep_peft import head
from onestep_peft.between_heads import STRIDES, losses_between, lowest, mixed
from onestep_peft.head import Features, HeadFit
from onestep_peft.tasks import Task

# Into so many folds the held-out rows are dealt.
FOLDS = 5


@dataclass(frozen=True)
class Known:
    """What a fit of the head went by.

    Args:
        own: All processes' features of the rows of the pass, or of a sample of them.
        held: Those of the held-out rows, `HeldOut.placed`.
        since: The head that was there before, which has not seen what the step has moved, at the penalty of the fit.
    """

    own: Features
    held: Features
    since: HeadFit

    def among(self, rows: Tensor) -> Known:
        """The same with only those held-out rows for which it is true, `(rows,)`."""
        return replace(self, held=self.held.where(rows.to(self.held.rows.device)[self.held.rows]))


@dataclass(frozen=True)
class LastFit:
    """What the last fit came to.

    Args:
        head: On the way from the one before to that of all rows.
        loss: Mean loss of the held-out items in nats, each under the head of its fold, so far on the way.
        logits: The held-out items' under these heads, `(items, outputs)`, float64.
    """

    head: HeadFit
    loss: float
    logits: Tensor


def fit(known: Known, folds: Tensor, task: Task) -> LastFit | None:
    """The head on the way from the one before to that of all rows, as far as held-out rows gain that it left out.

    Args:
        known: What the fit to the rows of the pass went by.
        folds: Of each held-out row, from 0 on, `(rows,)`.
        task: Gives each item's loss.

    Returns:
        None where they gain nothing.
    """
    since, held = known.since, known.held
    of_items = folds.to(held.rows.device)[held.rows]
    losses, number = torch.zeros(STRIDES + 1, dtype=torch.float64), 0
    heads: list[tuple[Tensor, HeadFit]] = []
    for fold in of_items.unique():
        out = of_items.eq(fold)
        others = Features.joined([known.own, held.where(~out)])
        one = head.refit(others.x, others.labels, since, task, tolerance=head.ROUGH)
        found, items = losses_between(since, one, held.x[out], held.labels[out], task)
        losses, number = losses + found, number + items
        heads.append((out, one))
    best = lowest(losses)
    if best == 0 or number == 0:
        return None
    everyone = Features.joined([known.own, held])
    whole = head.refit(everyone.x, everyone.labels, since, task)
    logits = torch.zeros(len(held.x), len(since.weight), dtype=torch.float64, device=held.x.device)
    for out, one in heads:
        logits[out] = mixed(since, one, best).logits(held.x[out])
    return LastFit(mixed(since, whole, best), float(losses[best]) / number, logits)
