"""Which split of a data set does what, by the names that people give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onestep_peft import data
from onestep_peft.errors import nearest

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def named(splits: Mapping[str, Any], role: str) -> str | None:
    """The name of the split for a role ("train", "validation" or "test"), or None."""
    return next((name for name in SPLITS[role] if name in splits), None)


def labelled(splits: Mapping[str, Any], role: str, label_column: str | None) -> str | None:
    """The same, where its labels are not hidden."""
    name = named(splits, role)
    return None if name is None or data.hides_labels(splits[name], label_column) else name


def to_score(splits: Mapping[str, Any], wanted: str | None, label_column: str | None) -> str:
    """The name of the split whose scores count: the wanted one, else test, else validation, else the only one.

    Raises:
        ValueError: No such split, or several of which none is meant to report.
    """
    if wanted is not None:
        if wanted not in splits:
            raise ValueError(f"No split {wanted!r}; the splits are {list(splits)}.{nearest(wanted, splits)}")
        return wanted
    if len(splits) == 1:
        return next(iter(splits))
    found = labelled(splits, "test", label_column) or labelled(splits, "validation", label_column)
    if found is None:
        raise ValueError(f"No split 'test' or 'validation' with labels; the splits are {list(splits)}. Name `--split`.")
    return found
