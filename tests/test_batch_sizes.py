"""How many rows go through the model at a time: what was said, else by the machine; it never tells in the result."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from onestep_peft import OneStepTrainer, batch_sizes
from onestep_peft import slices as slices_module
from onestep_peft.batch_sizes import rows_for_a_gpu
from onestep_peft.gradient import ExactGradientTrainer
from tests.conftest import (
    config_for,
    relative_difference,
    tiny_bert,
    tokenised,
    toy_rows,
    trainer_for,
    updates,
    word_tokenizer,
)

BOTH = {"per_device_train_batch_size", "per_device_eval_batch_size"}
ROWS, HELD = toy_rows(100, seed=1), toy_rows(40, seed=2)
WALK: dict[str, Any] = {"slices": 3, "guard": False}
STEP: dict[str, Any] = {"direction": "kfac", "step_size": 0.01, "guard": False}


@pytest.mark.parametrize(("given", "train", "evaluation", "grows"), [(None, 16, 32, BOTH), (7, 7, 7, set())])
def test_what_is_not_said_may_grow(
    given: int | None, train: int, evaluation: int, grows: set[str], tmp_path: Path
) -> None:
    config = config_for(tmp_path, **({} if given is None else dict.fromkeys(BOTH, given)))
    assert (config.per_device_train_batch_size, config.per_device_eval_batch_size) == (train, evaluation)
    assert config.batches_may_grow == grows


@pytest.mark.parametrize("name", sorted(BOTH))
def test_a_size_below_zero_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{name}=-1` must be at least 0; the default is 0"):
        config_for(tmp_path, **{name: -1})


def test_a_gpu_gets_fewer_rows_of_a_larger_model_and_of_longer_ones() -> None:
    assert rows_for_a_gpu(40, 22_700_000) == 220
    assert rows_for_a_gpu(512, 22_700_000) == 17
    assert rows_for_a_gpu(40, 7_000_000_000) == 0  # and so what is usual stays


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int) -> None:
    """As on a GPU for which so many rows of so many tokens are just enough."""
    monkeypatch.setattr(ExactGradientTrainer, "on_gpu", True)
    with tempfile.TemporaryDirectory() as folder:
        model = trainer_for(Path(folder), ROWS, search_dataset=HELD, **STEP).bare_model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(batch_sizes, "WORK_FOR_A_GPU", rows * tokens * parameters)


class Sizes(TrainerCallback):
    """Notes how many rows go through the model at a time while a run is under way."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: set[tuple[int, int]] = set()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.add((self.trainer._train_batch_size, self.trainer.args.eval_batch_size))


def sizes(folder: Path, **options: Any) -> tuple[int, int]:
    """Rows of a micro-batch, and of a batch of forwards."""
    note = Sizes()
    trainer = trainer_for(folder, ROWS, search_dataset=HELD, fit_head=False, callbacks=[note], **options)
    usual = trainer.args.eval_batch_size
    note.trainer = trainer
    trainer.train()
    assert trainer.args.eval_batch_size == usual  # it is that of this run
    (found,) = note.seen
    return found


TOKENS = max(len(row["input_ids"]) for row in tokenised(ROWS + HELD))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (STEP, (64, 64)),
        ({**STEP, "per_device_eval_batch_size": 32}, (64, 32)),
        ({**STEP, "per_device_train_batch_size": 16}, (16, 64)),
        ({**STEP, "save_pass_batches": 2}, (16, 64)),  # whoever counts micro-batches knows them
        ({**WALK, "slices": 2}, (50, 64)),  # no more than a slice has
        ({**WALK, "max_steps": 2, "slices": 1}, (16, 64)),  # in two parts, each of which is filled up
    ],
)
def test_batches_grow_where_nothing_was_said(
    options: dict[str, Any], expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, 64, TOKENS)
    assert sizes(tmp_path, **options) == expected


def test_forwards_are_as_large_as_the_longest_row_of_any_set_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [{"text": " ".join(["w3"] * (2 * TOKENS - 2)), "label": 1}]
    assert len(tokenised(long)[0]["input_ids"]) == 2 * TOKENS
    on_a_gpu(monkeypatch, 100, TOKENS)
    assert sizes(tmp_path, **STEP, eval_dataset=long) == (100, 50)


def test_a_size_that_was_set_later_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 64, TOKENS)
    config = config_for(tmp_path, **STEP, fit_head=False)
    config.per_device_train_batch_size = config.per_device_eval_batch_size = 4
    rows, held = Dataset.from_list(ROWS), Dataset.from_list(HELD)
    trainer = OneStepTrainer(
        tiny_bert(), config, train_dataset=rows, search_dataset=held, processing_class=word_tokenizer()
    )
    trainer.get_train_dataloader()
    with trainer.larger_forwards([trainer.train_dataset]):
        assert (trainer._train_batch_size, trainer.args.eval_batch_size) == (4, 4)


def test_after_a_smaller_size_had_to_do_it_does_not_grow_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 64, TOKENS)
    trainer = trainer_for(tmp_path, ROWS, search_dataset=HELD, fit_head=False, **STEP)
    trainer._train_batch_size = 8  # as `auto_find_batch_size` does where memory ran out
    trainer.get_train_dataloader()
    assert trainer._train_batch_size == 8


@pytest.mark.parametrize("options", [{**WALK, "slices": 6}, STEP])
def test_the_result_is_the_same(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Half as fast: these few rows are soon known by heart, and then steps of a given length follow the rounding.
    monkeypatch.setattr(slices_module, "PACE", 0.025)

    def change(folder: Path) -> dict[str, Any]:
        torch.manual_seed(7)
        rows, held = toy_rows(400, 1), toy_rows(100, 2)
        trainer = trainer_for(folder, rows, model=tiny_bert(), search_dataset=held, fit_head=False, **options)
        trainer.train()
        return updates(trainer.model)

    one = change(tmp_path / "one")
    on_a_gpu(monkeypatch, 64, TOKENS)
    other = change(tmp_path / "other")
    for name, update in one.items():
        assert relative_difference(other[name], update) < 2e-2, name
