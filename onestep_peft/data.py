"""Rows: from files or the Hub, which column is what, and their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from onestep_peft.errors import nearest

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "intent")
TEXT_COLUMNS = ("text", "sentence")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)


def read(source: str, configuration: str | None = None) -> DatasetDict:
    """Rows from a file (jsonl, csv, parquet), a folder of such files named after their splits, or a Hub id.

    Args:
        configuration: Which one of a Hub data set's configurations.

    Raises:
        ValueError: Neither such a path nor a data set on the Hub.
    """
    path = Path(source)
    if path.is_dir():
        files = {f.stem: f for f in sorted(path.iterdir()) if f.suffix in BUILDERS}
        if not files:
            raise ValueError(
                f"The folder {source!r} holds no .jsonl, .csv or .parquet file. Name the files after splits."
            )
        return DatasetDict({split: _read_file(file) for split, file in files.items()})
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise ValueError(f"No file {source!r}. Check the path.")
        return DatasetDict({"train": _read_file(path)})
    try:
        found = datasets.load_dataset(source, configuration)
    except Exception as error:  # datasets raises a dozen kinds for one cause
        raise ValueError(
            f"No data set {source!r}: it is no file or folder here ({', '.join(BUILDERS)}), and the Hub "
            f"does not give it ({type(error).__name__}: {error}). Check the name, the network, and `hf auth login` "
            "for a private one."
        ) from error
    return found if isinstance(found, DatasetDict) else DatasetDict({"train": found})


def _read_file(path: Path) -> Dataset:
    try:
        rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{str(path)!r} cannot be read as {BUILDERS[path.suffix]}: {cause}") from error
    return rows


def hides_labels(rows: Dataset, column: str | None) -> bool:
    """Whether the labels are all -1, as in the test splits of benchmarks."""
    name = column or next((name for name in LABEL_COLUMNS if name in rows.column_names), None)
    return name in rows.column_names and len(rows) > 0 and set(rows.unique(name)) == {-1}


@dataclass(frozen=True)
class Columns:
    """Which column is what.

    Args:
        text: One name, or two for pairs of texts.
        label: The class, a string or an integer; None where rows are only to be predicted.
    """

    text: tuple[str, ...]
    label: str | None


def guess_columns(rows: Dataset, text: str | Sequence[str] | None = None, label: str | None = None) -> Columns:
    """The columns that the user names, and for the rest those that can only be meant.

    Raises:
        ValueError: A named column is missing, or what is meant is not clear.
    """
    names = rows.column_names
    given = [text] if isinstance(text, str) else list(text or ())
    for name in [*given, *([label] if label else [])]:
        if name not in names:
            raise ValueError(f"No column {name!r}; the columns are {names}.{nearest(name, names)}")
    if label is None:
        known = [name for wanted in LABEL_COLUMNS for name in names if name.lower() == wanted]
        if not known:
            raise ValueError(
                f"No label column among {names}. Name it: `label_column=` (`--label-column` in the shell)."
            )
        label = known[0]
    strings = [name for name, kind in rows.features.items() if _is_string(kind) and name != label]
    return Columns(tuple(given) if given else guess_text(strings, names), label)


def guess_text(strings: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Which of the columns that hold strings is the text, or which two are.

    Args:
        names: All columns, for the message.

    Raises:
        ValueError: It is not clear.
    """
    for pair in TEXT_PAIRS:
        if set(pair) <= set(strings):
            return pair
    known = [name for wanted in TEXT_COLUMNS for name in strings if name.lower() == wanted]
    if len(strings) == 1 or known:
        return (known[0],) if known else (strings[0],)
    raise ValueError(
        f"Which column is the text is not clear: {strings or 'none'} of the columns {names} hold strings. "
        "Name it: `text_column=` (`--text-column` in the shell)."
    )


def _is_string(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def label_names(rows: Dataset, column: str) -> list[str] | None:
    """The classes' names in the order of their numbers, or None where the labels are bare integers.

    Strings are sorted; a `ClassLabel` column brings its names.
    """
    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        return list(kind.names)
    if _is_string(kind):
        return sorted({str(value) for value in rows.unique(column) if value is not None})
    return None


def count_labels(rows: Dataset, column: str) -> tuple[list[str] | None, int]:
    """Names of the classes (None for bare integers) and their number."""
    names = label_names(rows, column)
    if names is not None:
        return names, len(names)
    values = [_number(value) for value in rows.unique(column)]
    return None, max((value for value in values if isinstance(value, int)), default=-1) + 1


def tokenise(
    rows: Dataset,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    label2id: Mapping[str, int],
    classes: int,
    max_length: int,
    what: str,
) -> Dataset:
    """Token ids and integer labels, `labels = -100` where a row has none.

    Args:
        label2id: Numbers of the classes' names, for string labels.
        classes: Number of classes.
        what: Which set it is, for messages.

    Raises:
        ValueError: A row without text, or a label that is no class of the model.
    """
    labels = {} if columns.label is None else {"labels": _numbers(rows, columns.label, label2id, classes, what)}
    for name in columns.text:
        empty = [i for i, text in enumerate(rows[name]) if not isinstance(text, str)]
        if empty:
            raise ValueError(
                f"{what}: {len(empty)} rows have no text in {name!r}, first row {empty[0]}. Fill or drop them."
            )
    texts = [list(rows[name]) for name in columns.text]
    tokens = tokenizer(*texts, truncation=True, max_length=max_length)
    return Dataset.from_dict({**{name: tokens[name] for name in tokens}, **labels})


def check_some(rows: Any, what: str) -> None:
    """Raises a ValueError for an empty set."""
    if len(rows) == 0:
        raise ValueError(f"{what} has no rows. Give at least one labelled row.")


def out_of_range(what: str, row: int, label: Any, classes: int) -> ValueError:
    """The error for a label that is no class of the model."""
    return ValueError(
        f"{what}, row {row}: label {label} is out of range: the model has {classes} classes, 0 to {classes - 1}. "
        "Fix the row, or load the model with a larger `num_labels`."
    )


def check_columns(rows: Dataset, columns: Columns, what: str) -> None:
    """Raises a ValueError for a missing column."""
    for name in (*columns.text, columns.label):
        if name is not None and name not in rows.column_names:
            raise ValueError(
                f"{what} has no column {name!r}; its columns are {rows.column_names}.{nearest(name, rows.column_names)}"
            )


def _number(value: Any) -> Any:
    """Numbers as integers: a file with one empty cell turns a column of classes into floats."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return int(value) if isinstance(value, bool | float) and value == int(value) else value


def _numbers(rows: Dataset, column: str, label2id: Mapping[str, int], classes: int, what: str) -> list[int]:
    numbers: list[int] = []
    kind = rows.features[column]
    names = kind.names if isinstance(kind, ClassLabel) else None
    for i, value in enumerate(map(_number, rows[column])):
        if names is not None and value is not None and value >= 0 and names[value] in label2id:
            value = names[value]
        if value is None or value == -100:
            numbers.append(-100)
        elif isinstance(value, str):
            if value not in label2id:
                raise ValueError(
                    f"{what}, row {i}: label {value!r} is none of the model's classes {sorted(label2id)}."
                    f"{nearest(value, label2id)} Load the model with `num_labels` and `id2label` of your set."
                )
            numbers.append(label2id[value])
        elif not isinstance(value, int):
            raise ValueError(f"{what}, row {i}: label {value!r} is neither a string nor an integer.")
        elif not 0 <= value < classes:
            raise out_of_range(what, i, value, classes)
        else:
            numbers.append(value)
    return numbers
