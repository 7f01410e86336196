"""Rows: from files or the Hub, which column is what, and their tokens.

What a row holds, by task:

- text classification: a text, or a pair of texts, and a `label`: a class by name or number; a list of classes, or one 0
  or 1 a class (several labels a row); or a number that is no class (regression). None is no label.
- token classification: `tokens`, a list of words, and `ner_tags` (or `tags`, `labels`, ...), a class for each.
- text generation: `text`; or `prompt` and `completion`, two strings or two lists of messages; or `messages`.
"""

from __future__ import annotations

from onestep_peft.data.columns import (
    COMPLETION,
    LABEL_COLUMNS,
    MESSAGES,
    WORD_COLUMNS,
    Columns,
    check_columns,
    check_some,
    guess_columns,
    guess_task,
    guess_text,
    hides_labels,
)
from onestep_peft.data.labels import count_labels, label_names, task_of_labels
from onestep_peft.data.reading import BUILDERS, read
from onestep_peft.data.tokens import Tokenised, tokenise

__all__ = [
    "BUILDERS", "COMPLETION", "LABEL_COLUMNS", "MESSAGES", "WORD_COLUMNS", "Columns", "Tokenised", "check_columns",
    "check_some", "count_labels", "guess_columns", "guess_task", "guess_text", "hides_labels", "label_names", "read",
    "task_of_labels", "tokenise",
]  # fmt: skip
