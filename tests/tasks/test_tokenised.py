"""Tokenised rows with a label a token: the same update whatever the batches, exact losses, bad rows refused."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from onestep_peft import OneStepTrainer
from tests.conftest import relative_difference, trainer_for, updates, word_tokenizer
from tests.tasks.small import TAGS, counting_texts, tagged_rows, tiny_causal_llama, tiny_gpt2, tiny_tagger

UPDATE = 1e-4


def tagged(number: int, seed: int) -> list[dict[str, Any]]:
    tokenizer, rows = word_tokenizer(), []
    for row in tagged_rows(number, seed):
        ids = tokenizer(" ".join(row["tokens"]))["input_ids"]
        rows.append({"input_ids": ids, "labels": [-100, *(TAGS.index(tag) for tag in row["ner_tags"]), -100]})
    return rows


def texts(number: int, seed: int) -> list[dict[str, Any]]:
    """Every third row has its first half unlabelled, as a prompt."""
    rows = []
    for i, row in enumerate(counting_texts(number, seed)):
        ids = word_tokenizer()(row["text"])["input_ids"]
        prompt = len(ids) // 2 if i % 3 == 0 else 0
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


MODELS = {"tokens": (tiny_tagger, tagged), "llama": (tiny_causal_llama, texts), "gpt2": (tiny_gpt2, texts)}


@pytest.fixture(params=MODELS, ids=MODELS.keys())
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return MODELS[request.param]


def trained(folder: Path, model: PreTrainedModel, rows: Any, **options: Any) -> OneStepTrainer:
    trainer = trainer_for(folder, Dataset.from_list(rows), model=model, **options)
    trainer.train()
    return trainer


FIXED = {"direction": "kfac", "step_size": 0.05, "guard": False, "fit_head": False}


@pytest.mark.parametrize("direction", ["kfac", "sgd"])
def test_the_update_does_not_depend_on_batches_or_order(kind: tuple[Any, Any], direction: str, tmp_path: Path) -> None:
    make, rows_of = kind
    rows = rows_of(30, 1)
    shuffled = random.Random(3).sample(rows, len(rows))
    options = {**FIXED, "direction": direction}
    one = trained(tmp_path / "a", make(), rows, per_device_train_batch_size=30, **options)
    many = trained(tmp_path / "b", make(), shuffled, per_device_train_batch_size=4, **options)
    left = word_tokenizer("left")  # padding before the rows would move their positions
    other = trained(tmp_path / "c", make(), rows, per_device_train_batch_size=7, processing_class=left, **options)
    expected = updates(one.model)
    for trainer in (many, other):
        for name, update in updates(trainer.model).items():
            assert relative_difference(update, expected[name]) < UPDATE, name
    assert other.processing_class.padding_side == "left"


@pytest.mark.parametrize("direction", ["natural", "sgd"])
def test_the_update_of_a_prompt_does_not_depend_on_batches_or_order(
    kind: tuple[Any, Any], direction: str, tmp_path: Path
) -> None:
    make, rows_of = kind
    rows = rows_of(30, 1)
    options = {**FIXED, "direction": direction, "method": "prompt_tuning"}
    moved = []
    for i, (some, size) in enumerate([(rows, 30), (random.Random(3).sample(rows, len(rows)), 4)]):
        trainer = trainer_for(
            tmp_path / str(i), Dataset.from_list(some), model=make(), per_device_train_batch_size=size, **options
        )
        weight = trainer.model.prompt_encoder["default"].embedding.weight
        before = weight.detach().clone()
        trainer.train()
        moved.append(weight.detach() - before)
    assert relative_difference(moved[1], moved[0]) < UPDATE


def test_the_gradient_is_that_of_the_models_own_loss_in_one_batch(kind: tuple[Any, Any], tmp_path: Path) -> None:
    make, rows_of = kind
    rows = rows_of(13, 2)
    trainer = trained(
        tmp_path, make(), rows, direction="sgd", step_size=1.0, per_device_train_batch_size=3, method="full"
    )
    model = make().eval()
    batch = trainer.data_collator([dict(row) for row in rows])
    model(**batch).loss.backward()
    with torch.no_grad():
        for (name, after), before in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
            expected = before - before.grad
            assert torch.allclose(after, expected, atol=1e-5), name


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_evaluation_loss_is_the_mean_over_all_items(kind: tuple[Any, Any], batch_size: int, tmp_path: Path) -> None:
    make, rows_of = kind
    rows = Dataset.from_list(rows_of(20, 5))
    trainer = trainer_for(
        tmp_path, Dataset.from_list(rows_of(20, 4)), model=make(), eval_dataset=rows,
        per_device_eval_batch_size=batch_size, **FIXED,
    )  # fmt: skip
    found = trainer.evaluate()
    losses, items = 0.0, 0.0
    for row in rows:
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        with torch.no_grad():
            loss = float(trainer.model.eval()(**batch).loss)
        number = float(trainer.task.row_items(batch["labels"])[0])
        losses, items = losses + number * loss, items + number
    assert found["eval_loss"] == pytest.approx(losses / items, rel=1e-5)
    if trainer.task.name == "text-generation":
        assert found["eval_perplexity"] == pytest.approx(math.exp(losses / items), rel=1e-5)


def test_rows_of_text_generation_need_no_labels(tmp_path: Path) -> None:
    ids = [row["input_ids"] for row in texts(20, 1)]
    bare = Dataset.from_dict({"input_ids": ids})
    named = Dataset.from_dict({"input_ids": ids, "labels": ids})
    one, two = (trained(tmp_path / n, tiny_gpt2(), rows.to_list(), **FIXED) for n, rows in (("a", bare), ("b", named)))
    for update, expected in zip(updates(one.model).values(), updates(two.model).values(), strict=True):
        assert torch.equal(update, expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "row 1: 2 labels for 3 tokens"),
        ([0, 1, 9], "row 1: label 9 is out of range: the model has 5 classes, 0 to 4"),
        (None, "row 1: `labels` is None; token classification takes one label a token"),
    ],
)
def test_bad_labels_name_the_row(labels: Any, message: str, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 5, 3]] * 3, "labels": [[0, 1, 0], labels, [0, 1, 0]]})
    with pytest.raises(ValueError, match=f"train_dataset, {message}"):
        trainer_for(tmp_path, rows, model=tiny_tagger(), **FIXED)


def test_rows_that_nothing_can_pad_are_refused(tmp_path: Path) -> None:
    from tests.conftest import config_for

    with pytest.raises(ValueError, match="Rows of 3 to 4 tokens must be padded.*processing_class="):
        OneStepTrainer(
            model=tiny_gpt2(), args=config_for(tmp_path, **FIXED),
            train_dataset=Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 5, 6, 3]]}),
        )  # fmt: skip


def test_rows_without_any_labelled_item_are_left_out(kind: tuple[Any, Any], tmp_path: Path) -> None:
    make, rows_of = kind
    rows = rows_of(12, 1)
    empty = [{**row, "labels": [-100] * len(row["labels"])} for row in rows_of(5, 9)]
    trainer = trainer_for(tmp_path, Dataset.from_list([*empty, *rows]), model=make(), **FIXED)
    assert sorted(trainer.pass_rows) == list(range(5, 17))
    with pytest.raises(ValueError, match="No row of train_dataset has a label"):
        trainer_for(tmp_path, Dataset.from_list(empty), model=make(), **FIXED)
