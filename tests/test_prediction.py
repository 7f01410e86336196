"""One record a text, by task."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import pipeline

from onestep_peft.methods import prompt_tuning
from onestep_peft.prediction import predict
from tests.conftest import tiny_bert, word_tokenizer
from tests.tasks.small import tiny_causal_llama, tiny_gpt2, tiny_tagger

TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


def test_classification_in_batches_of_any_size() -> None:
    model = tiny_bert().eval()
    whole = list(predict(model, word_tokenizer(), TEXTS))
    split = list(predict(model, word_tokenizer(), TEXTS, batch_size=2))
    assert [record.keys() for record in whole] == [{"label", "score"}] * 3
    assert [record["label"] for record in whole] == [record["label"] for record in split]
    assert [record["score"] for record in whole] == pytest.approx([record["score"] for record in split], rel=1e-5)
    pair = next(iter(predict(model, word_tokenizer(), [("w1", "w2")])))
    both = pipeline("text-classification", model=model, tokenizer=word_tokenizer())({"text": "w1", "text_pair": "w2"})
    assert pair["score"] == both["score"]


def test_token_classification_gives_entities() -> None:
    model = tiny_tagger().eval()
    records = list(predict(model, word_tokenizer(), TEXTS))
    assert [record.keys() for record in records] == [{"entities"}] * 3
    first = records[0]["entities"][0]
    assert {"entity_group", "score", "word", "start", "end"} == first.keys() and first["word"].startswith("w")
    json.dumps(records)
    words = list(predict(model, word_tokenizer(), [text.split() for text in TEXTS], batch_size=2))
    assert [_plain(record) for record in words] == [_plain(record) for record in records]


def _plain(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(one[key] for key in ("entity_group", "word", "start", "end")) for one in record["entities"]]


LONG = " ".join(f"w{i}" for i in range(60))  # of 64 positions


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_causal_llama])
def test_generation_gives_what_follows_whatever_else_is_in_the_batch(make: Any, prompt: bool) -> None:
    model: Any = make().eval()
    if prompt:
        torch.manual_seed(1)
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        prompt_tuning.settle(model)
    tokenizer = word_tokenizer()
    texts = TEXTS if prompt else [*TEXTS, LONG]
    records = list(predict(model, tokenizer, texts, max_new_tokens=4))
    alone = [next(iter(predict(model, tokenizer, [text], max_new_tokens=4))) for text in texts]
    assert records == alone
    for text, record in zip(texts, records, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        new = []
        for _ in range(min(4, 64 - 3 * prompt - ids.shape[1])):
            with torch.no_grad():
                new.append(int(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([new[-1:]])], 1)
            if new[-1] == model.generation_config.eos_token_id:
                break
        expected = tokenizer.decode(new, skip_special_tokens=True)
        assert record == {"generated_text": f" {expected}" if expected else ""}
    with pytest.raises(ValueError, match="Row 1: the text has 72 tokens and leaves no room for more"):
        list(predict(model, tokenizer, ["w1", f"{LONG} {TEXTS[0]} {TEXTS[0]} w1 w1 w1 w1"], batch_size=1))


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="BertModel has no task that one step knows"):
        next(predict(tiny_bert().bert, word_tokenizer(), TEXTS))
    with pytest.raises(ValueError, match="text-classification reads texts or pairs of texts, not lists of words"):
        next(predict(tiny_bert(), word_tokenizer(), [["w1", "w2"]]))
    with pytest.raises(ValueError, match="token-classification reads texts or lists of words, not pairs of texts"):
        next(predict(tiny_tagger(), word_tokenizer(), [("w1", "w2")]))
    with pytest.raises(ValueError, match="not lists of words and texts"):
        next(predict(tiny_tagger(), word_tokenizer(), ["w1", ["w1", "w2"]]))
