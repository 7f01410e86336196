"""A run that is cut short inside its pass: the next one goes on there, and makes the same update to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from transformers import TrainerCallback

from onestep_peft import OneStepTrainer
from tests.conftest import bits, same_bits, tiny_bert, toy_rows, trainer_for

ROWS = toy_rows(70, seed=1)
# Each differs in what a pass has to keep.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, two steps": {"max_steps": 2},
    "lora, plain": {"direction": "sgd", "step_size": 0.1},
    "full": {"method": "full"},
    "full, bf16 weights": {"method": "full", "direction": ["sgd", "muon"], "bf16_weights": True},
    "prompt, rows kept": {"method": "prompt_tuning", "direction": "natural"},
    "prompt, Gram matrix": {"direction": "natural", "peft_config": PromptTuningConfig(num_virtual_tokens=1)},
}


class Cut(TrainerCallback):
    """Ends the process, or the call, after so many micro-batches."""

    def __init__(self, after: int, how: signal.Signals | None = None) -> None:
        self.left, self.how = after, how

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            if self.how is None:
                raise KeyboardInterrupt
            signal.raise_signal(self.how)


class Counter(TrainerCallback):
    """Counts the backward passes through the first layer."""

    def __init__(self, trainer: OneStepTrainer) -> None:
        self.passes = 0
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layer.0"))
        layer.register_full_backward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1


def trainer(folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> OneStepTrainer:
    model = tiny_bert()
    if options.pop("bf16_weights", False):
        model = model.to(torch.bfloat16)
    torch.manual_seed(7)
    fixed = {"per_device_train_batch_size": 8, "search_fraction": 0.3, "save_pass_batches": 2}
    return trainer_for(folder, rows, model=model, **{**fixed, **options})


def cut(folder: Path, after: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[Cut(after)], **options).train()


def resumed(folder: Path, **options: Any) -> tuple[OneStepTrainer, int]:
    """A whole run in a folder, and how many micro-batches it sent backward."""
    again = trainer(folder, **options)
    counter = Counter(again)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*non-full backward hook|.*Full backward hook")
        again.train()
    return again, counter.passes


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_makes_the_same_update(kind: str, tmp_path: Path) -> None:
    options = KINDS[kind]
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    # 49 rows are 7 micro-batches (all 70 rows of the plain step are 9); after 5 of them, 4 are saved.
    per_pass = 9 if "plain" in kind else 7
    after = 5 + (per_pass - 1 if "two steps" in kind else 0)  # the last micro-batch is no substep
    cut(tmp_path / "cut", after, **options)
    again, passes = resumed(tmp_path / "cut", **options)
    assert passes == per_pass - 4
    for name, value in bits(whole.model).items():
        assert same_bits(bits(again.model)[name], value), name
    assert json.dumps(again.report.steps) == json.dumps(whole.report.steps)  # NaN does not equal itself
    assert again.report.metrics == whole.report.metrics
    assert again.report.class_recall == whole.report.class_recall
    assert again.state.global_step == whole.state.global_step
    assert not (tmp_path / "cut" / "pass").exists()


def run_in_a_process(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    """A run that saves its adapter, cut short by a signal after 5 micro-batches."""
    script = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from tests.test_interruption import Cut, trainer\n"
        "folder, how = Path(sys.argv[1]), sys.argv[2]\n"
        "cut = [Cut(5, getattr(signal, how))] if how else []\n"
        "one = trainer(folder, callbacks=cut, save_pass_batches=4)\n"
        "one.train()\n"
        "one.save_model()\n"
    )
    command = [sys.executable, "-c", script, str(folder), how]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(("how", "status"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 128 + signal.SIGTERM)])
def test_a_killed_process_leaves_no_half_of_a_folder_and_its_pass_goes_on(
    how: str, status: int, tmp_path: Path
) -> None:
    ended = run_in_a_process(tmp_path / "killed", how)
    assert ended.returncode == status, ended.stderr
    assert {path.name for path in (tmp_path / "killed").iterdir()} <= {"pass", "runs"}
    # SIGTERM saves what there is; SIGKILL leaves what was saved last.
    state = json.loads((tmp_path / "killed" / "pass" / "state.json").read_text())
    assert state["batches"] == (6 if how == "SIGTERM" else 4)
    again = run_in_a_process(tmp_path / "killed", "")
    assert again.returncode == 0, again.stderr
    assert f"'resumed_batch': {state['batches']}" in again.stdout
    whole = run_in_a_process(tmp_path / "whole", "")
    assert whole.returncode == 0, whole.stderr
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_of_this_machine_is_in_a_saved_state(tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    text = (tmp_path / "cut" / "pass" / "state.json").read_text()
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": toy_rows(70, seed=2)}, "other rows, another model or other settings"),
        ({"direction": "sgd"}, "other rows, another model or other settings"),
        ({"per_device_train_batch_size": 4}, "other rows, another model or other settings"),
    ],
)
def test_a_state_of_another_run_is_not_taken_up(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    other = trainer(tmp_path / "cut", **change)
    with pytest.warns(UserWarning, match=said):
        other.train()
    fresh = trainer(tmp_path / "fresh", **change)
    fresh.train()
    for name, value in bits(fresh.model).items():
        assert same_bits(bits(other.model)[name], value), name


def test_a_state_of_another_model_is_not_taken_up(tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    other = trainer_for(
        tmp_path / "cut", ROWS, model=tiny_bert(seed=1), per_device_train_batch_size=8, search_fraction=0.3
    )
    with pytest.warns(UserWarning, match="another model"):
        other.train()


@pytest.mark.parametrize("name", ["sums", "start"])
@pytest.mark.parametrize("how", ["cut off", "changed", "missing"])
def test_a_damaged_state_is_not_taken_up(name: str, how: str, tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    (path,) = (tmp_path / "cut" / "pass").glob(f"{name}-*.safetensors")
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "changed":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-8])
    with pytest.warns(UserWarning, match=f"{path.name} is missing or damaged"):
        trainer(tmp_path / "cut").train()


def test_a_state_file_that_cannot_be_read_is_not_taken_up(tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    (tmp_path / "cut" / "pass" / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        trainer(tmp_path / "cut").train()


def test_a_pass_can_be_left_unsaved(tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5, save_pass_batches=None, save_pass_minutes=0)
    assert not (tmp_path / "cut" / "pass").exists()
