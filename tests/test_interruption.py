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
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from onestep_peft import OneStepTrainer
from onestep_peft.out_of_fold import PREFIX
from onestep_peft.pass_state import FOLDER
from tests.conftest import bits, same_bits, tiny_bert, toy_rows, trainer_for, updates

ROWS = toy_rows(70, seed=1)
# Each differs in what a pass has to keep.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, two steps": {"max_steps": 2, "guard": False},
    "lora, two steps, sampled": {"max_steps": 2, "covariance_rows": 10, "guard": False},
    "lora, plain": {"direction": "sgd", "step_size": 0.1},
    "full": {"method": "full"},
    "full, two steps": {"method": "full", "max_steps": 2, "guard": False},
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
    model = options.pop("model", None) or tiny_bert(seed=options.pop("weights", 0))
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
    # 49 rows are 7 micro-batches (all 70 rows of the plain step are 9, and four sections with 12 or 13 rows 8); after
    # 5 of them, 4 are saved.
    per_pass = 9 if "plain" in kind else 8 if "sampled" in kind else 7
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
    assert not (tmp_path / "cut" / FOLDER).exists()


@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning"])
@pytest.mark.parametrize(("after", "left"), [(5 + 3, 4 + 6), (5 + 5 + 3, 4)], ids=["second slice", "last slice"])
def test_a_walk_goes_on_in_its_slice(method: str, after: int, left: int, tmp_path: Path) -> None:
    # 140 rows in three slices are 6 micro-batches each, the last of which is no substep.
    options: dict[str, Any] = {"slices": 3, "method": method, "rows": toy_rows(200, seed=1), "guard": False}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    assert [step["direction"] for step in whole.report.steps][-1:] == ["walk"]
    cut(tmp_path / "cut", after, **options)
    again, passes = resumed(tmp_path / "cut", **options)
    assert passes == left
    for name, value in bits(whole.model).items():
        assert same_bits(bits(again.model)[name], value), name
    assert json.dumps(again.report.steps) == json.dumps(whole.report.steps)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_a_walk_goes_on_from_a_checkpoint(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": method, "slices": 3, "rows": toy_rows(200, seed=1), "guard": False,
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 3 and [step["direction"] for step in again.report.steps] == ["walk"]
    for name, value in bits(whole.model).items():
        assert same_bits(bits(again.model)[name], value), name


@pytest.mark.parametrize("kind", ["lora", "lora, two steps", "full", "prompt, rows kept"])
def test_a_saved_pass_has_the_heads_of_the_folds(kind: str, tmp_path: Path) -> None:
    # From where the other rows' residuals come: without them the rest of the pass would have those of the fitted head.
    whole = trainer(tmp_path / "whole", **KINDS[kind])
    whole.train()
    second = "two steps" in kind
    cut(tmp_path / "cut", 5 + (6 if second else 0), **KINDS[kind])
    (file,) = state_of(tmp_path / "cut").glob("sums-*.safetensors")
    saved = {name: value for name, value in load_file(file).items() if name.startswith(PREFIX)}
    assert saved.keys() == {f"{PREFIX}weight", f"{PREFIX}bias", f"{PREFIX}pulls"}
    assert saved[f"{PREFIX}weight"].shape == (10 if second else 5, 2, 32)
    assert saved[f"{PREFIX}pulls"].shape == (len(whole.pass_rows), 32) and bool(saved[f"{PREFIX}pulls"].any(1).all())
    again, _ = resumed(tmp_path / "cut", **KINDS[kind])
    assert again.report.metrics["head"] == whole.report.metrics["head"]
    # The heads of the last fit, in both.
    assert all(same_bits(again.fixed_in_the_pass()[name], value) for name, value in whole.fixed_in_the_pass().items())


def test_a_state_with_other_folds_is_not_taken_up(tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    with pytest.warns(UserWarning, match="other rows, another model or other settings"):
        trainer(tmp_path / "cut", head_folds=3).train()


@pytest.mark.parametrize("chooses", [True, False], ids=["searched", "fixed, nothing held out"])
@pytest.mark.parametrize("folds", [1, 5])
def test_the_second_step_from_a_checkpoint_is_that_of_one_run(chooses: bool, folds: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head_folds": folds, "save_strategy": "steps", "save_steps": 1}
    if not chooses:
        options |= {"direction": "kfac", "step_size": 0.05, "guard": False}
    whole = trainer(tmp_path / "whole", max_steps=2, **options)
    whole.train()
    again = trainer(tmp_path / "again", max_steps=2, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, value in bits(whole.model).items():
        assert torch.allclose(bits(again.model)[name], value, atol=1e-6), name
    expected = whole.fixed_in_the_pass()
    assert again.fixed_in_the_pass().keys() == expected.keys()
    assert any(name.startswith(PREFIX) for name in expected) == (folds > 1)
    for name, value in expected.items():
        assert torch.allclose(again.fixed_in_the_pass()[name], value, rtol=1e-3, atol=1e-4), name


def state_of(folder: Path) -> Path:
    """The folder of the one state that is there."""
    (file,) = (folder / FOLDER).glob("*/state.json")
    return file.parent


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
    assert {path.name for path in (tmp_path / "killed").iterdir()} <= {FOLDER, "runs"}
    # SIGTERM saves what there is; SIGKILL leaves what was saved last.
    state = json.loads((state_of(tmp_path / "killed") / "state.json").read_text())
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
    text = (state_of(tmp_path / "cut") / "state.json").read_text()
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "change",
    [
        {"rows": toy_rows(70, seed=2)},
        {"direction": "sgd"},
        {"damping": 0.3},
        {"covariance_rows": 20},
        {"guard": False},
        {"per_device_train_batch_size": 4},
        {"eval_dataset": toy_rows(20, seed=3)},
        {"metrics": ["f1"]},
        {"peft_config": LoraConfig(r=8, lora_alpha=64)},
        {"peft_config": LoraConfig(r=4)},
        {"method": "full"},
        {"weights": 1},
    ],
    ids=str,
)
def test_a_state_of_another_run_is_not_taken_up_and_stays(change: dict[str, Any], tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    state = state_of(tmp_path / "cut")
    other = trainer(tmp_path / "cut", **change)
    with pytest.warns(UserWarning, match="other rows, another model or other settings"):
        other.train()
    fresh = trainer(tmp_path / "fresh", **change)
    fresh.train()
    for name, value in bits(fresh.model).items():
        assert same_bits(bits(other.model)[name], value), name
    # The mistaken run has cost nothing: the first one still goes on.
    assert state_of(tmp_path / "cut") == state
    _, passes = resumed(tmp_path / "cut")
    assert passes == 3


def test_an_adapter_that_has_learnt_something_else_is_not_replaced(tmp_path: Path) -> None:
    taught = trainer(tmp_path / "first")
    taught.train()
    cut(tmp_path / "cut", 5)
    other = trainer(tmp_path / "cut", model=taught.model)
    with pytest.warns(UserWarning, match="another model"):
        other.train()


def test_a_run_with_fewer_steps_does_not_go_beyond_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"body_folds": 1, "guard": False}
    cut(tmp_path / "cut", 5 + 6, max_steps=2, **options)
    shorter = trainer(tmp_path / "cut", max_steps=1, **options)
    shorter.train()
    assert len(shorter.report.steps) == shorter.state.global_step == 1


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 3)])
def test_a_pass_in_parts_is_not_taken_up_by_a_run_that_notes_others(before: int, now: int, tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5, max_steps=before)
    again = trainer(tmp_path / "cut", max_steps=now)
    with pytest.warns(UserWarning, match="other settings"):
        again.train()
    whole = trainer(tmp_path / "whole", max_steps=now)
    whole.train()
    assert json.dumps(again.report.steps) == json.dumps(whole.report.steps)


def test_files_of_the_users_own_stay(tmp_path: Path) -> None:
    own = tmp_path / "out" / FOLDER / "mine.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    trainer(tmp_path / "out").train()
    assert own.read_bytes() == b"mine"


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FOLDER).write_text("a file in the way")
    one = trainer(tmp_path / "out")
    with pytest.warns(UserWarning, match="cannot be saved"):
        one.train()
    assert one.state.global_step == len(one.report.steps) == 1


def test_a_pass_that_was_cut_short_at_its_end_only_searches(tmp_path: Path) -> None:
    class CutInTheSearch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", callbacks=[CutInTheSearch()], save_pass_batches=7).train()
    again, passes = resumed(tmp_path / "cut")
    assert passes == 0
    assert json.dumps(again.report.steps) == json.dumps(whole.report.steps)


def test_sigterm_in_a_run_from_a_checkpoint_saves_its_pass(tmp_path: Path) -> None:
    # A run of one step leaves no bodies to go on with.
    trainer(tmp_path / "out", max_steps=1, body_folds=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")

    def resume(**options: Any) -> OneStepTrainer:
        one = trainer(tmp_path / "out", max_steps=2, body_folds=1, save_pass_batches=None, **options)
        one.train(resume_from_checkpoint=checkpoint)
        return one

    with pytest.raises(SystemExit) as ended:
        resume(callbacks=[Cut(3, signal.SIGTERM)])
    assert ended.value.code == 128 + signal.SIGTERM
    again = resume()
    assert [entry["resumed_batch"] for entry in again.state.log_history if "resumed_batch" in entry] == [4]
    whole = trainer(tmp_path / "whole", max_steps=2, body_folds=1)
    whole.train()
    for name, value in bits(whole.model).items():
        assert torch.allclose(bits(again.model)[name], value, atol=1e-6), name


def test_an_interruption_leaves_the_bits_of_a_model_that_was_made_in_the_run(tmp_path: Path) -> None:
    one = trainer_for(
        tmp_path, ROWS, model_init=lambda: tiny_bert(), per_device_train_batch_size=8, search_fraction=0.3, max_steps=2,
        callbacks=[Cut(5 + 6)], save_pass_minutes=0, guard=False,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        one.train()
    assert all(not bool(update.any()) for update in updates(one.model).values())


@pytest.mark.parametrize("name", ["sums", "start"])
@pytest.mark.parametrize("how", ["cut off", "changed", "missing"])
def test_a_damaged_state_is_not_taken_up(name: str, how: str, tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    (path,) = state_of(tmp_path / "cut").glob(f"{name}-*.safetensors")
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


@pytest.mark.parametrize("text", ["{", "[]", '{"files": null}', "null"])
def test_a_state_file_that_cannot_be_read_is_not_taken_up(text: str, tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5)
    (state_of(tmp_path / "cut") / "state.json").write_text(text)
    with pytest.warns(UserWarning, match="cannot be read"):
        trainer(tmp_path / "cut").train()


def test_a_pass_can_be_left_unsaved(tmp_path: Path) -> None:
    cut(tmp_path / "cut", 5, save_pass_batches=None, save_pass_minutes=0)
    assert not (tmp_path / "cut" / FOLDER).exists()
