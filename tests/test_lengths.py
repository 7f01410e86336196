"""Rows as long as a model takes them, virtual tokens and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, RobertaConfig, RobertaForSequenceClassification

from onestep_peft import OneStepTrainer
from onestep_peft.evaluation import evaluate
from onestep_peft.held_out import padded
from onestep_peft.lengths import NO_LIMIT, longest_input, positions_of
from onestep_peft.prediction import predict
from onestep_peft.step import processes
from tests.conftest import SMALL, config_for, tiny_bert, tokenised, word_tokenizer
from tests.tasks.small import tiny_causal_llama, tiny_gpt2

PROMPT = 5
QUIET = {"use_cpu": True, "disable_tqdm": True}


def tiny_roberta() -> nn.Module:
    """64 positions, of which two lie before that of a row's first token."""
    torch.manual_seed(0)
    options = {**SMALL, "max_position_embeddings": 64, "pad_token_id": 1, "type_vocab_size": 1}
    return RobertaForSequenceClassification(RobertaConfig(**options))


def long_rows() -> list[dict[str, Any]]:
    return [{"text": " ".join([word] * 100), "label": label} for word, label in [("w1", 0), ("w9", 1)] * 8]


MODELS = {"bert": (tiny_bert, 64), "roberta": (tiny_roberta, 62)}


def test_positions() -> None:
    for make, positions in MODELS.values():
        assert positions_of(make()) == positions
    assert positions_of(tiny_gpt2()) == 64 and positions_of(tiny_causal_llama()) == 64
    unlimited = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    assert positions_of(unlimited) == NO_LIMIT


def test_where_rows_are_cut() -> None:
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 30
    assert longest_input(tokenizer, 64) == 30 and longest_input(tokenizer, 64, 40) == 24
    assert longest_input(tokenizer, 64, 40, max_length=10) == 10
    tokenizer.model_max_length = NO_LIMIT
    assert longest_input(tokenizer, NO_LIMIT) == 512
    with pytest.raises(ValueError, match="`max_length=25`, but the model has 64 positions less 40 virtual.*at most 24"):
        longest_input(tokenizer, 64, 40, max_length=25)


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_rows_and_a_prompt_fit(name: str, tmp_path: Path) -> None:
    make, positions = MODELS[name]
    tokenizer = word_tokenizer()
    trainer = OneStepTrainer(
        model=make(), args=config_for(tmp_path, direction="sgd", step_size=1e-3, fit_head=False, guard=False),
        train_dataset=long_rows(), eval_dataset=long_rows(), processing_class=tokenizer,
        peft_config=PromptTuningConfig(num_virtual_tokens=PROMPT),
    )  # fmt: skip
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {positions - PROMPT}
    trainer.train()
    model: Any = trainer.model.eval()
    found = evaluate(model, tokenizer, long_rows(), **QUIET)
    assert found.metrics == pytest.approx(trainer.report.metrics["after"], rel=1e-5)
    (record,) = predict(model, tokenizer, [long_rows()[0]["text"]])
    row = {key: torch.tensor([value]) for key, value in trainer.train_dataset[0].items() if key != "labels"}
    with torch.no_grad():
        assert record["score"] == pytest.approx(float(model(**row).logits.softmax(-1).max()), rel=1e-5)


def test_tokens_that_leave_a_prompt_no_room_are_refused(tmp_path: Path) -> None:
    rows = tokenised([{"text": " ".join(["w1"] * n), "label": n % 2} for n in (10, 58, 10, 10)])
    assert [len(ids) for ids in rows["input_ids"]][1] == 60

    def run(some: Any) -> OneStepTrainer:
        return OneStepTrainer(
            model=tiny_bert(), args=config_for(tmp_path, guard=False, direction="sgd", step_size=1e-3),
            train_dataset=some, peft_config=PromptTuningConfig(num_virtual_tokens=PROMPT),
            processing_class=word_tokenizer(),
        )  # fmt: skip

    for some in (rows, list(rows)):
        with pytest.raises(ValueError, match=r"train_dataset, row 1: 60 tokens and 5 virtual.*`max_length=59`"):
            run(some)
    trainer = run(Dataset.from_list([row for row in rows if len(row["input_ids"]) < 60]))
    with pytest.raises(ValueError, match="row 1: 60 tokens and 5 virtual ones"):
        trainer.evaluate(rows)
    with pytest.raises(ValueError, match="rows, row 1: 60 tokens and 5 virtual ones"):
        evaluate(trainer.model, word_tokenizer(), rows, **QUIET)


def test_a_prompt_that_leaves_rows_no_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_virtual_tokens=61` leaves rows no room among .* 62 .*at most 60"):
        OneStepTrainer(
            model=tiny_roberta(), args=config_for(tmp_path, search_fraction=0.5), train_dataset=long_rows(),
            processing_class=word_tokenizer(), peft_config=PromptTuningConfig(num_virtual_tokens=61),
        )  # fmt: skip


def test_rows_that_are_filled_up_end_where_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "number", lambda: 2)
    rows = padded([{"input_ids": [1], "labels": 0}] * 5, batch_size=4)
    found = list(rows)  # an endless iteration would never come back
    assert len(found) == len(rows) == 8
    assert [row["labels"] for row in found] == [0] * 5 + [-100] * 3
