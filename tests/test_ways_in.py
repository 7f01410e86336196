"""Ways into a run: adapters that are there already, shared configs, seeds, and rows with gaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from onestep_peft import OneStepTrainer, load
from onestep_peft.data import count_labels
from onestep_peft.data.labels import class_numbers
from tests.conftest import assert_same_bits, bits, config_for, tiny_bert, toy_rows, trainer_for, word_tokenizer

TRAIN = toy_rows(300, seed=1)


def test_a_peft_model_with_a_fresh_head_gets_it_fitted(tmp_path: Path) -> None:
    base = tiny_bert()
    wrapped = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    trainer = trainer_for(tmp_path, TRAIN, model=wrapped, eval_dataset=TRAIN[:60])
    trainer.train()
    metrics = trainer.report.metrics
    assert metrics["head"] is not None and metrics["head"]["loss"] < metrics["base"]["loss"]


def test_two_trainers_may_share_a_config(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    before = config.to_dict()
    for compute in (None, lambda prediction: {"rows": float(len(prediction.label_ids))}):
        trainer = OneStepTrainer(
            model=tiny_bert(), args=config, train_dataset=TRAIN, processing_class=word_tokenizer(),
            eval_dataset=TRAIN[:20], compute_metrics=compute,
        )  # fmt: skip
        trainer.train()
    assert trainer.report.metrics["after"]["rows"] == 20
    assert config.to_dict() == before


def test_without_evaluation_rows_the_held_out_rows_report_and_it_is_said(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, TRAIN)
    trainer.train()
    report = trainer.report
    assert report.scored_on == "held-out rows" and "which also chose the step" in report.table()
    assert report.metrics["head"]["loss"] == pytest.approx(report.steps[0]["loss_before"], rel=0.05)


def test_the_same_seed_gives_the_same_run_from_a_models_name(tmp_path: Path) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    runs = []
    for i in range(2):
        torch.manual_seed(i)  # whatever came before
        trainer = trainer_for(tmp_path / str(i), TRAIN, model=str(tmp_path / "base"), direction="sgd", seed=5)
        trainer.train()
        runs.append(bits(trainer.model))
    assert_same_bits(trainer.model, runs[0])


def test_an_adapter_saved_before_any_step_loads(tmp_path: Path) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    trainer = trainer_for(tmp_path / "out", TRAIN, model=str(tmp_path / "base"))
    trainer.save_model()
    model, _ = load(tmp_path / "out")
    assert model.config.num_labels == 2


def test_an_empty_cell_among_integer_labels_is_a_row_without_label() -> None:
    rows = Dataset.from_dict({"text": ["w1", "w2", "w9"], "label": [0.0, None, 1.0]})
    assert count_labels(rows, "label") == (None, 2)
    assert class_numbers(rows, "label", {}, 2, "rows") == [0, -100, 1]
