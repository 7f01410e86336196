"""A prompt's walk of small steps alone: when there is one, what it moves, who judges it, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from torch import nn
from transformers import TrainerCallback

from onestep_peft import OneStepTrainer
from onestep_peft.slices import LEAST_AT_ONCE, ROWS_AT_ONCE, STEPS_AT_ONCE, number_of_slices
from onestep_peft.step import prompt_steps
from onestep_peft.tasks import TEXT_CLASSIFICATION
from tests.conftest import (
    assert_same_bits,
    bits,
    config_for,
    relative_difference,
    same_bits,
    tiny_bert,
    toy_rows,
    trainer_for,
    word_tokenizer,
)

ROWS, HELD, OTHERS = toy_rows(240, seed=1), toy_rows(60, seed=2), toy_rows(200, seed=3)
PROMPT = "prompt_encoder.default.embedding.weight"


def trainer_with(folder: Path, rows: Any = ROWS, **options: Any) -> OneStepTrainer:
    torch.manual_seed(7)  # the prompt is drawn
    config = PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    return trainer_for(folder, rows, **{"model": tiny_bert(), "peft_config": config, "search_dataset": HELD, **options})


class AtFirstPass(TrainerCallback):
    """The model as it is when the pass begins."""

    found: dict[str, torch.Tensor]
    said: list[int]

    @torch.no_grad()
    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        if not hasattr(self, "found"):
            self.found = bits(model)
            held = word_tokenizer()([row["text"] for row in HELD], padding=True, return_tensors="pt")
            self.said = model.eval()(**held).logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (LEAST_AT_ONCE - 1, {}, 1), (LEAST_AT_ONCE, {}, LEAST_AT_ONCE // ROWS_AT_ONCE), (100_000, {}, STEPS_AT_ONCE),
        (500, {"max_steps": 2}, 1), (500, {"step_size": 0.1}, 1), (500, {"direction": "kfac"}, 1),
        (500, {"slices": 9}, 9),
    ],
)  # fmt: skip
def test_auto_walks_where_rows_suffice_and_nothing_else_is_said(
    rows: int, options: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    labelled = [{"labels": 0}] * rows
    found = number_of_slices(config_for(tmp_path, **options), labelled, TEXT_CLASSIFICATION, 2, at_once=True)
    assert found == expected


def test_a_prompt_and_its_head_move_and_nothing_is_searched(tmp_path: Path) -> None:
    start = AtFirstPass()
    trainer = trainer_with(tmp_path, eval_dataset=OTHERS, callbacks=[start], guard=False)
    assert (trainer.slices, trainer.walks_at_once, trainer.state.global_step) == (120, True, 0)
    trainer.train()
    (step,) = trainer.report.steps
    assert (step["direction"], step["accepted"], step["candidates"]) == ("walk", True, [])
    assert step["step_size"] == prompt_steps.PACE_WITH_HEAD and trainer.state.global_step == 120
    assert step["loss_after"] != step["loss_before"] and step["head_refitted"] and step["last_fit"] is not None
    after = trainer.model.state_dict()
    moved = {name for name, value in start.found.items() if not same_bits(after[name], value)}
    assert PROMPT in moved and all(name == PROMPT or "modules_to_save" in name for name in moved)
    # Each entry has gone many times as far as it was long.
    size = prompt_steps.size(start.found[PROMPT])
    assert prompt_steps.size(after[PROMPT] - start.found[PROMPT]) > 10 * size
    assert "step 1: walk, step size 16" in trainer.report.summary()


def test_a_refused_walk_leaves_the_prompt_and_its_head_as_they_were(tmp_path: Path) -> None:
    start = AtFirstPass()
    trainer_with(tmp_path / "first", slices=20, callbacks=[start]).train()
    # The head is right about rows that have the labels that it gives them: no step can do better.
    held = [{**row, "label": label} for row, label in zip(HELD, start.said, strict=True)]
    start = AtFirstPass()
    trainer = trainer_with(tmp_path / "second", slices=20, search_dataset=held, callbacks=[start])
    trainer.train()
    assert [step["accepted"] for step in trainer.report.steps] == [False]
    assert not trainer.report.steps[0]["head_refitted"] and trainer.report.steps[0]["last_fit"] is None
    assert_same_bits(trainer.model, start.found)


def test_a_prompt_that_has_walked_goes_on_in_steps_of_the_same_length(tmp_path: Path) -> None:
    first = trainer_with(tmp_path / "first", guard=False)
    unit = prompt_steps.size(first.model.get_base_model().get_input_embeddings().weight)
    first.train()
    start = AtFirstPass()
    second = trainer_with(
        tmp_path / "second",
        model=first.model,
        peft_config=None,
        fit_head=False,
        guard=False,
        slices=2,
        callbacks=[start],
    )
    second.train()
    moved = second.model.state_dict()[PROMPT] - start.found[PROMPT]
    assert prompt_steps.size(start.found[PROMPT]) > 50 * unit
    assert prompt_steps.size(moved) < 2 * prompt_steps.PACE * unit  # two steps, the second half as long


def test_a_walk_of_another_kind_is_not_taken_up(tmp_path: Path) -> None:
    options: dict[str, Any] = {"slices": 6, "guard": False, "save_strategy": "steps", "save_steps": 2}
    trainer_with(tmp_path, **options).train()
    again = trainer_with(tmp_path / "again", **options, max_steps=2)
    with pytest.raises(ValueError, match="in small steps alone"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (
        again.settings_of_the_run()["directions"]
        != trainer_with(tmp_path / "other", **options).settings_of_the_run()["directions"]
    )


def test_an_error_where_it_is_judged_leaves_the_walk_as_it_was(tmp_path: Path) -> None:
    """Trainer goes on with smaller batches from there: the last slice must not count twice."""
    options: dict[str, Any] = {"slices": 6, "guard": False, "auto_find_batch_size": True}
    whole, again = trainer_with(tmp_path / "whole", **options), trainer_with(tmp_path / "again", **options)
    settle, failed = again.settle_head, []

    def failing() -> None:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        settle()

    again.settle_head = failing  # type: ignore[method-assign]
    for trainer in (whole, again):
        trainer.train()
    assert failed and relative_difference(again.model.state_dict()[PROMPT], whole.model.state_dict()[PROMPT]) < 1e-4


def test_an_error_on_the_way_leaves_everything_as_it_was(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 10:
                raise KeyboardInterrupt

    trainer = trainer_with(tmp_path, callbacks=[Stop()])
    before = bits(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_bits(trainer.model, before)


@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 1}, {"rows": ROWS[::-1]}])
def test_neither_batches_nor_order_matter(change: dict[str, Any], tmp_path: Path) -> None:
    rows = change.pop("rows", ROWS)
    options: dict[str, Any] = {"slices": 6, "refit_on_held_out": False}
    one, other = trainer_with(tmp_path / "one", **options), trainer_with(tmp_path / "other", rows, **options, **change)
    for trainer in (one, other):
        trainer.train()
    # Adam's first steps are the gradient's signs: where an entry is next to nothing, rounding tells them.
    assert relative_difference(other.model.state_dict()[PROMPT], one.model.state_dict()[PROMPT]) < 0.02


def test_no_micro_batch_is_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = trainer_with(tmp_path, [*ROWS, *OTHERS[:1]], guard=False), []
    compute = trainer.compute_loss

    def noting(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.append(inputs["labels"].tolist())
        return compute(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", noting)
    trainer.train()
    assert len(seen) == 120 and sorted(map(len, seen)) == [ROWS_AT_ONCE] * 119 + [ROWS_AT_ONCE + 1]
    assert all(min(labels) >= 0 for labels in seen)


def test_gradients_are_those_of_the_head_that_goes_along(tmp_path: Path) -> None:
    """The first step of the head is Adam's: by its own length against the sign of each entry's gradient."""
    trainer, start = trainer_with(tmp_path, slices=4), AtFirstPass()
    trainer.add_callback(start)
    heads: list[torch.Tensor] = []

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            heads.append(trainer.head_layer().weight.detach().clone())

    trainer.add_callback(AfterStep())
    trainer.train()
    (name,) = (name for name in start.found if name.endswith("modules_to_save.default.weight"))
    first = heads[0] - start.found[name]
    length = prompt_steps.HEAD_PACE * float(prompt_steps.size(start.found[name]))
    assert torch.allclose(first.abs(), torch.full_like(first, length), rtol=1e-2)
    assert not torch.equal(heads[1], heads[0])


def test_a_head_that_is_not_fitted_stays_and_the_prompt_walks(tmp_path: Path) -> None:
    start = AtFirstPass()
    trainer = trainer_with(tmp_path, slices=6, fit_head=False, guard=False, callbacks=[start])
    trainer.train()
    after = trainer.model.state_dict()
    assert [name for name, value in start.found.items() if not same_bits(after[name], value)] == [PROMPT]
    assert trainer.report.steps[0]["step_size"] == prompt_steps.PACE


def test_the_plan_says_what_it_costs(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, eval_dataset=OTHERS, guard=False)
    plan = trainer.plan()
    assert plan.at_once and plan.forwards["pass"] == 3 * 240
    # Held-out rows are looked at where it begins and where it ends.
    assert plan.forwards["search"] == 2 * 60 and plan.forwards["head"] == 2 * 240
    text = plan.text()
    assert "direction  small steps alone, by Adam; nothing is searched" in text
    assert "the rows are walked through in 120 slices, with a step after each" in text and "kfac" not in text
    seen = 0

    def count(_module: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        nonlocal seen
        seen += len(inputs["inputs_embeds"]) * (1 + 2 * torch.is_grad_enabled())

    trainer.bare_model.get_base_model().register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert seen == sum(plan.forwards.values())
