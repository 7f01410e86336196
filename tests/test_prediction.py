"""One record a text, by task."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, GPT2Config, GPT2LMHeadModel, pipeline

from onestep_peft.prediction import predict
from tests.conftest import SMALL, VOCABULARY, tiny_bert, word_tokenizer

TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


def test_classification_in_batches_of_any_size() -> None:
    model = tiny_bert().eval()
    whole = list(predict("text-classification", model, word_tokenizer(), TEXTS))
    split = list(predict("text-classification", model, word_tokenizer(), TEXTS, batch_size=2))
    assert [record.keys() for record in whole] == [{"label", "score"}] * 3
    assert [record["label"] for record in whole] == [record["label"] for record in split]
    assert [record["score"] for record in whole] == pytest.approx([record["score"] for record in split], rel=1e-5)
    pair = next(iter(predict("text-classification", model, word_tokenizer(), [("w1", "w2")])))
    both = pipeline("text-classification", model=model, tokenizer=word_tokenizer())({"text": "w1", "text_pair": "w2"})
    assert pair["score"] == both["score"]


def test_token_classification_gives_entities() -> None:
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**SMALL, num_labels=3)).eval()
    records = list(predict("token-classification", model, word_tokenizer(), TEXTS))
    assert [record.keys() for record in records] == [{"entities"}] * 3
    first = records[0]["entities"][0]
    assert {"entity_group", "score", "word", "start", "end"} == first.keys() and first["word"].startswith("w")
    json.dumps(records)


def test_generation_gives_what_follows() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    records = list(predict("text-generation", model, word_tokenizer(), TEXTS, **options))
    alone = [next(iter(predict("text-generation", model, word_tokenizer(), [text], **options))) for text in TEXTS]
    assert records == alone  # padding of a batch has no say
    assert all(
        set(record) == {"generated_text"} and not record["generated_text"].startswith("w1 w2") for record in records
    )


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="'fill-mask' is none that predictions are known for"):
        next(predict("fill-mask", tiny_bert(), word_tokenizer(), TEXTS))
    with pytest.raises(ValueError, match="reads one text a row"):
        next(predict("token-classification", tiny_bert(), word_tokenizer(), [("w1", "w2")]))
