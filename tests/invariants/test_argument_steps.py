"""The step under each of Trainer's arguments: honoured ones do what they say, and none of them changes the update.

What counts as the same: the step of one big batch for `sgd`, the step with the defaults for `kfac`, which reads more of
the pass than gradients.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import ExportableState

from onestep_peft import OneStepTrainer, arguments
from tests import argument_values
from tests.conftest import (
    assert_same_bits,
    bits,
    config_for,
    relative_difference,
    tiny_llama,
    tokenised,
    toy_rows,
    trainer_for,
    updates,
    word_tokenizer,
)

ROWS = tokenised(toy_rows(14, seed=1))  # in batches of 4: the last is not full
EVALUATION = tokenised(toy_rows(5, seed=2))
SGD = {"direction": "sgd", "step_size": 0.1}
KFAC = {"direction": "kfac", "step_size": 0.05, "guard": False, "fit_head": False}
# Relative to `kfac`'s update, which divides by small eigenvalues; elsewhere the bits are the same.
ROUNDING = {"per_device_train_batch_size": 1e-4, "auto_find_batch_size": 1e-4, "bf16": 0.2}
# What the pass itself may feel.
FELT = [
    name
    for name, why in arguments.HONOURED.items()
    if why in (arguments.BATCHES, arguments.CHECKPOINTING, arguments.WORKERS)
    or name in ("max_steps", "bf16", "use_cache", "eval_on_start", "enable_jit_checkpoint", "full_determinism")
]


def trainer(folder: Path, *, rows: Any = ROWS, **options: Any) -> OneStepTrainer:
    return trainer_for(folder, rows, eval_dataset=EVALUATION, **{"per_device_train_batch_size": 4, **options})


def stepped(model: nn.Module, steps: int) -> dict[str, Tensor]:
    """What torch's own SGD makes of the model with all rows in one batch."""
    oracle = copy.deepcopy(model).eval()
    batch = dict(DataCollatorWithPadding(word_tokenizer())(ROWS.to_list()))
    optimizer = torch.optim.SGD([p for p in oracle.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        oracle(**batch).loss.backward()
        optimizer.step()
    return bits(oracle)


def moved(after: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(before)])


@pytest.fixture(autouse=True)
def environment_and_determinism() -> Iterator[None]:
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(before)


# What is met on the way: a callback that a case needs.


class OutOfMemoryOnce(TrainerCallback):
    raised = False

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.raised:
            self.raised = True
            raise RuntimeError("CUDA out of memory.")


class TerminatedInThePass(TrainerCallback):
    """As if SIGTERM had come, and its grace period were over."""

    def on_substep_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        (callback,) = [one for one in self.trainer.callback_handler.callbacks if hasattr(one, "jit_manager")]
        callback.jit_manager.is_checkpoint_requested = True


MET: dict[str, type[TrainerCallback]] = {
    "auto_find_batch_size": OutOfMemoryOnce,
    "enable_jit_checkpoint": TerminatedInThePass,
}


def run(folder: Path, name: str, **options: Any) -> tuple[OneStepTrainer, dict[str, Tensor]]:
    """A run, and the model before it."""
    one = trainer(folder, **options)
    if name in MET:
        callback = MET[name]()
        callback.trainer = one  # type: ignore[attr-defined]
        one.add_callback(callback)
    before = bits(one.model)
    one.train()
    return one, before


# Honoured


def evaluated_at(one: OneStepTrainer) -> list[int]:
    return [entry["step"] for entry in one.state.log_history if "eval_loss" in entry]


def checkpoints(one: OneStepTrainer) -> list[str]:
    return sorted(path.name for path in Path(one.args.output_dir).glob("checkpoint-*"))


def checkpointed(one: OneStepTrainer) -> list[Any]:
    layers = [module for module in one.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if layer.gradient_checkpointing]


def reentrant(one: OneStepTrainer) -> bool:
    return all(layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in checkpointed(one))


def loader(one: OneStepTrainer) -> Any:
    return one.get_train_dataloader()


def best_is(one: OneStepTrainer, pick: Callable[[list[float]], float], key: str) -> bool:
    return one.state.best_metric == pick([entry[key] for entry in one.state.log_history if key in entry])


# By field, whether a run shows what the field asks for.
SHOWN: dict[str, Callable[[OneStepTrainer], bool]] = {
    "max_steps": lambda one: one.state.global_step == len(one.report.steps) == 2,
    "per_device_train_batch_size": lambda one: len(loader(one)) == 5,
    "per_device_eval_batch_size": lambda one: len(one.get_eval_dataloader()) == 2,
    "auto_find_batch_size": lambda one: one._train_batch_size < 4 and len(loader(one)) > 4,
    "bf16": lambda one: one.accelerator.mixed_precision == "bf16",
    "tf32": lambda one: not torch.backends.cuda.matmul.allow_tf32,
    "activation_checkpointing": lambda one: len(checkpointed(one)) == 2,
    "activation_checkpointing_kwargs": reentrant,
    "gradient_checkpointing": lambda one: len(checkpointed(one)) == 2,
    "gradient_checkpointing_kwargs": reentrant,
    "use_cache": lambda one: one.model.config.use_cache,
    "eval_strategy": lambda one: evaluated_at(one) == [1],
    "eval_steps": lambda one: evaluated_at(one) == [2],
    "eval_delay": lambda one: evaluated_at(one) == [],
    "eval_on_start": lambda one: evaluated_at(one) == [0],
    "metric_for_best_model": lambda one: best_is(one, max, "eval_accuracy"),
    "greater_is_better": lambda one: best_is(one, max, "eval_loss"),
    "save_strategy": lambda one: checkpoints(one) == ["checkpoint-1"],
    "save_steps": lambda one: checkpoints(one) == ["checkpoint-2"],
    "save_total_limit": lambda one: checkpoints(one) == ["checkpoint-2"],
    "save_only_model": lambda one: not list(Path(one.args.output_dir).glob("checkpoint-1/optimizer*")),
    "enable_jit_checkpoint": lambda one: checkpoints(one) == ["checkpoint-0"],
    "seed": lambda one: sum_of_a(one) != default_a(),
    "full_determinism": lambda one: torch.are_deterministic_algorithms_enabled(),
    "use_cpu": lambda one: one.args.device.type == "cpu",
    "dataloader_num_workers": lambda one: loader(one).num_workers == 2,
    "dataloader_prefetch_factor": lambda one: loader(one).prefetch_factor == 3,
    "dataloader_multiprocessing_context": lambda one: loader(one).multiprocessing_context.get_start_method() == "fork",
    "dataloader_pin_memory": lambda one: not loader(one).pin_memory,
}
ELSEWHERE = {"restore_callback_states_from_checkpoint", "remove_unused_columns", "push_to_hub"}


@cache
def default_a() -> float:
    with TemporaryDirectory() as folder:
        return sum_of_a(trainer(Path(folder) / "run", **SGD))


def sum_of_a(one: OneStepTrainer) -> float:
    return float(sum(value.sum() for name, value in one.model.state_dict().items() if "lora_A" in name))


def test_every_honoured_field_is_shown() -> None:
    assert SHOWN.keys() | ELSEWHERE == arguments.HONOURED.keys()


@pytest.mark.parametrize("name", SHOWN)
def test_an_honoured_field_does_what_it_says_and_the_step_is_that_of_one_big_batch(name: str, tmp_path: Path) -> None:
    one, before = run(tmp_path / "run", name, **SGD, **argument_values.HONOURED[name])
    assert SHOWN[name](one)
    with TemporaryDirectory() as folder:
        start = trainer(Path(folder) / "start", **SGD, seed=one.args.seed).model
    assert_same_bits(start, before)
    expected = moved(stepped(start, one.args.max_steps), before)
    tolerance = 2e-2 if name == "bf16" else 2e-5
    assert relative_difference(moved(bits(one.model), before), expected) < tolerance


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without tf32")
def test_tf32_is_trainers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tf32 requires Ampere"):
        config_for(tmp_path, tf32=True)


def test_push_to_hub_is_checked_before_the_step(tmp_path: Path) -> None:
    # tests/hub pushes for real.
    with pytest.raises(ValueError, match=r"`push_to_hub=True`, but the base"):
        trainer(tmp_path, push_to_hub=True, **SGD)


def test_remove_unused_columns_decides_what_the_collator_sees(tmp_path: Path) -> None:
    seen: set[str] = set()
    collate = DataCollatorWithPadding(word_tokenizer())

    def watch(rows: list[dict[str, Any]]) -> Any:
        for row in rows:
            seen.update(row)
            row.pop("note", None)
        return collate(rows)

    noted, found = ROWS.add_column("note", list(range(len(ROWS)))), []
    for removed in (True, False):
        seen.clear()
        one = trainer(
            tmp_path / str(removed), rows=noted, data_collator=watch, remove_unused_columns=removed, **KFAC
        )  # fmt: skip
        one.train()
        assert ("note" in seen) is not removed
        found.append(one)
    assert_same_bits(found[1].model, bits(found[0].model))


class Passes(TrainerCallback, ExportableState):
    """Counts the passes, also those before a checkpoint."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.number += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"number": self.number}, "attributes": {}}


@pytest.mark.parametrize(("restored", "passes"), [(True, 2), (False, 1)])
def test_callback_states_are_restored_where_asked(restored: bool, passes: int, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **KFAC}
    whole = trainer(tmp_path / "whole", callbacks=[Passes()], **options)
    whole.train()
    options["restore_callback_states_from_checkpoint"] = restored
    resumed = trainer(tmp_path / "resumed", callbacks=[Passes()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    (callback,) = [one for one in resumed.callback_handler.callbacks if isinstance(one, Passes)]
    assert callback.number == passes
    for name, update in updates(whole.model).items():
        assert torch.allclose(updates(resumed.model)[name], update, atol=1e-4), name


def test_a_cache_and_checkpointing_leave_a_decoders_update(tmp_path: Path) -> None:
    found = []
    for i, options in enumerate(({}, {"use_cache": True}, {"use_cache": True, "activation_checkpointing": True})):
        model, tokenizer = tiny_llama(), word_tokenizer("left")
        one = trainer_for(
            tmp_path / str(i), toy_rows(14, seed=1), model=model, processing_class=tokenizer,
            peft_config=LoraConfig(r=4), **KFAC, **options,
        )  # fmt: skip
        one.train()
        found.append(one)
    for one in found[1:]:
        assert_same_bits(one.model, bits(found[0].model))


# All of them


@cache
def default_update(steps: int) -> dict[str, Tensor]:
    with TemporaryDirectory() as folder:
        one, _ = run(Path(folder) / "run", "", **KFAC, max_steps=steps)
        assert all(bool(update.any()) for name, update in updates(one.model).items() if "key" not in name)
        return bits(one.model)


def assert_default_update(one: OneStepTrainer, tolerance: float) -> None:
    expected = default_update(one.args.max_steps)
    if tolerance == 0:
        assert_same_bits(one.model, expected)
    else:
        model = copy.deepcopy(one.model)
        model.load_state_dict(expected)
        found, wanted = updates(one.model), updates(model)
        joined = [torch.cat([some[name].flatten() for name in sorted(some)]) for some in (found, wanted)]
        assert relative_difference(*joined) < tolerance


@pytest.mark.parametrize("name", FELT)
def test_an_honoured_field_leaves_the_statistics_of_the_pass(name: str, tmp_path: Path) -> None:
    one, _ = run(tmp_path / "run", name, **KFAC, **argument_values.HONOURED[name])
    assert_default_update(one, ROUNDING.get(name, 0))


@pytest.mark.parametrize("why", dict.fromkeys(arguments.HARMLESS.values()))
def test_harmless_fields_leave_every_bit_of_the_update(why: str, tmp_path: Path) -> None:
    # Those of one row of the table together; a backend needs processes, see below.
    names = [name for name, reason in arguments.HARMLESS.items() if reason == why and name != "ddp_backend"]
    options = {key: value for name in names for key, value in argument_values.HARMLESS[name].items()}
    one, _ = run(tmp_path / "run", "", **KFAC, **options)
    assert_default_update(one, 0)


def test_ignored_fields_leave_every_bit_of_the_update(tmp_path: Path) -> None:
    # One by one they leave the config as it is by default, see tests/test_arguments.py.
    options = {key: value for one in argument_values.IGNORED.values() for key, value in one.items()}
    with pytest.warns(UserWarning, match="one step has no use"):
        one, _ = run(tmp_path / "run", "", **KFAC, **options)
    assert_default_update(one, 0)


def test_two_processes_make_the_same_step_whatever_says_how_they_talk(tmp_path: Path) -> None:
    script = Path(__file__).with_name("argument_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["fields"]) >= {name for name in arguments.HARMLESS if name.startswith("ddp_")}
    assert found["difference"] < 1e-6
