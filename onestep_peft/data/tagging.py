"""Token classification: tags of words become labels of tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from onestep_peft.data.labels import Numbering
from onestep_peft.tasks.task import UNLABELLED


def tokenise(
    rows: Dataset,
    words_column: str,
    tags_column: str | None,
    tokenizer: PreTrainedTokenizerBase,
    label2id: Mapping[str, int],
    classes: int,
    max_length: int,
    what: str,
) -> Dataset:
    """A word's tag stands at its first token; its other tokens and the special ones are labelled -100.

    Words beyond `max_length` tokens are cut, with a warning.

    Raises:
        ValueError: A tokenizer that does not tell which word a token is from, a row whose words and tags differ in
            number, or an unknown tag.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so it does not tell which word a token belongs to. "
            "Load one: `AutoTokenizer.from_pretrained(..., use_fast=True)`."
        )
    words = list(rows[words_column])
    bad = next((i for i, row in enumerate(words) if not _is_words(row)), None)
    if bad is not None:
        raise ValueError(f"{what}, row {bad}: {words_column!r} is {words[bad]!r}, not a list of words.")
    tags = _numbered(rows, tags_column, words, label2id, classes, what) if tags_column is not None else None
    tokens = _split(tokenizer, words, max_length)
    found = {name: tokens[name] for name in tokens}
    if tags is not None:
        found["labels"] = [_spread(tokens.word_ids(i), row) for i, row in enumerate(tags)]
        known = sum(tag != UNLABELLED for row in tags for tag in row)
        cut = known - sum(label != UNLABELLED for row in found["labels"] for label in row)
        if cut:
            warnings.warn(
                f"{what}: {cut} of {known} tagged words have no token: rows are cut at {max_length} tokens, and some "
                "words are none to the tokenizer. Raise `max_length`, or split long rows.",
                stacklevel=2,
            )
    return Dataset.from_dict(found)


def _is_words(row: object) -> bool:
    return isinstance(row, list) and all(isinstance(word, str) for word in row)


def _numbered(
    rows: Dataset, column: str, words: list[list[str]], label2id: Mapping[str, int], classes: int, what: str
) -> list[list[int]]:
    of = Numbering(rows, column, label2id, classes, what)
    found = []
    for i, (row, tags) in enumerate(zip(words, rows[column], strict=True)):
        if not isinstance(tags, list) or len(tags) != len(row):
            number = len(tags) if isinstance(tags, list) else "no"
            raise ValueError(
                f"{what}, row {i}: {number} tags in {column!r} for {len(row)} words. Give every word a tag, None where "
                "it has none."
            )
        found.append([of(i, tag) for tag in tags])
    return found


def _split(tokenizer: PreTrainedTokenizerBase, words: list[list[str]], max_length: int) -> BatchEncoding:
    try:
        return tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    except AssertionError as error:  # byte-level BPE that was loaded for running text
        raise ValueError(
            f"{type(tokenizer).__name__} cannot take words as they are: {error} Load it with `add_prefix_space=True`."
        ) from error


def _spread(word_ids: list[int | None], tags: list[int]) -> list[int]:
    """Labels of tokens, from the words' tags and each token's word."""
    labels, last = [], None
    for word in word_ids:
        labels.append(UNLABELLED if word is None or word == last else tags[word])
        last = word
    return labels
