"""The rows of a walk in slices, each with a step of its own; those of a pass in parts and in shares."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from onestep_peft.config import AUTO, OneStepConfig
from onestep_peft.held_out import by_content, listed, without_labels
from onestep_peft.out_of_fold import fold_of_each
from onestep_peft.step import processes
from onestep_peft.tasks import Task

# A walk has at most so many slices, and leaves at least so many rows to each small step, or so many of a language
# model's tokens.
SLICES, SLICE_ROWS, SLICE_ITEMS = 101, 40, 3_000
# The first step of a walk is worked out from this share of the rows; with a head from so many at most, unless classes
# are many or one is rare: further ones say more in small steps.
LEAD, LEAD_MOST = 0.2, 600
# Length of the first small step by that of the step itself, for a slice of one row. It grows with the root of a slice's
# rows: so does what a gradient of theirs tells over its noise. Where it is too long the first slices tell (`ASTRAY`).
PACE = 0.05
# That first slice has to teach a head, and to show a direction: it needs so many rows, and so many by class.
LEAD_ROWS, LEAD_ROWS_BY_CLASS = 300, 16
# Where a walk is of small steps alone each has so many rows, unless that were more steps than so many. Where fewer rows
# are there than so many, one searched step makes more of them.
ROWS_AT_ONCE, STEPS_AT_ONCE, LEAST_AT_ONCE = 2, 500, 200
# From so many tokens that a language model learns on, the rows are walked through in slices.
WALK_ITEMS = 80_000


def number_of_slices(config: OneStepConfig, rows: Any, task: Task, outputs: int, *, at_once: bool = False) -> int:
    """What the configuration says; left to "auto", several where rows are many, else one.

    Args:
        outputs: Of the head.
        at_once: Whether the method's own walk is of small steps alone.

    Raises:
        ValueError: More slices than rows.
    """
    if config.slices == AUTO:
        if config.fixed_step_size is not None:
            return 1
        if at_once and config.directions == (AUTO,) and config.max_steps == 1 and len(rows) >= LEAST_AT_ONCE:
            return min(STEPS_AT_ONCE, len(rows) // ROWS_AT_ONCE)
        if task.has_head:
            # Several steps with a head have all rows each, and bodies that are out of fold.
            enough = int(LEAD * len(rows)) >= max(LEAD_ROWS, LEAD_ROWS_BY_CLASS * outputs)
            walks = enough and config.max_steps == 1
            return min(SLICES, 1 + (len(rows) - _lead(rows, task, outputs)) // SLICE_ROWS) if walks else 1
        items = sum(int(task.row_items(torch.as_tensor(row["labels"])[None])) for row in listed(rows))
        most = 1 + len(rows) - max(1, _lead(rows, task, outputs))  # a row at least for each
        return min(SLICES, most, 1 + int((1 - LEAD) * items) // SLICE_ITEMS) if items >= WALK_ITEMS else 1
    slices = int(config.slices)
    if slices > len(rows):
        raise ValueError(
            f'`slices={slices}`, but the pass has {len(rows)} rows. Give at most as many; the default is "auto".'
        )
    return slices


def _lead(rows: Any, task: Task, outputs: int) -> int:
    fifth = int(LEAD * len(rows))
    if not task.has_head or fifth <= LEAD_MOST:
        return fifth
    # A class that the head has not been taught would have the small steps move the body for it, and far.
    counts = Counter(label for row in listed(rows) if isinstance(label := row["labels"], int) and label >= 0)
    by_class = max(outputs, len(rows) / min(counts.values())) if counts else outputs
    return min(fifth, max(LEAD_MOST, math.ceil(LEAD_ROWS_BY_CLASS * by_class)))


def rows_of_the_lead(rows: Any, slices: int, task: Task, outputs: int) -> int:
    """How many of these rows are in the first slice of a walk.

    Args:
        outputs: Of the head.
    """
    equal = -(-len(rows) // slices)
    # A row at least for each of the others.
    return max(equal, min(_lead(rows, task, outputs), len(rows) - slices + 1))


def pace(slice_rows: float) -> float:
    """Length of the first small step of a walk through slices of so many rows, by that of the step it goes on from."""
    return min(1.0, PACE * math.sqrt(slice_rows))


def of_small_steps(rows: int, slices: int, task: Task) -> tuple[float, float]:
    """The pace of small steps through so many rows, and how many rows say how far chance may take a slice's mean loss.

    In tasks by token that is an infinite number: of thousands of tokens the mean is no chance.

    Args:
        rows: Of all slices but the first.
        slices: Of the whole walk.
    """
    each = rows / max(slices - 1, 1)
    return pace(each), math.inf if task.by_token else each


def dealt(order: Sequence[int], slices: int, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """Deals rows into slices.

    Args:
        order: The rows' numbers, in an order that follows from their contents, equal rows next to each other: they go
            to different slices, which are no neighbours.
        slices: Number of slices.
        lengths: By row number; with them each slice has long rows and short ones, about as many tokens as the others.

    Returns:
        The rows' numbers by slice, in ascending order. Slices differ by one row at most.
    """
    groups: list[list[int]] = [[] for _ in range(slices)]
    totals = [0] * slices
    sequence = order if lengths is None else sorted(order, key=lambda row: -lengths[row])
    for start in range(0, len(order), slices):
        # The longest of the next rows go to the slices that are the shortest so far.
        places = sorted(range(slices), key=totals.__getitem__)
        for place, row in zip(places, sequence[start : start + slices], strict=False):
            groups[place].append(row)
            totals[place] += lengths[row] if lengths is not None else 0
    random.Random(0).shuffle(groups)
    return [sorted(group) for group in groups]


def number_of_shares(config: OneStepConfig, rows: int) -> int:
    """Into how many shares so many rows are dealt, of which one counts for the layers' covariances.

    Shares and the folds of the head are dealt from the same order: without a common divisor, rows of all folds are in
    each share.
    """
    most = max(1, rows // config.covariance_rows) if config.slices == 1 else 1
    return next(shares for shares in range(most, 0, -1) if math.gcd(shares, config.head_folds) == 1)


class SlicedRows(Dataset):
    """One slice of the rows at a time; Trainer's loop takes it for the whole set.

    A row's slice follows from its content, whatever its place. Where there are several processes every slice is filled
    up, with copies of its last row that have no label and so no say, until it gives all of them equally many full
    micro-batches.

    Args:
        rows: The rows of the pass, longest first; so are those of each slice.
        slices: Number of slices.
        batch_size: Rows of a micro-batch.
        lead: How many rows are in the first slice, where that is more than an equal share.

    Attributes:
        current: Number of the slice that is there.
    """

    def __init__(self, rows: Any, slices: int, batch_size: int, lead: int = 0) -> None:
        self._rows, self._lead = rows, lead
        self._groups = self._dealt(slices)
        self._whole = self._multiple(batch_size)
        self.current = 0

    def _dealt(self, slices: int) -> list[list[int]]:
        rows = listed(self._rows)
        order = by_content(rows)
        if self._lead * slices < len(order) + slices:
            return dealt(order, slices, [len(row.get("input_ids", ())) for row in rows])
        return [sorted(order[: self._lead]), *dealt(order[self._lead :], slices - 1)]

    def _multiple(self, batch_size: int) -> int:
        """Of how many rows the places of a slice are a multiple."""
        return batch_size * processes.number() if processes.number() > 1 else 1

    def _filled(self, rows: int) -> int:
        return -(-rows // self._whole) * self._whole

    def __len__(self) -> int:
        return self._filled(len(self._groups[self.current]))

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)  # what ends an iteration
        return self._at(self.current, i)

    @property
    def lead(self) -> list[int]:
        """The numbers, among all rows, of those in the first slice."""
        return self._groups[0]

    def row(self, i: int) -> int:
        """The number, among all rows, of the one at this place; behind the last one the last one's."""
        return self._row(self.current, i)

    def _row(self, slice_: int, i: int) -> int:
        part = self._groups[slice_]
        return part[min(i, len(part) - 1)]

    def _at(self, slice_: int, i: int) -> dict[str, Any]:
        row = self._rows[self._row(slice_, i)]
        return row if i < len(self._groups[slice_]) else without_labels(row)


class PartedRows(SlicedRows):
    """All rows in one pass, part by part, equal rows in the same one; no micro-batch has rows of two parts.

    Of each part a share, alike by class, comes first: the rows that count for the layers' covariances.

    Args:
        rows: As in `SlicedRows`.
        parts: Number of parts, each with a body of its own.
        shares: Into how many shares a part is dealt; one of them counts for covariances.
        batch_size: Rows of a micro-batch.
    """

    def __init__(self, rows: Any, parts: int, shares: int, batch_size: int) -> None:
        self._number, self._shares = parts, shares
        super().__init__(rows, parts * min(shares, 2), batch_size)
        self._ends = list(itertools.accumulate(self._filled(len(section)) for section in self._groups))

    def _multiple(self, batch_size: int) -> int:
        return batch_size * processes.number()

    def _dealt(self, slices: int) -> list[list[int]]:
        # Fold by fold the rows go to each part in turn, so a row's part is the same whatever the number of shares.
        folds = fold_of_each(listed(self._rows), self._number * self._shares)
        section = folds % self._number * (slices // self._number) + (folds >= self._number).long()
        return [section.eq(number).nonzero().flatten().tolist() for number in range(slices)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._at(*self._place(i))

    def row(self, i: int) -> int:
        """The number, among all rows, of the one at this place; behind a section's last one that one's."""
        return self._row(*self._place(min(i, len(self) - 1)))

    def part(self, i: int) -> tuple[int, bool]:
        """The part of the row at this place, and whether it counts for covariances."""
        part, share = divmod(self._section(i), min(self._shares, 2))
        return part, share == 0

    def _section(self, i: int) -> int:
        return bisect.bisect_right(self._ends, i)

    def _place(self, i: int) -> tuple[int, int]:
        section = self._section(i)
        return section, i - (self._ends[section - 1] if section else 0)
