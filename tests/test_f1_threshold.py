"""The threshold of an F1: against brute force over all subsets, on rows with known probabilities, and in whole runs."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from onestep_peft import OneStepTrainer, f1_threshold, head
from onestep_peft.head import HeadFit
from onestep_peft.tasks import MULTI_LABEL_CLASSIFICATION, TEXT_CLASSIFICATION, TEXT_REGRESSION, TOKEN_CLASSIFICATION
from tests.conftest import assert_same_bits, bits, tiny_bert, tiny_llama, toy_rows, trainer_for


def expected_f1(chances: Tensor, said: Tensor) -> float:
    return float(2 * chances[said].sum() / (said.sum() + chances.sum()))


def test_no_subset_of_the_decisions_has_a_better_f1_and_half_of_it_is_the_threshold() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        chances = 0.1 + 0.9 * torch.rand(9, generator=draw, dtype=torch.float64) ** 2
        subsets = [torch.tensor(bits).bool() for bits in itertools.product((0, 1), repeat=9)]
        found = f1_threshold.best_f1(chances)
        assert found == pytest.approx(max(expected_f1(chances, said) for said in subsets), rel=1e-12)
        assert expected_f1(chances, chances > found / 2) == pytest.approx(found, rel=1e-12)


def test_on_rows_with_known_probabilities_it_is_what_the_labels_give() -> None:
    draw = torch.Generator().manual_seed(1)
    chances = torch.rand(40_000, generator=draw, dtype=torch.float64) ** 4
    labels = torch.rand(40_000, generator=draw, dtype=torch.float64) < chances
    found = f1_threshold.best_f1(chances)
    assert found is not None
    by_labels = {
        at: f1_score(labels, chances > at) for at in (found / 2, 0.5, *torch.linspace(0.05, 0.95, 19).tolist())
    }
    assert by_labels[found / 2] == pytest.approx(found, abs=0.01)
    assert by_labels[found / 2] > max(by_labels.values()) - 0.002 and by_labels[found / 2] > by_labels[0.5] + 0.02


@pytest.mark.parametrize(("chances", "expected"), [([1.0, 1.0, 0.0], 1.0), ([0.2, 0.3, 0.4], None), ([], None)])
def test_the_ends(chances: list[float], expected: float | None) -> None:
    assert f1_threshold.best_f1(torch.tensor(chances)) == expected


def test_chances_are_those_of_the_known_decisions() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0], [5.0, 5.0]])
    found = f1_threshold.chances(logits, torch.tensor([0, 1, -100]), TEXT_CLASSIFICATION)
    assert torch.allclose(found, torch.tensor([1.0, -3.0]).double().sigmoid())
    several = torch.tensor([[1.0, 0.0], [-100.0, 1.0], [float("nan"), float("nan")]])
    found = f1_threshold.chances(logits, several, MULTI_LABEL_CLASSIFICATION)
    assert torch.allclose(found, torch.tensor([0.0, 1.0, -1.0]).double().sigmoid())


@pytest.mark.parametrize("task", [TEXT_CLASSIFICATION, MULTI_LABEL_CLASSIFICATION], ids=["two classes", "labels"])
def test_a_lowered_head_says_yes_above_the_threshold(task: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    fitted = HeadFit(torch.randn(2, 5, generator=draw), torch.randn(2, generator=draw), 0.1, None)
    x = torch.randn(500, 5, generator=draw)
    lowered = f1_threshold.lowered(fitted, 0.2, task)
    if task is TEXT_CLASSIFICATION:
        before, said = fitted.logits(x).softmax(1)[:, 1], lowered.logits(x).argmax(1) == 1
    else:
        before, said = fitted.logits(x).sigmoid(), lowered.logits(x) > 0
    assert torch.equal(said, before > 0.2) and said.any() and not said.all()


def test_which_tasks_have_such_an_f1() -> None:
    assert f1_threshold.is_for(TEXT_CLASSIFICATION, 2) and f1_threshold.is_for(MULTI_LABEL_CLASSIFICATION, 7)
    others = [(TEXT_CLASSIFICATION, 3), (TEXT_REGRESSION, 2), (TOKEN_CLASSIFICATION, 2)]
    assert not any(f1_threshold.is_for(task, outputs) for task, outputs in others)


# In a run


def rare_rows(number: int, seed: int) -> list[dict[str, Any]]:
    """A class of a fifth of the rows, of which no word tells for sure."""
    draw, rows = random.Random(seed), toy_rows(4 * number, seed, noise=0.1)
    rows = [row for row in rows if row["label"] == 0 or draw.random() < 0.25]
    return rows[:number]


FOR_F1: dict[str, Any] = {"metrics": ["f1", "accuracy"], "metric_for_best_model": "f1"}


def run(folder: Path, **options: Any) -> OneStepTrainer:
    torch.manual_seed(0)
    options = {"search_dataset": rare_rows(120, seed=3), "eval_dataset": rare_rows(300, seed=5), **FOR_F1, **options}
    trainer = trainer_for(folder, options.pop("train_dataset", rare_rows(120, seed=1)), **options)
    trainer.train()
    return trainer


def head_of(trainer: OneStepTrainer) -> HeadFit:
    return head.current(trainer.head_layer())


def test_the_bias_of_class_one_alone_moves_and_the_f1_of_other_rows_rises(tmp_path: Path) -> None:
    plain, tuned = run(tmp_path / "plain", tune_threshold=False), run(tmp_path / "tuned")
    assert plain.report.steps[0]["decision"] is None
    decision = tuned.report.steps[0]["decision"]
    assert decision["metric"] == "f1" and decision["threshold"] == decision["expected"] / 2 < 0.5
    assert {**tuned.report.steps[0], "decision": None} == plain.report.steps[0]
    assert_same_bits(
        tuned.bare_model, bits(plain.bare_model), only=lambda name: "classifier" not in name or "bias" not in name
    )
    shift = head_of(tuned).bias - head_of(plain).bias
    expected = math.log(1 / decision["threshold"] - 1)
    assert shift.tolist() == [0.0, pytest.approx(expected, rel=1e-5)]
    assert f"yes from a probability of {decision['threshold']:.2f} on, for f1" in tuned.report.summary()
    before, after = (one.report.metrics["after"] for one in (plain, tuned))
    assert after["f1"] > before["f1"] + 0.02


def test_the_threshold_is_that_of_held_out_rows_under_heads_that_have_not_seen_them(tmp_path: Path) -> None:
    trainer = run(tmp_path, refit_on_held_out=False)
    step, layer = trainer.report.steps[0], trainer.head_layer()
    assert step["accepted"] and step["last_fit"] is None
    threshold = step["decision"]["threshold"]
    with torch.no_grad():
        layer.bias[1] -= math.log(1 / threshold - 1)
    logits = torch.as_tensor(trainer.predict(trainer.held_rows).predictions).double()
    chances = logits.softmax(1)[:, 1]
    by_hand = max(expected_f1(chances, chances >= one) for one in chances)
    assert threshold == pytest.approx(by_hand / 2, rel=1e-4)


def test_several_labels_a_row_share_one_threshold(tmp_path: Path) -> None:
    def labelled(number: int, seed: int) -> list[dict[str, Any]]:
        return [
            {"text": row["text"], "labels": [float(row["label"]), float(len(row["text"]) % 3 == 0)]}
            for row in rare_rows(number, seed)
        ]

    options = {
        "train_dataset": labelled(120, 1), "search_dataset": labelled(120, 3), "eval_dataset": labelled(100, 5),
        "metrics": None,
    }  # fmt: skip
    heads = []
    for tune in (True, False):
        model = tiny_bert(num_labels=2, problem_type="multi_label_classification")
        heads.append(
            (trainer := run(tmp_path / str(tune), model=model, tune_threshold=tune, **options), head_of(trainer))
        )
    (tuned, after), (_, before) = heads
    expected = math.log(1 / tuned.report.steps[0]["decision"]["threshold"] - 1)
    assert (after.bias - before.bias).tolist() == pytest.approx([expected] * 2, rel=1e-4)


def three_classes(number: int, seed: int) -> list[dict[str, Any]]:
    return toy_rows(number, seed, classes=3)


OTHERS: dict[str, dict[str, Any]] = {
    "another metric": {"metric_for_best_model": "accuracy"},
    "no metric named": {"metric_for_best_model": None},
    "an F1 that nobody measures": {"metrics": ["accuracy"]},
    "an F1 of one's own": {"metrics": None, "compute_metrics": lambda _: {"f1": 0.5}},
    "three classes": {
        "train_dataset": three_classes(90, 1), "search_dataset": three_classes(60, 3), "eval_dataset": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_it_is_left_alone_with(options: dict[str, Any], tmp_path: Path) -> None:
    classes = 3 if "train_dataset" in options else 2
    trainer = run(tmp_path, model=tiny_bert(num_labels=classes), **options)
    assert trainer.report.steps[0]["accepted"] and trainer.report.steps[0]["decision"] is None


def test_a_head_without_a_bias_decides_as_it_did(tmp_path: Path) -> None:
    trainer = run(tmp_path, model=tiny_llama())
    assert head_of(trainer).bias is None
    assert [step["decision"] for step in trainer.report.steps if step["accepted"]] == [None]


def test_where_all_held_out_rows_are_evaluated_there_is_nothing_to_go_by(tmp_path: Path) -> None:
    search = rare_rows(120, seed=3)
    trainer = run(tmp_path, search_dataset=search, eval_dataset=search)
    assert trainer.report.steps[0]["accepted"] and trainer.report.steps[0]["decision"] is None


def test_more_steps_from_a_checkpoint_begin_with_the_head_as_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 1, "body_folds": 1, "refit_on_held_out": False,
    }  # fmt: skip
    first = run(tmp_path / "first", **options)
    assert first.report.steps[0]["decision"]
    torch.manual_seed(0)
    again = trainer_for(
        tmp_path / "again",
        rare_rows(120, seed=1),
        search_dataset=rare_rows(120, seed=3),
        max_steps=2,
        **FOR_F1,
        **options,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert again.report.steps[-1]["loss_before"] == pytest.approx(first.report.steps[0]["loss_after"], rel=1e-5)
