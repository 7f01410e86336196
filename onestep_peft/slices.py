"""The rows of a pass in slices, each with a step of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from onestep_peft.config import AUTO, OneStepConfig
from onestep_peft.held_out import by_content, listed, without_labels
from onestep_peft.step import processes
from onestep_peft.tasks import Task

# A direction is known well enough from so many tokens: with an eighth of 360,000, the first of eight steps got as far
# as one step with all of them, and the others went on from there.
ITEMS_PER_SLICE = 40_000
SLICES_MAX = 8


def number_of_slices(config: OneStepConfig, rows: Any, task: Task) -> int:
    """What the configuration says; left to "auto", several for a language model with many tokens, else one.

    Raises:
        ValueError: More slices than rows.
    """
    if config.slices == AUTO:
        if task.has_head or config.fixed_step_size is not None:
            return 1
        items = sum(int(task.row_items(torch.as_tensor(row["labels"])[None])) for row in listed(rows))
        return max(1, min(SLICES_MAX, items // ITEMS_PER_SLICE, len(rows)))
    slices = int(config.slices)
    if slices > len(rows):
        raise ValueError(
            f'`slices={slices}`, but the pass has {len(rows)} rows. Give at most as many; the default is "auto".'
        )
    return slices


class SlicedRows(Dataset):
    """One slice of the rows at a time; Trainer's loop takes it for the whole set.

    A row's slice follows from its content, whatever its place. Every slice is filled up, with copies of its last row
    that have no label and so no say, until all slices give all processes equally many full micro-batches.

    Args:
        rows: The rows of the pass, longest first; so are those of each slice.
        slices: Number of slices.
        batch_size: Rows of a micro-batch.

    Attributes:
        current: Number of the slice that is there.
    """

    def __init__(self, rows: Any, slices: int, batch_size: int) -> None:
        order = by_content(listed(rows))
        self._rows = rows
        self._parts = [sorted(order[i::slices]) for i in range(slices)]
        whole = batch_size * processes.number()
        self._length = -(-len(self._parts[0]) // whole) * whole
        self.current = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._length:
            raise IndexError(i)  # what ends an iteration
        row = self._rows[self.row(i)]
        return row if i < len(self._parts[self.current]) else without_labels(row)

    def row(self, i: int) -> int:
        """The number, among all rows, of the one at this place; behind the last one the last one's."""
        part = self._parts[self.current]
        return part[min(i, len(part) - 1)]
