"""The rows of a pass in slices, each with a step of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from onestep_peft.held_out import by_content, without_labels
from onestep_peft.step import processes


def check_slices(slices: int, rows: int) -> None:
    """Raises a ValueError where a slice would have no row."""
    if slices > rows:
        raise ValueError(f"`slices={slices}`, but the pass has {rows} rows. Give at most as many; the default is 1.")


class SlicedRows(Dataset):
    """One slice of the rows at a time; Trainer's loop takes it for the whole set.

    A row's slice follows from its content, whatever its place. Every slice is filled up, with copies of its last row
    that have no label and so no say, until all slices give all processes equally many full micro-batches.

    Args:
        rows: The rows of the pass, longest first; so are those of each slice.
        listed: The same, one dict each.
        slices: Number of slices.
        batch_size: Rows of a micro-batch.

    Attributes:
        current: Number of the slice that is there.
    """

    def __init__(self, rows: Any, listed: Sequence[dict[str, Any]], slices: int, batch_size: int) -> None:
        order = by_content(listed)
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
