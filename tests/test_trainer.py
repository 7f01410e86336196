"""OneStepTrainer end to end on a small BERT and rows that can be learnt."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from sklearn.metrics import accuracy_score
from torch import nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from onestep_peft import OneStepTrainer
from onestep_peft.gradient import without_dropout
from onestep_peft.held_out import carve, split_rows
from onestep_peft.methods import lora
from onestep_peft.tasks import TEXT_CLASSIFICATION
from tests.conftest import (
    assert_same_bits,
    bits,
    config_for,
    same_bits,
    tiny_bert,
    tokenised,
    toy_rows,
    trainer_for,
    updates,
    word_tokenizer,
)

TRAIN = toy_rows(600, seed=1)
TEST = toy_rows(200, seed=2)
PLAIN = {"direction": "sgd", "step_size": 0.1}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> OneStepTrainer:
    """One whole run with the defaults; tests only read it."""
    torch.set_num_threads(1)
    trainer = trainer_for(tmp_path_factory.mktemp("learnt"), TRAIN, eval_dataset=TEST, search_fraction=0.2)
    trainer.train()
    return trainer


def logits_one_by_one(model: nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Row by row, so without padding."""
    tokenizer = word_tokenizer()
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])


def labels_of(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([row["label"] for row in rows])


# A step that helps


def test_a_step_on_rows_that_can_be_learnt_is_accepted_and_lowers_the_loss(learnt: OneStepTrainer) -> None:
    (step,) = learnt.report.steps
    assert step["accepted"]
    assert step["loss_after"] < 0.8 * step["loss_before"]
    # On rows that chose nothing.
    metrics = learnt.report.metrics
    assert metrics["after"]["loss"] < 0.85 * metrics["head"]["loss"]
    assert metrics["after"]["accuracy"] > metrics["head"]["accuracy"] > metrics["base"]["accuracy"]


def test_the_reported_scores_are_the_models(learnt: OneStepTrainer) -> None:
    logits, labels = logits_one_by_one(learnt.model, TEST), labels_of(TEST)
    after = learnt.report.metrics["after"]
    assert after["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert after["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    base = logits_one_by_one(tiny_bert(), TEST)
    assert learnt.report.metrics["base"]["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(base, labels)), rel=1e-4
    )


def test_the_table_has_a_line_for_each_stage(learnt: OneStepTrainer) -> None:
    lines = learnt.report.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["base", "head", "after", "recall", "items", "LABEL_0", "LABEL_1"]
    assert "accuracy" in lines[0]
    assert f"{learnt.report.metrics['after']['accuracy']:.4f}" in lines[3]
    assert learnt.report.steps[0]["direction"] in learnt.report.summary()


def test_the_losses_in_the_report_are_those_of_the_held_out_rows(learnt: OneStepTrainer, tmp_path: Path) -> None:
    data = tokenised(TRAIN).to_list()
    kept, held = carve(data, 0.2, 512)
    assert learnt.report.rows == {"gradient": len(kept), "search": len(held), "guard": len(held)}
    # Before the head is fitted to them, too.
    trainer = trainer_for(tmp_path, TRAIN, search_fraction=0.2, refit_on_held_out=False)
    trainer.train()
    rows = [TRAIN[i] for i in held]
    loss = nn.functional.cross_entropy(logits_one_by_one(trainer.model, rows), labels_of(rows))
    assert trainer.report.steps[0]["loss_after"] == pytest.approx(float(loss), rel=1e-4)
    assert learnt.report.steps[0]["loss_after"] == pytest.approx(trainer.report.steps[0]["loss_after"], rel=1e-6)


def test_evaluate_and_predict_are_trainers(learnt: OneStepTrainer) -> None:
    scores = learnt.evaluate()
    assert scores["eval_loss"] == pytest.approx(learnt.report.metrics["after"]["loss"], rel=1e-5)
    assert scores["eval_accuracy"] == learnt.report.metrics["after"]["accuracy"]
    output = learnt.predict(tokenised(TEST))
    assert np.allclose(output.predictions, logits_one_by_one(learnt.model, TEST).numpy(), atol=1e-4)
    assert output.label_ids.tolist() == labels_of(TEST).tolist()
    assert output.metrics["test_accuracy"] == scores["eval_accuracy"]


def test_rows_of_text_can_be_evaluated_and_predicted_later(learnt: OneStepTrainer) -> None:
    rows = Dataset.from_list(TEST)
    assert learnt.evaluate(rows)["eval_accuracy"] == learnt.report.metrics["after"]["accuracy"]
    assert np.allclose(learnt.predict(rows).predictions, learnt.predict(tokenised(TEST)).predictions, atol=1e-5)


def test_the_log_has_the_step_size_and_the_loss_of_the_pass(learnt: OneStepTrainer) -> None:
    (entry,) = [entry for entry in learnt.state.log_history if "loss" in entry]
    assert entry["step_size"] == learnt.report.steps[0]["step_size"]
    assert "learning_rate" not in entry
    assert 0 < entry["loss"] < 1


def test_the_head_fitted_again_is_a_gain_on_the_held_out_rows(learnt: OneStepTrainer) -> None:
    (step,) = learnt.report.steps
    best = min(point[1] for one in step["candidates"] for point in one["points"])
    assert step["head_refitted"] == (step["loss_after"] < best)
    assert step["loss_after"] <= best


# A step that does not


def test_a_refused_step_leaves_every_parameter_as_the_head_fit_left_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    search = [{**row, "label": draw.randrange(2)} for row in toy_rows(80, seed=5)]
    after_head: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        """Sees the model after the head's fit: own callbacks come after the step's."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            after_head.update(bits(model))

    trainer = trainer_for(tmp_path, TRAIN[:200], search_dataset=search, eval_dataset=TEST, callbacks=[Watch()])
    start = bits(trainer.model)
    trainer.train()
    (step,) = trainer.report.steps
    assert not step["accepted"] and step["reason"].startswith("refused")
    assert_same_bits(trainer.model, after_head)
    assert not same_bits(start["base_model.model.classifier.modules_to_save.default.weight"],
                         after_head["base_model.model.classifier.modules_to_save.default.weight"])  # fmt: skip
    assert_same_bits(trainer.model, start, lambda name: "classifier" not in name)
    # What "head" says is what the model is now.
    metrics = trainer.report.metrics
    assert metrics["after"] == metrics["head"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["head"]["loss"], rel=1e-6)


@pytest.mark.parametrize("direction", ["auto", "sgd", "kfac"])
def test_an_error_in_mid_run_leaves_every_parameter_its_bits(direction: str, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, TRAIN[:200], direction=direction, search_fraction=0.3)
    start = bits(trainer.model)
    moved = []

    def fail(*point: Any) -> None:
        moved.append(any(not same_bits(v, start[k]) for k, v in trainer.model.state_dict().items()))
        if len(moved) == 2:
            raise KeyboardInterrupt

    trainer.show_point = fail  # the search announces each of its points here
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert moved == [True, True]
    assert_same_bits(trainer.model, start)


def test_a_run_after_an_error_is_as_if_there_had_been_none(tmp_path: Path) -> None:
    class FailOnce(TrainerCallback):
        failed = False

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            if not self.failed:
                self.failed = True
                raise RuntimeError("once")

    options = {"direction": "kfac", "step_size": 0.05, "guard": False}
    clean = trainer_for(tmp_path / "clean", TRAIN[:100], **options)
    clean.train()
    trainer = trainer_for(tmp_path / "failed", TRAIN[:100], callbacks=[FailOnce()], **options)
    with pytest.raises(RuntimeError, match="once"):
        trainer.train()
    trainer.train()
    for name, update in updates(clean.model).items():
        assert torch.allclose(updates(trainer.model)[name], update, atol=1e-6)


# The plain step


def test_a_plain_step_is_theta_minus_eta_gradient_over_all_rows_and_nothing_else(tmp_path: Path) -> None:
    rows = TRAIN[:70]
    trainer = trainer_for(tmp_path, rows, **PLAIN, per_device_train_batch_size=16)
    start = bits(trainer.model)
    oracle = trainer.model.eval()
    batch = word_tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")
    parameters = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    loss = nn.functional.cross_entropy(oracle(**batch).logits, labels_of(rows))
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    trainer.train()
    assert trainer.report.rows == {"gradient": 70, "search": 0, "guard": 0}
    assert trainer.report.metrics["head"] is None
    for name, value in trainer.model.state_dict().items():
        expected = start[name] - 0.1 * gradients[name] if name in gradients else start[name]
        assert torch.allclose(value, expected, atol=1e-6), name
    assert_same_bits(trainer.model, start, lambda name: name not in gradients)
    # B moves, A does not: its gradient is zero while B is.
    assert all(bool(gradients[name].any()) == ("lora_A" not in name and "self.key" not in name) or "lora_A" not in name
               for name in gradients)  # fmt: skip


def test_a_plain_step_with_search_rows_can_be_refused(tmp_path: Path) -> None:
    spoilt = [{**row, "label": 1 - row["label"]} for row in toy_rows(80, seed=5)]
    trainer = trainer_for(tmp_path, TRAIN[:200], search_dataset=spoilt, direction="sgd", step_size=50.0)
    start = bits(trainer.model)
    trainer.train()
    assert not trainer.report.steps[0]["accepted"]
    assert_same_bits(trainer.model, start)


# Labels


def test_labels_as_strings_integers_and_class_labels_are_the_same(tmp_path: Path) -> None:
    names = ["bad", "good"]
    integers = TRAIN[:60]
    strings = [{**row, "label": names[row["label"]]} for row in integers]
    classes = Dataset.from_list(integers).cast_column("label", ClassLabel(names=names))
    found = []
    for i, rows in enumerate((integers, strings, classes)):
        trainer = trainer_for(tmp_path / str(i), rows, **PLAIN)
        trainer.train()
        found.append(trainer)
    for trainer in found[1:]:
        assert_same_bits(trainer.model, bits(found[0].model))
    assert found[0].report.labels == ["LABEL_0", "LABEL_1"]
    assert found[1].report.labels == names
    assert found[1].model.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("direction", ["sgd", "kfac"])
def test_rows_labelled_minus_100_contribute_nothing(direction: str, tmp_path: Path) -> None:
    labelled = TRAIN[:50]
    # The longest come together: whole micro-batches have no label, and their mean loss is NaN.
    others = [{"text": " ".join([row["text"]] * 3 + ["w20"] * 12), "label": -100} for row in TRAIN[50:80]]
    found = []
    for i, rows in enumerate((labelled, [*others, *labelled])):
        trainer = trainer_for(
            tmp_path / str(i), rows, direction=direction, step_size=0.05, guard=False, per_device_train_batch_size=4
        )
        trainer.train()
        found.append(trainer)
    if direction == "sgd":
        for name, value in found[0].model.state_dict().items():
            assert torch.allclose(found[1].model.state_dict()[name], value, atol=1e-6), name
    else:
        for name, update in updates(found[0].model).items():
            assert torch.allclose(updates(found[1].model)[name], update, atol=1e-3 * float(update.abs().max())), name


def test_rows_without_a_label_are_not_held_out() -> None:
    # They could neither choose nor judge: their loss is 0 whatever the step.
    rows = tokenised([*TRAIN[:40], *({**row, "label": -100} for row in TRAIN[40:240])])
    split = split_rows(rows, None, config_for(Path("unused"), search_fraction=0.2), TEXT_CLASSIFICATION)
    assert len(split.held_rows) == 8 and len(split.pass_rows) == 32
    assert all(label != -100 for label in split.held_rows["labels"])


def test_a_tokenised_set_and_its_texts_give_the_same_update(tmp_path: Path) -> None:
    found = []
    for i, rows in enumerate((TRAIN[:60], tokenised(TRAIN[:60]))):
        trainer = trainer_for(tmp_path / str(i), rows, **PLAIN)
        trainer.train()
        found.append(trainer)
    assert_same_bits(found[1].model, bits(found[0].model))


# Trainer's own ways


def test_callbacks_run_and_trainers_state_counts_one_step(tmp_path: Path) -> None:
    seen: list[str] = []

    class Count(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append("begin")

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append("batch")

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append("step")

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append("end")

    trainer = trainer_for(tmp_path, TRAIN[:35], callbacks=[Count()], **PLAIN, per_device_train_batch_size=8)
    trainer.train()
    assert seen == ["begin", *["batch"] * 4, "step", "end"]
    assert trainer.state.global_step == trainer.state.max_steps == 1


def test_the_users_compute_metrics_is_used(tmp_path: Path) -> None:
    def share_of_ones(prediction: EvalPrediction) -> dict[str, float]:
        return {"ones": float((prediction.predictions.argmax(-1) == 1).mean())}

    trainer = trainer_for(tmp_path, TRAIN[:60], eval_dataset=TEST, compute_metrics=share_of_ones, **PLAIN)
    trainer.train()
    expected = float((logits_one_by_one(trainer.model, TEST).argmax(1) == 1).float().mean())
    assert trainer.report.metrics["after"]["ones"] == pytest.approx(expected)
    assert "accuracy" not in trainer.report.metrics["after"]


def test_several_evaluation_sets_are_reported_by_name(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, TRAIN[:60], eval_dataset={"one": TEST[:50], "two": TEST[50:]}, **PLAIN)
    trainer.train()
    assert {"one_accuracy", "two_accuracy", "one_loss", "two_loss"} <= set(trainer.report.metrics["after"])


def test_several_metrics_are_reported(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, TRAIN[:60], eval_dataset=TEST, metrics=["accuracy", "f1"], **PLAIN)
    trainer.train()
    assert {"accuracy", "f1", "loss"} <= set(trainer.report.metrics["after"])


def test_model_init_gives_the_model(tmp_path: Path) -> None:
    one = trainer_for(tmp_path / "one", TRAIN[:60], **PLAIN)
    one.train()
    other = trainer_for(tmp_path / "other", TRAIN[:60], model_init=lambda: tiny_bert(), **PLAIN)
    other.train()
    assert other.report.steps[0]["accepted"]
    # The adapter's A is drawn from Trainer's seed here; the head is the model's own.
    name = "base_model.model.classifier.modules_to_save.default.bias"
    assert torch.allclose(one.model.state_dict()[name], other.model.state_dict()[name], atol=1e-6)


def test_plain_training_arguments_are_taken(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = OneStepTrainer(
        model=tiny_bert(), args=args, train_dataset=toy_rows(200, 1), processing_class=word_tokenizer()
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert {one["direction"] for one in trainer.report.steps[0]["candidates"]} == set(lora.auto)


# Several steps


def test_two_steps_are_two_passes_each_better_than_the_one_before(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, TRAIN, max_steps=2, direction="kfac", step_size=0.03, search_fraction=0.2)
    trainer.train()
    first, second = trainer.report.steps
    assert first["accepted"] and second["accepted"]
    assert second["loss_before"] == pytest.approx(first["loss_after"], rel=1e-5)
    assert second["loss_after"] < second["loss_before"]
    assert trainer.state.global_step == 2


def test_a_refusal_ends_the_run(tmp_path: Path) -> None:
    spoilt = [{**row, "label": 1 - row["label"]} for row in toy_rows(80, seed=5)]
    trainer = trainer_for(tmp_path, TRAIN[:100], search_dataset=spoilt, max_steps=3, direction="sgd", step_size=0.5)
    trainer.train()
    assert [step["accepted"] for step in trainer.report.steps] == [False]
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(("target", "steps"), [(0.5, 1), (1.01, 2)])
def test_stop_at_ends_the_run_once_the_metric_is_reached(target: float, steps: int, tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, TRAIN, max_steps=2, direction="kfac", metric_for_best_model="accuracy", stop_at=target,
        search_fraction=0.2,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.report.steps) == steps


def test_stop_at_with_a_loss_stops_below_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, TRAIN[:300], max_steps=3, direction="kfac", stop_at=100.0, search_fraction=0.2)
    trainer.train()
    assert len(trainer.report.steps) == 1


def test_stop_at_with_an_unknown_metric_names_the_nearest(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, TRAIN[:100], max_steps=2, metric_for_best_model="acuracy", stop_at=0.5, search_fraction=0.2
    )
    with pytest.raises(ValueError, match=r"`metric_for_best_model='acuracy'`.*Did you mean 'accuracy'"):
        trainer.train()


def test_a_run_of_two_steps_resumes_after_the_first(tmp_path: Path) -> None:
    options = {
        "max_steps": 2,
        "direction": "kfac",
        "step_size": 0.03,
        "search_fraction": 0.2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = trainer_for(tmp_path / "whole", TRAIN, **options)
    whole.train()
    assert [step["accepted"] for step in whole.report.steps] == [True, True]
    resumed = trainer_for(tmp_path / "resumed", TRAIN, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert resumed.state.global_step == 2
    for name, update in updates(whole.model).items():
        assert torch.allclose(updates(resumed.model)[name], update, atol=1e-4), name


# Which rows are held out


def test_the_rows_that_are_held_out_do_not_depend_on_their_order() -> None:
    rows = tokenised(TRAIN[:200]).to_list()
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    texts = [sorted(str(one[i]) for i in carve(one, 0.25, 512)[1]) for one in (rows, shuffled)]
    assert texts[0] == texts[1]
    kept, held = carve(rows, 0.25, 512)
    assert sorted([*kept, *held]) == list(range(200))
    assert len(held) >= 50


def test_rows_of_equal_content_stay_on_one_side() -> None:
    rows = tokenised(TRAIN[:100]).to_list() * 3
    kept, held = carve(rows, 0.3, 512)
    assert not {str(rows[i]) for i in kept} & {str(rows[i]) for i in held}
    assert held


def test_no_more_rows_are_held_out_than_asked() -> None:
    unique = [{"input_ids": [i], "labels": i % 2} for i in range(300)]
    assert len(carve(unique, 0.5, 40)[1]) == 40
    assert len(carve(unique, 0.5, 512)[1]) == 150


def test_no_module_drops_out_in_the_pass_and_checkpointed_layers_keep_their_flag() -> None:
    model = nn.Sequential(tiny_bert(), torch.jit.script(nn.Dropout(0.5)), nn.Dropout(0.5)).train()
    without_dropout(model)
    kept = [module for module in model.modules() if module.training]
    assert len(kept) == 2 and all(isinstance(module, GradientCheckpointingLayer) for module in kept)
    ones = torch.ones(100)
    assert torch.equal(model[1](ones), ones) and torch.equal(model[2](ones), ones)
    model.train()
    assert all(module.training for module in model.modules())
