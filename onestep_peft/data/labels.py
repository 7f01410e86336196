"""Labels of all kinds as numbers: a class, a list of classes or of tags, a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import ClassLabel, Dataset

from onestep_peft.errors import nearest
from onestep_peft.tasks import MULTI_LABEL_CLASSIFICATION, TEXT_CLASSIFICATION, TEXT_REGRESSION, Task
from onestep_peft.tasks.task import UNLABELLED, class_fault


def task_of_labels(rows: Dataset, column: str) -> Task:
    """Which kind of text classification the labels are for: lists, numbers that are no classes, or classes."""
    kind = rows.features[column]
    if hasattr(kind, "feature"):
        return MULTI_LABEL_CLASSIFICATION
    if str(getattr(kind, "dtype", "")).startswith("float"):
        values = [number(value) for value in rows.unique(column)]
        # A file with one empty cell turns a column of classes into floats.
        if None not in values or any(isinstance(value, float) for value in values):
            return TEXT_REGRESSION
    return TEXT_CLASSIFICATION


def is_multi_hot(rows: Dataset, column: str) -> bool:
    """Whether lists of labels hold a 0 or 1 (or a share) for every class: as many in each row, and two or more."""
    kind = getattr(rows.features[column], "feature", None)
    if kind is None or isinstance(kind, ClassLabel) or getattr(kind, "dtype", "") == "string":
        return False
    values = [row for row in rows[column] if row is not None]
    lengths = {len(row) for row in values}
    known = (value for row in values for value in row if value is not None)
    return len(lengths) == 1 and max(lengths) > 1 and all(0 <= value <= 1 for value in known)


def number(value: Any) -> Any:
    """Whole numbers as integers, what is not a number as None."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return int(value) if isinstance(value, bool | float) and value == int(value) else value


def _values(rows: Dataset, column: str) -> Iterable[Any]:
    """The classes in a column, out of their lists."""
    if hasattr(rows.features[column], "feature"):
        return {value for row in rows[column] if row is not None for value in row}
    return rows.unique(column)


def _class_names(rows: Dataset, column: str) -> list[str] | None:
    """The names that a column of `ClassLabel`s, or of lists of them, brings."""
    kind = rows.features[column]
    kind = getattr(kind, "feature", kind)
    return list(kind.names) if isinstance(kind, ClassLabel) else None


def label_names(rows: Dataset, column: str) -> list[str] | None:
    """The classes' names in the order of their numbers, or None where the labels are bare numbers.

    Strings are sorted; `ClassLabel`s bring their names.
    """
    names = _class_names(rows, column)
    if names is not None:
        return names
    values = [value for value in _values(rows, column) if value is not None]
    return sorted(values) if values and all(isinstance(value, str) for value in values) else None


def count_labels(rows: Dataset, column: str) -> tuple[list[str] | None, int]:
    """Names of the classes (None for bare integers) and their number."""
    names = label_names(rows, column)
    if names is not None:
        return names, len(names)
    if is_multi_hot(rows, column):
        return None, len(next(row for row in rows[column] if row is not None))
    values = [number(value) for value in _values(rows, column)]
    return None, max((value for value in values if isinstance(value, int)), default=-1) + 1


class Numbering:
    """Turns labels into class numbers.

    Args:
        rows: Its column may bring names of its own, whose order need not be the model's.
        label2id: Numbers of the classes' names.
        classes: Number of classes.
        what: Which set it is, for messages.
    """

    def __init__(self, rows: Dataset, column: str, label2id: Mapping[str, int], classes: int, what: str) -> None:
        self._names = _class_names(rows, column)
        self._label2id, self._classes, self._what = label2id, classes, what

    def __call__(self, row: int, value: Any) -> int:
        """The number of a label, -100 for None.

        Raises:
            ValueError: It is no class of the model.
        """
        value = number(value)
        if self._names is not None and isinstance(value, int) and value >= 0 and self._names[value] in self._label2id:
            value = self._names[value]
        if value is None:
            return UNLABELLED
        if isinstance(value, str):
            if value not in self._label2id:
                raise ValueError(
                    f"{self._what}, row {row}: label {value!r} is none of the model's classes "
                    f"{sorted(self._label2id)}.{nearest(value, self._label2id)} Load the model with `num_labels` and "
                    "`id2label` of your set."
                )
            return self._label2id[value]
        if not isinstance(value, int):
            hint = " For a regression load the model with `num_labels=1`." if isinstance(value, float) else ""
            raise ValueError(f"{self._what}, row {row}: label {value!r} is neither a string nor an integer.{hint}")
        fault = class_fault(value, self._classes)
        if fault is not None:
            raise ValueError(f"{self._what}, row {row}: {fault}")
        return value


def class_numbers(rows: Dataset, column: str, label2id: Mapping[str, int], classes: int, what: str) -> list[int]:
    """One class a row."""
    of = Numbering(rows, column, label2id, classes, what)
    return [of(i, value) for i, value in enumerate(rows[column])]


def multi_hot(
    rows: Dataset, column: str, label2id: Mapping[str, int], classes: int, what: str, already: bool
) -> list[list[float]]:
    """Any number of classes a row, as a 0 or 1 for every class; None is no label, and an empty list no class.

    Args:
        already: Whether the rows hold them like this.
    """
    of = Numbering(rows, column, label2id, classes, what)
    found = []
    for i, row in enumerate(rows[column]):
        if row is None:
            found.append([float(UNLABELLED)] * classes)
        elif already:
            fault = MULTI_LABEL_CLASSIFICATION.fault(row, 0, classes)
            if fault is not None:
                raise ValueError(f"{what}, row {i}: {fault}")
            found.append([float(value) for value in row])
        else:
            there = {of(i, value) for value in row}
            found.append([float(label in there) for label in range(classes)])
    return found


def numbers(rows: Dataset, column: str, outputs: int, what: str) -> list[Any]:
    """Numbers to be predicted, floats; None becomes NaN, which is no label."""
    found = []
    for i, row in enumerate(rows[column]):
        several = isinstance(row, list)
        values = [math.nan if value is None else value for value in (row if several else [row])]
        fault = TEXT_REGRESSION.fault(values, 0, outputs)
        if fault is not None:
            raise ValueError(f"{what}, row {i}: {fault}")
        found.append([float(value) for value in values] if several else float(values[0]))
    return found
