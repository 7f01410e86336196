"""Small models and learnable rows for each task, from seeds."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.conftest import CLS, PAD, SEP, SMALL, VOCABULARY, WORDS

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tiny_tagger(seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: i for i, tag in enumerate(TAGS)}}
    return BertForTokenClassification(BertConfig(**{**SMALL, "num_labels": len(TAGS), **names, **options}))


def tiny_causal_llama(seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    fixed = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **fixed, **options}))


def tiny_gpt2(seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1,
            bos_token_id=CLS, eos_token_id=SEP, **options,
        )
    )  # fmt: skip


def tagged_rows(number: int, seed: int) -> list[dict[str, Any]]:
    """Words w0-w7 are people, w8-w15 places, the others nothing; a neighbour of the same kind goes on with it."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        numbers = [
            draw.randrange(16) if draw.random() < 0.4 else draw.randrange(16, WORDS) for _ in range(draw.randint(3, 12))
        ]
        tags: list[str] = []
        for number_ in numbers:
            kind = {0: "PER", 1: "LOC"}.get(number_ // 8)
            inside = bool(tags) and kind is not None and tags[-1].endswith(kind)
            tags.append("O" if kind is None else f"{'I' if inside else 'B'}-{kind}")
        rows.append({"tokens": [f"w{n}" for n in numbers], "ner_tags": tags})
    return rows


def counting_texts(number: int, seed: int) -> list[dict[str, Any]]:
    """Words that mostly count up, modulo 16: the next word follows from the last one."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        word, words = draw.randrange(16), []
        for _ in range(draw.randint(4, 16)):
            words.append(f"w{word}")
            word = (word + 1) % 16 if draw.random() < 0.9 else draw.randrange(16)
        rows.append({"text": " ".join(words)})
    return rows
