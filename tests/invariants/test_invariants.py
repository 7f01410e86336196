"""What must not change the update: micro-batches, the order of rows, padding, dropout, activation checkpointing.

Compared is ΔW = scaling · B · A of every layer; the factors themselves are free up to a rotation.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn

from onestep_peft import OneStepTrainer
from tests.conftest import (
    relative_difference,
    tiny_bert,
    tiny_llama,
    tokenised,
    toy_rows,
    trainer_for,
    updates,
    word_tokenizer,
)

ROWS = toy_rows(150, seed=1)
# Each names what may differ from batches of 32 rows in their own order.
CHANGES: dict[str, dict[str, Any]] = {
    "batches of 3": {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3},
    "batches of 8": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 7},
    "shuffled rows": {"shuffled": True},
    "shuffled rows in batches of 7": {"shuffled": True, "per_device_train_batch_size": 7},
    "padding to 40 tokens": {"pad_to": 40},
}
MODELS = {"bert": (tiny_bert, "right"), "llama": (tiny_llama, "left")}


def run(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS, **options: Any) -> OneStepTrainer:
    """A whole run; the same seeds for the model and its adapter every time."""
    make, side = MODELS[kind]
    side = options.pop("side", side)
    rows = list(rows)
    if options.pop("shuffled", False):
        random.Random(3).shuffle(rows)
    tokenizer = word_tokenizer(side)
    pad_to = options.pop("pad_to", None)
    data = padded(tokenised(rows, tokenizer), pad_to, side) if pad_to else rows
    model = make(**options.pop("model", {}))
    torch.manual_seed(7)  # PEFT draws A at random
    trainer = trainer_for(
        folder,
        data,
        model=model,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16),
        **{"per_device_train_batch_size": 32, **options},
    )
    trainer.train()
    return trainer


def padded(rows: Dataset, length: int, side: str) -> Dataset:
    """The rows with padding in the data itself, so that no batch can be shorter."""

    def pad(values: list[int]) -> list[int]:
        filler = [0] * (length - len(values))
        return filler + values if side == "left" else values + filler

    columns = {name: [pad(values) for values in rows[name]] for name in rows.column_names if name != "labels"}
    return Dataset.from_dict({**columns, "labels": rows["labels"]})


def trainable(trainer: OneStepTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_updates(one: OneStepTrainer, other: OneStepTrainer, tolerance: float = 1e-4) -> None:
    first, second = updates(one.model), updates(other.model)
    assert first.keys() == second.keys()
    # A layer with no gradient but rounding (it is dropped) has no update in either run.
    assert {name for name in first if bool(first[name].any())} == {name for name in second if bool(second[name].any())}
    moved = [name for name in first if bool(first[name].any())]
    assert len(moved) >= 10
    worst = max((relative_difference(second[name], first[name]), name) for name in moved)
    assert worst[0] < tolerance, worst


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("direction", ["kfac", "kfac_schatten", "kfac_muon"])
def test_a_fixed_step_is_the_same_however_the_rows_come(kind: str, direction: str, tmp_path: Path) -> None:
    options = {"direction": direction, "step_size": 0.05, "guard": False}
    # The other rules lift the last singular pairs that the rank holds; where the next ones are as large, rounding turns
    # them into one another.
    tolerance = 1e-4 if direction == "kfac" else 3e-4
    reference = run(tmp_path / "reference", kind, **options)
    for name, change in CHANGES.items():
        # Padding inside the data changes the rows' lengths, and nothing is held out here that would depend on it.
        assert_same_updates(reference, run(tmp_path / name, kind, **options, **change), tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_heads_of_the_folds_are_the_same_however_the_rows_come(side: str, tmp_path: Path) -> None:
    # A decoder reads a row's last token on either side of the padding.
    options = {"direction": "kfac", "step_size": 0.05, "guard": False, "head_folds": 5}
    reference = run(tmp_path / "reference", "llama", **options)
    changes = {**CHANGES, "batches of 7": {"per_device_train_batch_size": 7}}
    for name, change in changes.items():
        found = run(tmp_path / name, "llama", **options, **change, side=side)
        assert found._fold_heads is not None and reference._fold_heads is not None
        assert found._fold_heads.weight.shape == (5, 2, 32)
        assert relative_difference(found._fold_heads.weight, reference._fold_heads.weight) < 1e-4
        assert_same_updates(reference, found)
    whole = run(tmp_path / "whole", "llama", **{**options, "head_folds": 1})
    worst = max(
        relative_difference(update, updates(reference.model)[name]) for name, update in updates(whole.model).items()
    )
    assert worst > 0.1  # the folds do something


@pytest.mark.parametrize("kind", MODELS)
def test_a_plain_sgd_step_is_the_same_however_the_rows_come(kind: str, tmp_path: Path) -> None:
    options = {"direction": "sgd", "step_size": 0.1}
    reference = trainable(run(tmp_path / "reference", kind, **options))
    for name, change in CHANGES.items():
        found = trainable(run(tmp_path / name, kind, **options, **change))
        for key in reference:
            assert torch.allclose(found[key], reference[key], rtol=1e-4, atol=1e-6), (name, key)


@pytest.mark.parametrize("kind", MODELS)
def test_a_searched_step_has_the_same_direction_and_step_size_within_a_percent(kind: str, tmp_path: Path) -> None:
    reference = run(tmp_path / "reference", kind, search_fraction=0.3)
    (first,) = reference.report.steps
    for name in ("batches of 3", "shuffled rows in batches of 7"):
        (step,) = run(tmp_path / name, kind, search_fraction=0.3, **CHANGES[name]).report.steps
        assert step["direction"] == first["direction"]
        assert step["step_size"] == pytest.approx(first["step_size"], rel=0.01)
        assert step["loss_before"] == pytest.approx(first["loss_before"], rel=1e-4)
        assert step["accepted"] == first["accepted"]


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        ("bert", {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4, "classifier_dropout": 0.4}),
        ("llama", {"attention_dropout": 0.4}),
    ],
)
def test_dropout_changes_nothing(kind: str, dropout: dict[str, float], tmp_path: Path) -> None:
    options = {"direction": "kfac", "step_size": 0.05, "guard": False}
    off = dict.fromkeys(dropout, 0.0)
    without = run(tmp_path / "without", kind, **options, model=off)
    assert_same_updates(without, run(tmp_path / "with", kind, **options, model=dropout), tolerance=1e-6)


def test_the_adapters_own_dropout_changes_nothing(tmp_path: Path) -> None:
    found = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(7)
        model = tiny_bert()
        torch.manual_seed(7)
        trainer = trainer_for(
            tmp_path / str(dropout), ROWS, model=model, peft_config=LoraConfig(r=8, lora_dropout=dropout),
            direction="kfac", step_size=0.05, guard=False,
        )  # fmt: skip
        trainer.train()
        found.append(trainer)
    assert_same_updates(*found, tolerance=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("direction", ["kfac", "sgd"])
def test_activation_checkpointing_changes_nothing(kind: str, direction: str, tmp_path: Path) -> None:
    options = {"direction": direction, "step_size": 0.05, "guard": False}
    dropout = {"model": {"hidden_dropout_prob": 0.4}} if kind == "bert" else {"model": {"attention_dropout": 0.4}}
    off = run(tmp_path / "off", kind, **options, **dropout)
    on = run(tmp_path / "on", kind, **options, **dropout, gradient_checkpointing=True)
    assert on.model.get_base_model().is_gradient_checkpointing
    if direction == "kfac":
        assert_same_updates(off, on)
    for (name, one), other in zip(trainable(off).items(), trainable(on).values(), strict=True):
        if direction == "sgd":
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("kind", MODELS)
def test_activation_checkpointing_is_at_work(kind: str, tmp_path: Path) -> None:
    # Each layer runs forward twice a micro-batch. In evaluation mode transformers would leave it out silently.
    calls = []
    for checkpointing in (False, True):
        trainer = trainer_for(
            tmp_path / str(checkpointing), ROWS[:40], model=MODELS[kind][0](), direction="sgd", step_size=0.1,
            gradient_checkpointing=checkpointing, per_device_train_batch_size=8,
        )  # fmt: skip
        count = 0

        def hook(*_: object) -> None:
            nonlocal count
            count += 1

        name = {"bert": "layer.0.attention.self.query", "llama": "layers.0.self_attn.q_proj"}[kind]
        (layer,) = [module for path, module in trainer.model.named_modules() if path.endswith(name)]
        layer.register_forward_pre_hook(hook)
        trainer.train()
        calls.append(count)
    assert calls == [5, 10]


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_autograds_on_one_big_batch(kind: str, tmp_path: Path) -> None:
    rows = toy_rows(35, seed=1)  # 35 = 4 · 8 + 3: an uneven tail
    make, side = MODELS[kind]
    tokenizer = word_tokenizer(side)
    trainer = trainer_for(
        tmp_path, rows, model=make(), processing_class=tokenizer, direction="sgd", step_size=0.5,
        per_device_train_batch_size=8,
    )  # fmt: skip
    oracle = trainer.model.eval()
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    logits = oracle(**batch).logits
    loss = nn.functional.cross_entropy(logits, torch.tensor([row["label"] for row in rows]))
    names = [name for name, p in oracle.named_parameters() if p.requires_grad]
    parameters = [p for p in oracle.parameters() if p.requires_grad]
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    start = trainable(trainer)
    output = trainer.train()
    assert output.training_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 10
    for name, moved in trainable(trainer).items():
        assert torch.allclose(moved, start[name] - 0.5 * gradients[name], atol=1e-6), name
