"""Rows as a user hands them over, and as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, Value
from torch.utils.data import Dataset as TorchDataset

from onestep_peft import data
from onestep_peft.lengths import NO_LIMIT, longest_input
from onestep_peft.tasks import TEXT_GENERATION, TEXT_REGRESSION, Task
from onestep_peft.tasks.task import UNLABELLED


def as_rows(name: str, rows: Any) -> Any:
    """Lists of dicts and pandas frames become a `datasets.Dataset`; other sets stay.

    Raises:
        ValueError: A dict of splits, where one set is wanted.
    """
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{name} is a dict of sets with the keys {list(rows)}. Pass one of them, such as rows['train']."
        )
    if type(rows).__name__ == "DataFrame":
        return Dataset.from_pandas(rows, preserve_index=False)
    return Dataset.from_list(list(rows)) if isinstance(rows, list | tuple) else rows


def is_raw(rows: Any) -> bool:
    """Whether rows still hold text."""
    return isinstance(rows, Dataset) and "input_ids" not in rows.column_names


@dataclass
class Sets:
    """The sets that a run uses, by role; each a raw or tokenised set, or None."""

    train: Any
    search: Any
    evaluation: Any  # may be a dict of sets by name

    def items(self) -> list[tuple[str, Any]]:
        """Names for messages and the sets that are there."""
        sets = [("train_dataset", self.train), ("search_dataset", self.search)]
        if isinstance(self.evaluation, Mapping):
            sets += [(f"eval_dataset[{name!r}]", rows) for name, rows in self.evaluation.items()]
        else:
            sets.append(("eval_dataset", self.evaluation))
        return [(name, rows) for name, rows in sets if rows is not None]

    def map(self, change: Any) -> Sets:
        """The sets with `change(name, rows)` done to each."""
        done = {name: change(name, rows) for name, rows in self.items()}
        if isinstance(self.evaluation, Mapping):
            evaluation: Any = {name: done[f"eval_dataset[{name!r}]"] for name in self.evaluation}
        else:
            evaluation = done.get("eval_dataset")
        return Sets(done.get("train_dataset"), done.get("search_dataset"), evaluation)


@dataclass(frozen=True)
class Tokeniser:
    """Makes tokens and integer labels of rows with text; rows that are tokens already are only checked.

    Args:
        tokenizer: None where no set holds text.
        columns: None where no set holds text.
        config: The model's configuration: its outputs and the numbers of its classes.
        task: What the rows are for.
        positions: Of the model.
        max_length: Tokens of a row, or None for the model's limit, at most 512.
        virtual_tokens: How many stand before every row and need positions of their own.
    """

    tokenizer: Any
    columns: data.Columns | None
    config: Any
    task: Task
    positions: int = NO_LIMIT
    max_length: int | None = None
    virtual_tokens: int = 0
    _origins: dict[str, list[int] | None] = field(default_factory=dict)

    def __call__(self, name: str, rows: Any, *, labelled: bool = True) -> Any:
        """The set `name` as the model takes it; rows to predict may come without labels."""
        rows = as_rows(name, rows)
        if not is_raw(rows):
            rows = check_tokenised(name, rows, self.task, self.task.outputs(self.config)) if labelled else rows
            if self.virtual_tokens:
                check_room(name, rows, self.positions, self.virtual_tokens)
            return rows
        if self.tokenizer is None or self.columns is None:
            raise ValueError(f"{name} holds text, so `processing_class=` must be the model's tokenizer.")
        columns = self.columns
        if not labelled and columns.label not in rows.column_names:
            columns = data.Columns(columns.text, None)
        data.check_columns(rows, columns, name)
        outputs = self.task.outputs(self.config)
        length = longest_input(self.tokenizer, self.positions, self.virtual_tokens, self.max_length)
        done = data.tokenise(rows, self.task, columns, self.tokenizer, self.config.label2id, outputs, length, name)
        self._origins[name] = done.origins
        return done.rows

    def numbers(self, name: str, rows: Sequence[int]) -> list[int]:
        """Rows of the set `name` as the user counts them: a long text is several rows here."""
        origins = self._origins.get(name)
        return sorted({row if origins is None else origins[row] for row in rows})


def check_tokenised(name: str, rows: Any, task: Task, outputs: int) -> Any:
    """Checks a tokenised set: some rows, labels there, and such as the task takes.

    Rows for text generation without labels get their own tokens as labels.

    Args:
        outputs: The model's outputs: classes, numbers, or the size of its vocabulary.

    Raises:
        ValueError: It is empty or has no length, no labels, or a row's labels are wrong.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError(f"{name} has no length; one step needs to know its rows. Pass a map-style dataset.")
    data.check_some(rows, name)
    names = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
    column = next((column for column in ("labels", "label") if column in names), None)
    if column is None and task is TEXT_GENERATION and isinstance(rows, Dataset):
        return rows.map(_own_tokens_as_labels)
    if column is None or (column == "label" and not isinstance(rows, Dataset)):
        raise ValueError(f"{name} has no column 'labels'; its columns are {names}.")
    labels = rows[column] if isinstance(rows, Dataset) else [row[column] for row in rows]
    lengths = [0] * len(rows)
    if task.by_token:
        lengths = [len(ids) for ids in _ids(rows)]
    for i, (label, length) in enumerate(zip(labels, lengths, strict=True)):
        fault = task.fault(label, length, outputs)
        if fault is not None:
            raise ValueError(f"{name}, row {i}: {fault}")
    if isinstance(rows, Dataset) and column == "label":
        rows = rows.rename_column("label", "labels")
    return _with_floats(rows) if task is TEXT_REGRESSION else rows


def _with_floats(rows: Any) -> Any:
    """Rows whose labels are floats: among whole numbers a missing one cannot be told from -100."""
    if not isinstance(rows, Dataset):
        return _Floats(rows)
    kind: Any = rows.features["labels"]
    number = Value("float32")
    return rows.cast_column("labels", type(kind)(number) if hasattr(kind, "feature") else number)


class _Floats(TorchDataset):
    """Any other set's rows, each changed as it is read."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._rows[i]
        return {**row, "labels": torch.as_tensor(row["labels"]).float().tolist()}


def check_room(name: str, rows: Any, positions: int, virtual_tokens: int) -> None:
    """Refuses rows of tokens that leave the virtual ones no positions.

    Raises:
        ValueError: A row that is too long.
    """
    for i, ids in enumerate(_ids(rows)):
        if len(ids) + virtual_tokens > positions:
            raise ValueError(
                f"{name}, row {i}: {len(ids)} tokens and {virtual_tokens} virtual ones before them, but the model has "
                f"{positions} positions. Tokenise with `max_length={positions - virtual_tokens}`, or pass rows with "
                "text."
            )


def _ids(rows: Any) -> Any:
    return rows["input_ids"] if isinstance(rows, Dataset) else [row["input_ids"] for row in rows]


def _own_tokens_as_labels(row: dict[str, Any]) -> dict[str, Any]:
    mask = row.get("attention_mask") or [1] * len(row["input_ids"])
    return {"labels": [i if there else UNLABELLED for i, there in zip(row["input_ids"], mask, strict=True)]}
