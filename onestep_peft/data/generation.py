"""Text generation: plain texts, prompts with completions, and conversations, as TRL has them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from onestep_peft.tasks.task import UNLABELLED

# Marks the assistant's part of a conversation in a chat template.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Tokens = list[int]


def tokenise(
    rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, what: str
) -> tuple[Dataset, list[int]]:
    """Token ids and the labels among them.

    - One column of strings: every token is a label, the end-of-text token behind them too. A text longer than
      `max_length` is taken in pieces that overlap by one token, so that every token but the first is predicted once.
    - One column of messages: through the tokenizer's chat template. Labels are the assistant's tokens where the
      template marks them ({% generation %}), else all.
    - Two columns, prompt and completion, strings or messages: labels are the completion's tokens, and for strings the
      end-of-text token behind them.

    Rows of the last two kinds are cut at `max_length`; one that has no label left is left out, with a warning.

    Returns:
        The rows, and by row the number of the row that it comes from.

    Raises:
        ValueError: A row without text, a missing chat template, or nothing left to learn.
    """
    found: list[tuple[int, Tokens, Tokens]] = []
    for i, (ids, labels) in enumerate(_encoded(rows, columns, tokenizer, what)):
        pieces = _pieces(ids, labels, max_length) if _is_plain(rows, columns) else [(ids, labels)]
        found += [(i, ids[:max_length], labels[:max_length]) for ids, labels in pieces]
    kept = [row for row in found if any(label != UNLABELLED for label in row[2][1:])]
    left_out = sorted({i for i, *_ in found} - {i for i, *_ in kept})
    if left_out:
        said = (
            f"{what}: {len(left_out)} of {len(rows)} rows have nothing to predict within {max_length} tokens, "
            f"first row {left_out[0]}: their completion is cut off or empty."
        )
        if not kept:
            raise ValueError(f"{said} Raise `max_length`.")
        warnings.warn(f"{said} They are left out; raise `max_length` to keep them.", stacklevel=2)
    done = {
        "input_ids": [ids for _, ids, _ in kept],
        "attention_mask": [[1] * len(ids) for _, ids, _ in kept],
        "labels": [labels for *_, labels in kept],
    }
    return Dataset.from_dict(done), [row[0] for row in kept]


def _pieces(ids: Tokens, labels: Tokens, max_length: int) -> list[tuple[Tokens, Tokens]]:
    step = max_length - 1
    starts = range(0, max(len(ids) - 1, 1), step)
    return [(ids[i : i + max_length], labels[i : i + max_length]) for i in starts]


def _is_plain(rows: Dataset, columns: Sequence[str]) -> bool:
    return len(columns) == 1 and not hasattr(rows.features[columns[0]], "feature")


def _encoded(
    rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, what: str
) -> Iterator[tuple[Tokens, Tokens]]:
    """Every row's ids and labels, as long as they come."""
    conversational = hasattr(rows.features[columns[0]], "feature")
    if conversational and tokenizer.chat_template is None:
        raise ValueError(
            f"{what}: {columns[0]!r} holds messages, and the tokenizer has no chat template to write them down. Set "
            "`tokenizer.chat_template`, or give the rows as `text`, or as `prompt` and `completion` strings."
        )
    kind = list if conversational else str
    for name in columns:
        bad = next((i for i, value in enumerate(rows[name]) if not isinstance(value, kind)), None)
        if bad is not None:
            raise ValueError(
                f"{what}, row {bad}: {name!r} is {rows[bad][name]!r}, not {'messages' if conversational else 'text'}. "
                "Fill or drop it."
            )
    parts = zip(*(rows[name] for name in columns), strict=True)
    if conversational:
        encode = _conversation if len(columns) == 1 else _answer
        for row in parts:
            yield encode(tokenizer, *([_without_gaps(message) for message in part] for part in row))
    else:
        for row in parts:
            yield _text(tokenizer, *row)


def _text(tokenizer: PreTrainedTokenizerBase, *parts: str) -> tuple[Tokens, Tokens]:
    """A text, or a prompt and its completion."""
    ids = list(tokenizer("".join(parts), verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    before = list(tokenizer(parts[0], verbose=False)["input_ids"]) if len(parts) == 2 else []
    return ids, _after(before, ids)


def _conversation(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[Tokens, Tokens]:
    marks = bool(GENERATION.search(str(tokenizer.chat_template)))
    done: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks
    )
    ids = list(done["input_ids"])
    if not marks:
        return ids, list(ids)
    return ids, [i if own else UNLABELLED for i, own in zip(ids, done["assistant_masks"], strict=True)]


def _answer(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, Any]], completion: list[dict[str, Any]]
) -> tuple[Tokens, Tokens]:
    before: Any = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
    whole: Any = tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)
    return list(whole["input_ids"]), _after(before["input_ids"], whole["input_ids"])


def _after(before: Sequence[int], ids: Sequence[int]) -> Tokens:
    """Labels for what follows a prompt: all from the first token that is not the prompt's own.

    A prompt's last token may differ once the completion follows (a merged pair of characters, a closing token); it
    then belongs to the completion.
    """
    shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return [UNLABELLED] * shared + list(ids[shared:])


def _without_gaps(message: dict[str, Any]) -> dict[str, Any]:
    """Tables fill keys that only other messages have with None."""
    return {key: value for key, value in message.items() if value is not None}
