"""From rows to token ids and labels, by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from onestep_peft.data import generation, tagging
from onestep_peft.data.columns import Columns
from onestep_peft.data.labels import class_numbers, multi_hot, numbers
from onestep_peft.tasks import MULTI_LABEL_CLASSIFICATION, TEXT_GENERATION, TEXT_REGRESSION, TOKEN_CLASSIFICATION, Task


@dataclass(frozen=True)
class Tokenised:
    """A set as the model takes it.

    Args:
        rows: `input_ids`, `attention_mask`, ... and `labels`.
        origins: By row the number of the row that it comes from; None where they are the same.
    """

    rows: Dataset
    origins: list[int] | None = None


def tokenise(
    rows: Dataset,
    task: Task,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    label2id: Mapping[str, int],
    outputs: int,
    max_length: int,
    what: str,
) -> Tokenised:
    """Token ids and labels as numbers, -100 where there is none.

    Args:
        label2id: Numbers of the classes' names, for string labels.
        outputs: Number of the model's outputs: classes, or numbers.
        max_length: Tokens of a row. Longer ones are cut; plain texts for text generation are taken in pieces.
        what: Which set it is, for messages.

    Raises:
        ValueError: A row without text, a label that the model does not take, or a tokenizer that cannot do it.
    """
    if task is TEXT_GENERATION:
        return Tokenised(*generation.tokenise(rows, columns.text, tokenizer, max_length, what))
    if task is TOKEN_CLASSIFICATION:
        word_column, tag_column = columns.text[0], columns.label
        return Tokenised(
            tagging.tokenise(rows, word_column, tag_column, tokenizer, label2id, outputs, max_length, what)
        )
    labels: dict[str, Any] = {}
    if columns.label is not None:
        if task is MULTI_LABEL_CLASSIFICATION:
            labels["labels"] = multi_hot(rows, columns.label, label2id, outputs, what, columns.multi_hot)
        elif task is TEXT_REGRESSION:
            labels["labels"] = numbers(rows, columns.label, outputs, what)
        else:
            labels["labels"] = class_numbers(rows, columns.label, label2id, outputs, what)
    for name in columns.text:
        check_strings(rows, name, what)
    tokens = tokenizer(*(list(rows[name]) for name in columns.text), truncation=True, max_length=max_length)
    return Tokenised(Dataset.from_dict({**{name: tokens[name] for name in tokens}, **labels}))


def check_strings(rows: Dataset, name: str, what: str) -> None:
    """Raises a ValueError for rows without text in a column."""
    empty = [i for i, text in enumerate(rows[name]) if not isinstance(text, str)]
    if empty:
        raise ValueError(
            f"{what}: {len(empty)} rows have no text in {name!r}, first row {empty[0]}. Fill or drop them."
        )
