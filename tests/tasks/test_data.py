"""Rows as people have them, against token ids and labels written out by hand."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from onestep_peft.data import guess_columns, guess_task, tokenise
from onestep_peft.data.labels import multi_hot, numbers
from onestep_peft.tasks import (
    MULTI_LABEL_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    TEXT_REGRESSION,
    TOKEN_CLASSIFICATION,
    Task,
)
from tests.conftest import CLS, SEP, SPECIAL, word_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
W = len(SPECIAL)  # the id of w0
EOS = 1
OPEN, CLOSE = 2, 3


def pieces() -> PreTrainedTokenizerFast:
    """Words of letters, three letters a token at most; no special tokens but [EOS] behind a text."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"[PAD]": 0, "[EOS]": EOS, "<u>": OPEN, "<a>": CLOSE}
    for token in [*letters, *(f"##{c}" for c in letters), "abc", "##def", "##gh", "ab", ".", "[UNK]"]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]",
        additional_special_tokens=["<u>", "<a>"],
    )  # fmt: skip


def ids(*tokens: str) -> list[int]:
    return pieces().convert_tokens_to_ids(list(tokens))


def done(rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 64, **named: Any) -> Dataset:
    return whole(rows, tokenizer, max_length, **named).rows


def whole(rows: Any, tokenizer: Any, max_length: int = 64, outputs: int = 3, **named: Any) -> Any:
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    task = guess_task(rows, **named)
    columns = guess_columns(rows, task=task, **named)
    return tokenise(rows, task, columns, tokenizer, {"O": 0, "B-X": 1, "I-X": 2}, outputs, max_length, "rows")


# What the columns say


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"text": "a", "label": 1}, TEXT_CLASSIFICATION),
        ({"text": "a", "label": "x"}, TEXT_CLASSIFICATION),
        ({"sentence1": "a", "sentence2": "b", "label": 0.5}, TEXT_REGRESSION),
        ({"text": "a", "labels": ["x", "y"]}, MULTI_LABEL_CLASSIFICATION),
        ({"tokens": ["a"], "ner_tags": ["O"]}, TOKEN_CLASSIFICATION),
        ({"words": ["a"], "labels": [0], "id": "1"}, TOKEN_CLASSIFICATION),
        ({"text": "a"}, TEXT_GENERATION),
        ({"prompt": "a", "completion": "b", "id": 3}, TEXT_GENERATION),
        ({"messages": [{"role": "user", "content": "a"}]}, TEXT_GENERATION),
        ({"text": "a", "y": 1}, TEXT_CLASSIFICATION),  # and the label column is then asked for
    ],
)
def test_the_columns_tell_the_task(row: dict[str, Any], task: Task) -> None:
    assert guess_task(Dataset.from_list([row, row])) is task


def test_a_column_of_classes_with_an_empty_cell_is_no_regression() -> None:
    assert guess_task(Dataset.from_dict({"text": ["a", "b"], "label": [1.0, None]})) is TEXT_CLASSIFICATION
    assert guess_task(Dataset.from_dict({"text": ["a", "b"], "label": [1.5, None]})) is TEXT_REGRESSION


# Labels of texts


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([["O"], [], ["I-X", "B-X"], None], [[1, 0, 0], [0, 0, 0], [0, 1, 1], [-100] * 3]),
        ([[0], [2, 1], [], None], [[1, 0, 0], [0, 1, 1], [0, 0, 0], [-100] * 3]),
        ([[1, 0, 1], [0, 0, 0], None, [1, 1, 1]], [[1, 0, 1], [0, 0, 0], [-100] * 3, [1, 1, 1]]),
        ([[0.0, 0.25, 1.0], [0.0, 0.0, 0.0], None, [1.0, 1.0, 1.0]], [[0, 0.25, 1], [0] * 3, [-100] * 3, [1] * 3]),
    ],
    ids=["names", "numbers", "0 or 1 a class", "shares"],
)
def test_several_labels_a_row(column: list[Any], expected: list[list[float]]) -> None:
    rows = Dataset.from_dict({"text": ["w1"] * 4, "label": column})
    assert whole(rows, word_tokenizer()).rows["labels"] == expected


def test_several_labels_by_their_columns_own_names() -> None:
    kinds = Features({"text": Value("string"), "label": List(ClassLabel(names=["I-X", "O"]))})
    rows = Dataset.from_dict({"text": ["w1", "w2"], "label": [[0], [1, 0]]}, features=kinds)
    assert whole(rows, word_tokenizer()).rows["labels"] == [[0, 0, 1], [1, 0, 1]]


def test_a_label_of_several_that_is_no_class_names_the_row() -> None:
    rows = Dataset.from_dict({"label": [["O"], ["O", "B-Y"]]})
    with pytest.raises(ValueError, match="rows, row 1: label 'B-Y' is none of the model's classes.*Did you mean 'B-X'"):
        multi_hot(rows, "label", {"O": 0, "B-X": 1}, 2, "rows", False)
    rows = Dataset.from_dict({"label": [[0], [5]]})
    with pytest.raises(ValueError, match="rows, row 1: label 5 is out of range: the model has 2 classes"):
        multi_hot(rows, "label", {}, 2, "rows", False)


def test_numbers_to_predict() -> None:
    found = numbers(Dataset.from_dict({"label": [1.5, None, -100.0]}), "label", 1, "rows")
    assert found[0] == 1.5 and math.isnan(found[1]) and found[2] == -100  # a temperature, say
    assert numbers(Dataset.from_dict({"label": [3, 4]}), "label", 1, "rows") == [3.0, 4.0]
    with pytest.raises(ValueError, match="rows, row 0: label 'high' is no number"):
        numbers(Dataset.from_dict({"label": ["high"]}), "label", 1, "rows")


# Words with tags


def test_a_words_tag_stands_at_its_first_token() -> None:
    row = {"tokens": ["abcdefgh", "ab", "q"], "ner_tags": ["B-X", "I-X", "O"]}
    (found,) = done([row], pieces())
    assert found["input_ids"] == ids("abc", "##def", "##gh", "ab", "q")
    assert found["labels"] == [1, -100, -100, 2, 0]


def test_special_tokens_have_no_tag_and_numbers_and_names_of_the_column_do() -> None:
    names = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["B-X", "I-X", "O"]))})
    rows = Dataset.from_dict({"tokens": [["w1", "w2"], ["w3"]], "tags": [[2, 0], [1]]}, features=names)
    found = whole(rows, word_tokenizer()).rows
    assert found["input_ids"] == [[CLS, W + 1, W + 2, SEP], [CLS, W + 3, SEP]]
    assert found["labels"] == [[-100, 0, 1, -100], [-100, 2, -100]]
    bare = done([{"words": ["w1", "w2"], "labels": [2, None]}], word_tokenizer())
    assert bare["labels"] == [[-100, 2, -100, -100]]


def test_words_that_are_cut_are_counted() -> None:
    rows = [{"tokens": ["w1"] * 6, "tags": ["O"] * 6}, {"tokens": ["w1"], "tags": ["O"]}]
    with pytest.warns(UserWarning, match="rows: 3 of 7 tagged words have no token: rows are cut at 5 tokens"):
        found = done(rows, word_tokenizer(), max_length=5)
    assert found["labels"] == [[-100, 0, 0, 0, -100], [-100, 0, -100]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["w1", "w2"], "tags": ["O", "O", "O"]}, "rows, row 1: 3 tags in 'tags' for 2 words"),
        ({"tokens": ["w1", "w2"], "tags": None}, "rows, row 1: no tags in 'tags' for 2 words"),
        ({"tokens": ["w1"], "tags": ["B-Y"]}, "rows, row 1: label 'B-Y' is none of.*Did you mean 'B-X'"),
        ({"tokens": None, "tags": ["O"]}, "rows, row 1: 'tokens' is None, not a list of words"),
    ],
)
def test_bad_tags_name_the_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        done([{"tokens": ["w1"], "tags": ["O"]}, row], word_tokenizer())


class Slow(PreTrainedTokenizer):
    vocab_size = 3

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


def test_a_slow_tokenizer_cannot_align_tags() -> None:
    with pytest.raises(ValueError, match="Slow is not a fast tokenizer.*use_fast=True"):
        done([{"tokens": ["a"], "tags": ["O"]}], Slow())


# Texts to go on with


def test_a_text_is_all_labels_and_ends() -> None:
    (found,) = done([{"text": "ab q"}], pieces())
    assert found["input_ids"] == found["labels"] == [*ids("ab", "q"), EOS]
    (closed,) = done([{"text": "ab [EOS]"}], pieces())  # once is enough
    assert closed["input_ids"] == [*ids("ab"), EOS]


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 64])
def test_every_token_of_a_long_text_but_the_first_is_predicted_once(length: int) -> None:
    found = whole([{"text": "z"}, {"text": "a b c d e f"}], pieces(), max_length=length)
    expected = [*ids("a", "b", "c", "d", "e", "f"), EOS]
    rows = [row for row, origin in zip(found.rows, found.origins, strict=True) if origin == 1]
    assert [token for row in rows for token in row["labels"][1:]] == expected[1:]
    assert all(len(row["input_ids"]) <= length for row in rows)
    for before, after in zip(rows, rows[1:], strict=False):  # a piece begins with what the last one ended with
        assert after["input_ids"][0] == before["input_ids"][-1]


def test_only_the_completion_is_learnt() -> None:
    (found,) = done([{"prompt": "ab q ", "completion": "x"}], pieces())
    assert found["input_ids"] == [*ids("ab", "q", "x"), EOS]
    assert found["labels"] == [-100, -100, *ids("x"), EOS]


def test_a_token_that_the_completion_changes_is_the_completions() -> None:
    # "ab" and "c" merge into one token; a tokenizer's closing token behind the prompt is no part of the row.
    (found,) = done([{"prompt": "q ab", "completion": "c"}], pieces())
    assert found["labels"] == [-100, *ids("abc"), EOS] and found["input_ids"] == [*ids("q", "abc"), EOS]
    (special,) = done([{"prompt": "w1 ", "completion": "w2"}], word_tokenizer())
    assert special["input_ids"] == [CLS, W + 1, W + 2, SEP] and special["labels"] == [-100, -100, W + 2, SEP]


def test_any_two_columns_may_be_prompt_and_completion() -> None:
    rows = Dataset.from_list([{"question": "ab ", "answer": "x", "id": 1}])
    columns = guess_columns(rows, ["question", "answer"], task=TEXT_GENERATION)
    found = tokenise(rows, TEXT_GENERATION, columns, pieces(), {}, 9, 64, "rows").rows
    assert found["labels"] == [[-100, *ids("x"), EOS]]


def test_a_completion_that_is_cut_off_is_left_out() -> None:
    rows = [{"prompt": "a b c d e ", "completion": "x"}, {"prompt": "a ", "completion": "x y z"}]
    with pytest.warns(UserWarning, match="1 of 2 rows have nothing to predict within 4 tokens, first row 0"):
        found = whole(rows, pieces(), max_length=4)
    assert found.origins == [1]
    assert found.rows["labels"] == [[-100, *ids("x", "y", "z")]]
    with pytest.raises(ValueError, match="1 of 1 rows have nothing to predict.*Raise `max_length`"):
        done(rows[:1], pieces(), max_length=4)


USER = "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }} {{ m.content }} {% endfor %}"
MARKED = (
    "{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} [EOS] {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "ab q"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "y z"},
]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = pieces()
    tokenizer.chat_template = template
    return tokenizer


def test_messages_are_all_labels_or_the_assistants_alone_where_the_template_tells() -> None:
    (found,) = done([{"messages": TALK}], with_template(USER))
    talk = ids("<u>", "ab", "q", "<a>", "x", "<u>", "b", "<a>", "y", "z")
    assert found["input_ids"] == found["labels"] == talk
    (marked,) = done([{"messages": TALK}], with_template(MARKED))
    assert marked["input_ids"] == ids("<u>", "ab", "q", "<a>", "x", "[EOS]", "<u>", "b", "<a>", "y", "z", "[EOS]")
    assert marked["labels"] == [-100] * 4 + ids("x", "[EOS]") + [-100] * 3 + ids("y", "z", "[EOS]")


def test_a_prompt_and_a_completion_may_be_messages() -> None:
    (found,) = done([{"prompt": TALK[:3], "completion": TALK[3:]}], with_template(MARKED))
    assert found["labels"] == [-100] * 9 + ids("y", "z", "[EOS]")
    assert found["input_ids"][-4:] == ids("<a>", "y", "z", "[EOS]")


def test_keys_that_only_some_messages_have_do_no_harm() -> None:
    talk = [{**TALK[0], "name": None}, {**TALK[1], "name": "z"}]
    template = USER.replace("{{ m.content }}", "{{ m.content }} {{ 'y' if 'name' in m else '' }}")
    (found,) = done([{"messages": talk}], with_template(template))
    assert found["input_ids"] == ids("<u>", "ab", "q", "<a>", "x", "y")


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ValueError, match="'messages' holds messages.*no chat template.*`tokenizer.chat_template`"):
        done([{"messages": TALK}], with_template(None))


@pytest.mark.parametrize("bad", [{"prompt": "a", "completion": None}, {"prompt": None, "completion": "b"}])
def test_a_missing_part_names_the_row(bad: dict[str, Any]) -> None:
    name = next(name for name, value in bad.items() if value is None)
    with pytest.raises(ValueError, match=f"rows, row 1: '{name}' is None, not text"):
        done([{"prompt": "a", "completion": "b"}, bad], pieces())


def test_a_prompt_without_a_completion_column_is_refused() -> None:
    with pytest.raises(ValueError, match="column 'prompt' but no 'completion'.*text_column"):
        guess_columns(Dataset.from_list([{"prompt": "a"}]), task=TEXT_GENERATION)


# Real rows


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the data sets beside the project are not there")
def test_real_tagged_rows_keep_every_tag() -> None:
    folder = SHARED / "data" / "ner_wnut17"
    rows = Dataset.from_list([json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()[:100]])
    names = json.loads((folder / "labels.json").read_text())
    assert guess_task(rows) is TOKEN_CLASSIFICATION
    columns = guess_columns(rows, task=TOKEN_CLASSIFICATION)
    label2id = {name: i for i, name in enumerate(names)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tokenise(rows, TOKEN_CLASSIFICATION, columns, word_tokenizer(), label2id, len(names), 512, "rows").rows
    for row, tags in zip(found["labels"], rows["ner_tags"], strict=True):
        assert [names[label] for label in row if label != -100] == tags


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the model beside the project is not there")
def test_real_texts_come_back_out_of_their_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    lines = (SHARED / "data" / "lm_tinyshakespeare" / "test.jsonl").read_text().splitlines()[:50]
    rows = Dataset.from_list([json.loads(line) for line in lines])
    found = whole(rows, tokenizer, max_length=40)
    for number, text in enumerate(rows["text"]):
        own = [row for row, origin in zip(found.rows, found.origins, strict=True) if origin == number]
        tokens = [own[0]["input_ids"][0], *(label for row in own for label in row["labels"][1:])]
        assert tokens[-1] == tokenizer.eos_token_id
        assert (
            tokenizer.decode(tokens, skip_special_tokens=True).strip()
            == tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip()
        )
