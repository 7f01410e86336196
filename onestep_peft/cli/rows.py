"""Rows to predict: from a file or standard input, with every field kept as it stands there."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onestep_peft.data import COMPLETION, LABEL_COLUMNS, MESSAGES, WORD_COLUMNS, guess_text
from onestep_peft.errors import nearest
from onestep_peft.prediction import Text

STDIN = "-"
Row = dict[str, Any]


def read(source: str) -> list[Row]:
    """Rows of a .jsonl, .csv or .txt file (one text a line), or of standard input (`-`).

    Standard input is JSON lines where its first line begins with `{`, else one text a line.

    Raises:
        ValueError: No such file, another kind of file, a line that cannot be read, or no rows.
    """
    if source == STDIN:
        text = "".join(sys.stdin)  # line by line: one long read would not hear of Ctrl-C
        kind = ".jsonl" if text.lstrip().startswith("{") else ".txt"
    else:
        path = Path(source)
        kind = path.suffix.lower()
        if kind not in READERS:
            raise ValueError(f"`--input {source}` is none of {', '.join(READERS)} or `-`. Convert it to one of them.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ValueError(f"`--input {source}` cannot be read: {error.strerror}. Check the path.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"`--input {source}` is not UTF-8 ({error.reason}). Convert it.") from error
    rows = READERS[kind](text, source)
    if not rows:
        raise ValueError(f"`--input {source}` holds no rows.")
    return rows


def _json_lines(text: str, source: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: no JSON ({error}). Each line holds one object.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{source}, line {number}: {type(row).__name__} in place of an object with named fields.")
        rows.append(row)
    return rows


def _csv(text: str, source: str) -> list[Row]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module expects
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError(f"{source} names a column twice: {list(names)}. Rename one.")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{source}, line {reader.line_num}: not as many values as the header has names "
                f"({len(reader.fieldnames or ())}). Put quotes around texts that hold commas."
            )
        rows.append(dict(row))
    return rows


def _lines(text: str, source: str) -> list[Row]:
    # Not `splitlines`: it would cut a text at separators that stand within a line.
    return [{"text": line.removesuffix("\r")} for line in text.removesuffix("\n").split("\n") if text]


READERS = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv, ".txt": _lines}


def texts_of(rows: Sequence[Row], columns: Sequence[str]) -> list[Text]:
    """The text of each row, or the pair of them; or its words, or the messages that are to be answered.

    Args:
        columns: Names of one or two fields; none to guess.

    Raises:
        ValueError: A name that is no field, a field that is no text, or what is meant is not clear.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        if name not in names:
            raise ValueError(f"No column {name!r}; the columns are {names}.{nearest(name, names)}")
    if len(columns) > 2:
        raise ValueError(f"`--text-column` names {len(columns)} columns. Name one, or two for pairs.")
    wanted = tuple(columns) or _guessed(rows[0], names)
    for number, row in enumerate(rows):
        for name in wanted:
            if not (isinstance(row.get(name), str) or (len(wanted) == 1 and _is_list(row.get(name)))):
                raise ValueError(f"Row {number} has no text in {name!r}: {row.get(name)!r}. Fill or drop it.")
    if len(wanted) == 2:
        return [(row[wanted[0]], row[wanted[1]]) for row in rows]
    return [_unanswered(row[wanted[0]]) for row in rows]


def _guessed(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """What a first row's fields stand for: messages, words, a prompt, or else a text or two."""
    for name in (*MESSAGES, *WORD_COLUMNS):
        if _is_list(row.get(name)):
            return (name,)
    if set(COMPLETION) <= set(names):
        return (COMPLETION[0],)
    fields = [name for name in names if name.lower() not in LABEL_COLUMNS]
    if len(fields) == 1 and _is_list(row.get(fields[0])):
        return (fields[0],)
    return guess_text([name for name in fields if _is_text(row.get(name))], names)


def _is_list(value: Any) -> bool:
    """Words or messages; none of them empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, type(value[0])) for item in value)
        and (isinstance(value[0], str | dict))
    )


def _unanswered(text: Text) -> Text:
    """A conversation without the answers at its end: they are what is to be said."""
    if isinstance(text, list) and isinstance(text[0], dict):
        last = max((i for i, one in enumerate(text) if one.get("role") != "assistant"), default=0)
        return text[: last + 1]
    return text


def _is_text(value: Any) -> bool:
    """A string that is no number: in a .csv file everything is a string."""
    try:
        float(value)
    except (TypeError, ValueError):
        return isinstance(value, str)
    return False
