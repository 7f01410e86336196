"""Which column of a data set is what, and which task its columns stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from onestep_peft.data.labels import is_multi_hot, task_of_labels
from onestep_peft.errors import nearest
from onestep_peft.tasks import TEXT_CLASSIFICATION, TEXT_GENERATION, TOKEN_CLASSIFICATION, Task

LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "intent")
TEXT_COLUMNS = ("text", "sentence")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "labels", "label", "pos_tags", "chunk_tags")
MESSAGES = ("messages", "conversations")
COMPLETION = ("prompt", "completion")


@dataclass(frozen=True)
class Columns:
    """Which column is what.

    Args:
        text: One name; or two, for a pair of texts, or for a prompt and its completion.
        label: The class, the list of classes or tags, or the number; None where rows are only to be predicted, and for
            text generation.
        multi_hot: Whether lists of labels hold a 0 or 1 for every class, and not the classes that apply.
    """

    text: tuple[str, ...]
    label: str | None
    multi_hot: bool = False


def guess_task(rows: Dataset, text: str | Sequence[str] | None = None, label: str | None = None) -> Task:
    """The task that the columns stand for; text classification where they do not say."""
    given = [text] if isinstance(text, str) else list(text or ())
    names = set(given or rows.column_names)
    if label is None and (names & set(MESSAGES) or set(COMPLETION) <= names):
        return TEXT_GENERATION
    if any(_is_words(rows, name) for name in (given or WORD_COLUMNS)):
        return TOKEN_CLASSIFICATION
    found = label or _first(rows, LABEL_COLUMNS)
    if found is not None and found in rows.column_names:
        return task_of_labels(rows, found)
    alone = label is None and len(rows.column_names) == 1 and _is_string(next(iter(rows.features.values())))
    return TEXT_GENERATION if alone else TEXT_CLASSIFICATION


def guess_columns(
    rows: Dataset,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    task: Task = TEXT_CLASSIFICATION,
) -> Columns:
    """The columns that the user names, and for the rest those that can only be meant.

    Raises:
        ValueError: A named column is missing, or what is meant is not clear.
    """
    names = rows.column_names
    given = [text] if isinstance(text, str) else list(text or ())
    for name in [*given, *([label] if label else [])]:
        if name not in names:
            raise ValueError(f"No column {name!r}; the columns are {names}.{nearest(name, names)}")
    if task is TEXT_GENERATION:
        return Columns(tuple(given) or _guess_generation(rows), None)
    label = label or _first(rows, TAG_COLUMNS if task is TOKEN_CLASSIFICATION else LABEL_COLUMNS)
    if label is None:
        raise ValueError(
            f"No label column among {names}. Name it: `label_column=` (`--label-column` in the shell); or, if the text "
            'itself is to be learnt, pass `task="text-generation"` (`--task`).'
        )
    if task is TOKEN_CLASSIFICATION:
        return Columns(tuple(given) or _guess_words(rows), label)
    strings = [name for name, kind in rows.features.items() if _is_string(kind) and name != label]
    return Columns(tuple(given) or guess_text(strings, names), label, is_multi_hot(rows, label))


def _first(rows: Dataset, known: Sequence[str]) -> str | None:
    return next((name for wanted in known for name in rows.column_names if name.lower() == wanted), None)


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
    raise _unclear(f"{strings or 'none'} of the columns {names} hold strings")


def _guess_words(rows: Dataset) -> tuple[str, ...]:
    found = _first(rows, WORD_COLUMNS)
    if found is None:
        raise _unclear(f"none of the columns {rows.column_names} is called {' or '.join(WORD_COLUMNS)}")
    return (found,)


def _guess_generation(rows: Dataset) -> tuple[str, ...]:
    if set(COMPLETION) <= set(rows.column_names):
        return COMPLETION
    if "prompt" in rows.column_names:
        raise ValueError(
            f"There is a column 'prompt' but no 'completion' among {rows.column_names}: there is nothing to learn "
            'to say. Name the two: `text_column=["prompt", ...]`.'
        )
    found = _first(rows, (*MESSAGES, *TEXT_COLUMNS))
    strings = [name for name, kind in rows.features.items() if _is_string(kind)]
    if found is None and len(strings) != 1:
        raise _unclear(f"{strings or 'none'} of the columns {rows.column_names} hold strings")
    return (found or strings[0],)


def _unclear(why: str) -> ValueError:
    return ValueError(
        f"Which column is the text is not clear: {why}. Name it: `text_column=` (`--text-column` in the shell)."
    )


def _is_string(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _is_words(rows: Dataset, name: str) -> bool:
    return name in rows.column_names and _is_string(getattr(rows.features[name], "feature", None))


def hides_labels(rows: Dataset, column: str | None) -> bool:
    """Whether the labels are all -1, as in the test splits of benchmarks."""
    name = column or _first(rows, LABEL_COLUMNS)
    if name not in rows.column_names or hasattr(rows.features[name], "feature"):
        return False
    return len(rows) > 0 and set(rows.unique(name)) == {-1}


def check_some(rows: Any, what: str) -> None:
    """Raises a ValueError for an empty set."""
    if len(rows) == 0:
        raise ValueError(f"{what} has no rows. Give at least one labelled row.")


def check_columns(rows: Dataset, columns: Columns, what: str) -> None:
    """Raises a ValueError for a missing column."""
    for name in (*columns.text, columns.label):
        if name is not None and name not in rows.column_names:
            raise ValueError(
                f"{what} has no column {name!r}; its columns are {rows.column_names}.{nearest(name, rows.column_names)}"
            )
