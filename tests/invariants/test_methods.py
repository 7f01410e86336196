"""The same invariances for every method and every direction that it can write.

Compared is what a fixed step has changed, parameter by parameter (for LoRA the products B · A).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor

from onestep_peft import OneStepTrainer
from onestep_peft.methods import METHODS
from tests.conftest import tiny_bert, tiny_llama, tokenised, toy_rows, trainer_for, updates, word_tokenizer
from tests.invariants.test_invariants import padded

ROWS = toy_rows(110, seed=1)
MODELS: dict[str, tuple[Any, str]] = {"bert": (tiny_bert, "right"), "llama": (tiny_llama, "left")}
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(r=8, lora_alpha=16),
    "full": None,
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=4),
}
# Each names what may differ from batches of 32 rows in their own order.
CHANGES: dict[str, dict[str, Any]] = {
    "batches of 3": {"per_device_train_batch_size": 3},
    "shuffled rows in batches of 7": {"shuffled": True, "per_device_train_batch_size": 7},
    "padding to 40 tokens": {"pad_to": 40},
    "activation checkpointing": {"gradient_checkpointing": True},
}
# A decoder that reads its class from a row's last token takes no prompt: it is refused by name.
CASES = [("bert", method, direction) for method, one in METHODS.items() for direction in one.directions]
CASES += [("llama", method, direction) for method in ("lora", "full") for direction in ("sgd", "kfac", "kfac_muon")]


def run(folder: Path, kind: str, method: str, direction: str, **change: Any) -> dict[str, Tensor]:
    """What a run has changed, by name."""
    make, side = MODELS[kind]
    rows, tokenizer = list(ROWS), word_tokenizer(side)
    if change.pop("shuffled", False):
        random.Random(3).shuffle(rows)
    pad_to = change.pop("pad_to", None)
    model = make()
    torch.manual_seed(7)  # PEFT draws A at random
    trainer = trainer_for(
        folder,
        padded(tokenised(rows, tokenizer), pad_to, side) if pad_to else rows,
        model=model,
        processing_class=tokenizer,
        peft_config=ADAPTERS[method],
        method=method,
        direction=direction,
        step_size=0.05,
        guard=False,
        fit_head=False,
        **{"per_device_train_batch_size": 32, **change},
    )
    before = trainable(trainer)
    trainer.train()
    found = {name: after - before[name] for name, after in trainable(trainer).items()}
    if method == "lora" and direction not in ("sgd", "sign"):
        found = updates(trainer.model)
    # A key's bias adds the same to all scores of a query, and softmax takes it away: its gradient is rounding alone.
    return {name: change for name, change in found.items() if bool(change.any()) and not name.endswith("key.bias")}


def trainable(trainer: OneStepTrainer) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "method", "direction"), CASES)
def test_the_update_is_the_same_however_the_rows_come(kind: str, method: str, direction: str, tmp_path: Path) -> None:
    reference = run(tmp_path / "reference", kind, method, direction)
    assert len(reference) >= (1 if method == "prompt_tuning" else 10)
    for name, change in CHANGES.items():
        found = run(tmp_path / name, kind, method, direction, **change)
        assert found.keys() == reference.keys(), name
        for parameter, expected in reference.items():
            assert_same(found[parameter], expected, direction, f"{name}: {parameter}")


def assert_same(found: Tensor, expected: Tensor, direction: str, what: str) -> None:
    off = (found - expected).abs()
    if direction == "sign":
        # Where a gradient is as small as its rounding its sign is open; that is so for few.
        assert float((off > 1e-3 * expected.abs().max()).double().mean()) < 0.02, what
    else:
        # A polar factor lifts small singular pairs, and their rounding, to the size of the large ones.
        tolerance = 2e-3 if "muon" in direction or "schatten" in direction else 3e-4
        assert float(off.norm() / expected.norm()) < tolerance, (what, float(off.norm() / expected.norm()))
