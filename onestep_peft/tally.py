"""Sums over the rows that an evaluation sees: exact whatever the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onestep_peft.tasks import Task


class Tally:
    """Losses and items, and by class how many items there are and how many are found.

    A mean of the batches' means would weigh the rows of a short last batch, and the tokens of short rows, too much.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)  # losses, items
        self._classes: Tensor | None = None  # (2, classes): there, found

    def add_rows(
        self, task: Task, logits: Tensor, labels: Tensor, losses: Tensor, items: Tensor, gather: Callable[[Any], Any]
    ) -> None:
        """Adds a batch.

        Args:
            gather: Collects rows `(rows, ...)` from all processes, each row once.
        """
        losses, items = gather((losses, items))
        self._sums += torch.stack([losses.double().sum(), items.double().sum()]).cpu()
        if task.class_counts is not None:
            counts = torch.stack([gather(rows).double().sum(0) for rows in task.class_counts(logits, labels)]).cpu()
            self._classes = counts if self._classes is None else self._classes + counts

    def add(self, other: Tally) -> None:
        """Adds another set's sums."""
        self._sums = self._sums + other._sums
        if other._classes is not None:
            self._classes = other._classes if self._classes is None else self._classes + other._classes

    @property
    def loss(self) -> float | None:
        """Mean loss of the items, or None where there were none."""
        losses, items = self._sums.tolist()
        return losses / items if items else None

    def counts(self, labels: Sequence[str]) -> dict[str, int]:
        """Items of each class."""
        return {} if self._classes is None else dict(zip(labels, map(int, self._classes[0].tolist()), strict=True))

    def recall(self, labels: Sequence[str]) -> dict[str, float]:
        """Share of each class' items that is found; classes without items are left out."""
        if self._classes is None:
            return {}
        there, found = self._classes.tolist()
        return {label: f / n for label, n, f in zip(labels, there, found, strict=True) if n > 0}
