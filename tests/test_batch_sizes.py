"""How many rows go through the model at a time: what was said, else by the machine; it never tells in the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onestep_peft import OneStepTrainer
from onestep_peft import slices as slices_module
from onestep_peft.gradient import ExactGradientTrainer
from onestep_peft.slices import rows_for_a_gpu
from tests.conftest import config_for, relative_difference, tiny_bert, toy_rows, trainer_for, updates

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


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """As on a GPU for which so many rows are just enough."""
    may_grow = property(lambda self: self.args.batches_may_grow)
    monkeypatch.setattr(ExactGradientTrainer, "_may_grow", may_grow)
    monkeypatch.setattr("onestep_peft.gradient.rows_for_a_gpu", lambda tokens, parameters: rows)


def micro_batches(trainer: OneStepTrainer) -> tuple[int, int]:
    """Rows of a micro-batch, and of a batch of forwards."""
    trainer.get_train_dataloader()
    return trainer._train_batch_size, trainer.args.eval_batch_size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (STEP, (64, 64)),
        ({**STEP, "per_device_eval_batch_size": 32}, (64, 32)),
        ({**STEP, "per_device_train_batch_size": 16}, (16, 64)),
        ({**WALK, "slices": 2}, (50, 64)),  # no more than a slice has
    ],
)
def test_batches_grow_where_nothing_was_said(
    options: dict[str, Any], expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, rows=64)
    trainer = trainer_for(tmp_path, ROWS, search_dataset=HELD, fit_head=False, **options)
    assert micro_batches(trainer) == expected


def test_after_a_smaller_size_had_to_do_it_does_not_grow_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, rows=64)
    trainer = trainer_for(tmp_path, ROWS, search_dataset=HELD, fit_head=False, **STEP)
    trainer._train_batch_size = 8  # as `auto_find_batch_size` does where memory ran out
    assert micro_batches(trainer)[0] == 8


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
    on_a_gpu(monkeypatch, rows=64)
    other = change(tmp_path / "other")
    for name, update in one.items():
        assert relative_difference(other[name], update) < 2e-2, name
