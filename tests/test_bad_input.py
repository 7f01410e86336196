"""Bad input: the message names the value, the reason and the fix, and comes before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedModel

from onestep_peft import OneStepTrainer
from onestep_peft.data import guess_columns, read
from tests.conftest import (
    SMALL,
    SPECIAL,
    assert_same_bits,
    bits,
    config_for,
    tiny_bert,
    tokenised,
    toy_rows,
    trainer_for,
    word_tokenizer,
)

ROWS = toy_rows(60, seed=1)
PLAIN = {"direction": "sgd", "step_size": 0.1}


def refused(message: str, rows: Any, folder: Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_for(folder, rows, **{**PLAIN, **options})


# Rows


@pytest.mark.parametrize("rows", [[], Dataset.from_list([]), Dataset.from_dict({"input_ids": [], "labels": []})])
def test_an_empty_set_is_refused(rows: Any, tmp_path: Path) -> None:
    refused("train_dataset has no rows.*at least one", rows, tmp_path)


@pytest.mark.parametrize("name", ["eval_dataset", "search_dataset"])
def test_another_empty_set_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    refused(f"{name} has no rows", ROWS, tmp_path, **{name: []})


def test_no_training_rows_at_all_are_refused(tmp_path: Path) -> None:
    refused("`train_dataset` is missing", None, tmp_path)


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    refused("No column 'txt'.*Did you mean 'text'", ROWS, tmp_path, text_column="txt")
    refused("No column 'lable'.*Did you mean 'label'", ROWS, tmp_path, label_column="lable")
    other = [{"text": row["text"], "labl": row["label"]} for row in ROWS]
    refused("eval_dataset has no column 'label'.*Did you mean 'labl'", ROWS, tmp_path, eval_dataset=other)


def test_no_label_column_is_refused_with_the_option_to_name_it(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "y": row["label"]} for row in ROWS]
    refused("No label column among.*'y'.*label_column", rows, tmp_path)
    refused("no column 'labels'", tokenised(ROWS).remove_columns("labels"), tmp_path)


def test_two_columns_that_may_be_the_text_are_not_guessed(tmp_path: Path) -> None:
    rows = [{"subject": "w1", "body": row["text"], "label": row["label"]} for row in ROWS]
    refused("not clear.*'subject', 'body'.*text_column", rows, tmp_path)
    columns = guess_columns(Dataset.from_list(rows), "body")
    assert (columns.text, columns.label) == (("body",), "label")


@pytest.mark.parametrize("bad", [2, 7, -1])
def test_a_label_out_of_range_names_the_row(bad: int, tmp_path: Path) -> None:
    rows = [{**row} for row in ROWS]
    rows[17]["label"] = bad
    message = f"train_dataset, row 17: label {bad} is out of range.*2 classes, 0 to 1.*num_labels"
    refused(message, rows, tmp_path)
    refused(message, tokenised(rows), tmp_path)


def test_a_string_label_that_is_no_class_names_the_row_and_the_nearest(tmp_path: Path) -> None:
    rows = [{**row, "label": ["bad", "good"][row["label"]]} for row in ROWS]
    held = [{**row} for row in rows[:10]]
    held[3]["label"] = "goood"
    refused("eval_dataset, row 3: label 'goood'.*Did you mean 'good'", rows, tmp_path, eval_dataset=held)


@pytest.mark.parametrize("column", ["text", "other"])
def test_a_row_without_text_is_named(column: str, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "other": row["text"], "label": row["label"]} for row in ROWS]
    rows[5][column] = None
    message = f"train_dataset: 1 rows have no text in '{column}', first row 5"
    refused(message, rows, tmp_path, text_column=["text", "other"])


def test_one_class_is_refused_for_a_base_by_name(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path / "base")
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    rows = [{**row, "label": "good"} for row in ROWS]
    refused("1 class in column 'label'.*at least 2", rows, tmp_path, model=str(tmp_path / "base"))


def test_too_few_rows_to_hold_any_out_are_refused_with_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="10 training rows.*`search_dataset`.*`search_fraction`.*`guard=False`"):
        trainer_for(tmp_path, ROWS[:10])


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset holds text.*`processing_class=`"):
        OneStepTrainer(model=tiny_bert(), args=config_for(tmp_path, **PLAIN), train_dataset=ROWS)


# The model


@pytest.mark.parametrize("name", ["no/such-base", "nothing_here"])
def test_a_base_that_is_not_found_says_where_it_was_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"The base '{name}' has no tokenizer.*no folder here.*Check the name"):
        OneStepTrainer(model=name, args=config_for(tmp_path, **PLAIN), train_dataset=ROWS)
    with pytest.raises(ValueError, match=rf"The base '{name}' has no model.*no folder here.*Check the name"):
        trainer_for(tmp_path, ROWS, model=name, **PLAIN)


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    refused("BertModel has no task.*text-classification", ROWS, tmp_path, model=BertModel(BertConfig(**SMALL)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "train_dataset, row 0: label [01] is no list"),
        ({"problem_type": "regression"}, "train_dataset, row 0: 1 numbers for the model's 2 outputs"),
        ({"problem_type": "multi_label"}, "`problem_type='multi_label'`.*Did you mean 'multi_label_classification'"),
    ],
)
def test_labels_that_the_head_does_not_take_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(message, tokenised(ROWS), tmp_path, model=tiny_bert(**options))


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`model` is missing.*`model_init`"):
        OneStepTrainer(args=config_for(tmp_path), train_dataset=ROWS, processing_class=word_tokenizer())


def test_an_adapter_that_is_frozen_is_refused_with_the_fix(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "one", ROWS, **PLAIN)
    trainer.train()
    trainer.save_model()
    # `is_trainable` is False unless one says otherwise, and then nothing can move.
    model = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "one"))
    with pytest.raises(ValueError, match="is_trainable"):
        trainer_for(tmp_path / "two", ROWS, model=model, **PLAIN).train()


# Options that contradict each other


def test_metrics_and_compute_metrics_together_are_refused(tmp_path: Path) -> None:
    refused("`metrics` and `compute_metrics` are both given", ROWS, tmp_path, metrics=["f1"], compute_metrics=len)


def test_fit_head_without_a_fresh_head_is_refused(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "whole")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    trainer = trainer_for(tmp_path / "out", ROWS, model=model, fit_head=True, **PLAIN)
    with pytest.raises(ValueError, match="`fit_head=True`.*no freshly initialised head.*Leave it out"):
        trainer.train()


def test_stop_at_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, ROWS, stop_at=0.5, **PLAIN)
    with pytest.raises(ValueError, match="`stop_at` needs held-out rows"):
        trainer.train()


def test_several_directions_hold_rows_out_even_where_nothing_else_asks_for_them(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, ROWS, direction="auto", step_size=0.01, guard=False)
    assert len(trainer.held_rows) + len(trainer.pass_rows) == len(ROWS)
    trainer.train()
    assert len(trainer.report.steps[0]["candidates"]) > 1


# Losses that are not finite


def with_a_broken_word(word: int, **options: Any) -> PreTrainedModel:
    model = tiny_bert(**options)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[len(SPECIAL) + word] = float("nan")
    return model


def rows_with(rows: list[dict[str, Any]], word: int) -> list[int]:
    return [i for i, row in enumerate(rows) if f"w{word}" in row["text"].split()]


@pytest.mark.parametrize("batch_size", [4, 16])
@pytest.mark.parametrize("fit_head", [True, False])
def test_rows_whose_loss_is_not_finite_are_named(batch_size: int, fit_head: bool, tmp_path: Path) -> None:
    # Every batch that has them would name its own; one batch has all, so put the word into two rows only.
    rows = [{**row, "text": row["text"].replace("w50", "w51")} for row in ROWS]
    rows[13]["text"] = "w50 " + " ".join(["w20"] * 20)
    rows[41]["text"] = "w50 " + " ".join(["w21"] * 20)  # the longest: in one micro-batch
    trainer = trainer_for(
        tmp_path, rows, model=with_a_broken_word(50), fit_head=fit_head, per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=5, **PLAIN,
    )  # fmt: skip
    before = bits(trainer.model)
    with pytest.raises(ValueError, match=r"The loss is nan for rows 13, 41 of train_dataset"):
        trainer.train()
    assert_same_bits(trainer.model, before)


def test_rows_in_a_later_micro_batch_are_named_by_their_own_numbers(tmp_path: Path) -> None:
    rows = [{**row, "text": row["text"].replace("w50", "w51")} for row in ROWS]
    rows[29]["text"] = "w50"  # the shortest: in the last micro-batch
    trainer = trainer_for(tmp_path, rows, model=with_a_broken_word(50), per_device_train_batch_size=7, **PLAIN)
    with pytest.raises(ValueError, match=r"for rows 29 of train_dataset"):
        trainer.train()


def test_more_broken_rows_than_one_reads_are_counted(tmp_path: Path) -> None:
    rows = [{**row, "text": "w50 " + row["text"]} for row in ROWS[:30]]
    trainer = trainer_for(tmp_path, rows, model=with_a_broken_word(50), per_device_train_batch_size=30, **PLAIN)
    with pytest.raises(ValueError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more of train_dataset"):
        trainer.train()


def test_held_out_rows_whose_loss_is_not_finite_are_named_before_the_pass(tmp_path: Path) -> None:
    search = toy_rows(30, seed=4)
    search = [{**row, "text": row["text"].replace("w50", "w51")} for row in search]
    search[8]["text"] = "w50 w20"
    rows = [{**row, "text": row["text"].replace("w50", "w51")} for row in ROWS]
    assert rows_with(search, 50) == [8] and not rows_with(rows, 50)
    trainer = trainer_for(tmp_path, rows, model=with_a_broken_word(50), search_dataset=search)
    with pytest.raises(ValueError, match=r"rows? 8 of search_dataset"):
        trainer.train()


# Files


def test_a_source_that_is_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No file '.*rows\.csv'"):
        read(str(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match=r"holds no \.jsonl, \.csv or \.parquet file"):
        read(str(tmp_path))
    with pytest.raises(ValueError, match="No data set 'no/such-set'.*Check the name"):
        read("no/such-set")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": ')
    with pytest.raises(ValueError, match=r"rows\.jsonl' cannot be read as json"):
        read(str(tmp_path / "rows.jsonl"))


def test_files_are_read_as_splits(tmp_path: Path) -> None:
    Dataset.from_list(ROWS[:40]).to_json(tmp_path / "train.jsonl")
    Dataset.from_list(ROWS[40:]).to_csv(tmp_path / "test.csv")
    Dataset.from_list(ROWS[:5]).to_parquet(tmp_path / "few.parquet")
    found = read(str(tmp_path))
    assert {name: rows.to_list() for name, rows in found.items()} == {
        "train": ROWS[:40], "test": ROWS[40:], "few": ROWS[:5]
    }  # fmt: skip
    assert read(str(tmp_path / "train.jsonl"))["train"].to_list() == ROWS[:40]


def test_the_default_adapter_needs_no_peft_config(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, ROWS, **PLAIN)
    config = trainer.model.peft_config["default"]
    assert isinstance(config, LoraConfig) and config.r == 8


@pytest.mark.parametrize("direction", [None, 5])
def test_a_direction_that_is_no_name_is_refused(direction: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`direction=.*give \"auto\", a name, or a list"):
        trainer_for(tmp_path, toy_rows(40, 1), direction=direction)


def test_a_step_size_that_is_a_flag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`step_size=True` is neither"):
        trainer_for(tmp_path, toy_rows(40, 1), step_size=True)
