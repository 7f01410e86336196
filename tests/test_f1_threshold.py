"""The threshold of an F1: against brute force over all subsets, on rows with known probabilities, and in whole runs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score, fbeta_score, recall_score
from torch import Tensor
from transformers import EvalPrediction

from onestep_peft import OneStepTrainer, StepReport, f1_threshold, head, last_fit
from onestep_peft.head import HeadFit
from onestep_peft.last_fit import LastFit
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
def test_a_head_with_a_threshold_says_yes_above_it(task: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    fitted = HeadFit(torch.randn(2, 5, generator=draw), torch.randn(2, generator=draw), 0.1, None)
    x = torch.randn(500, 5, generator=draw)
    given = f1_threshold.with_threshold(fitted, 0.2, task)
    if task is TEXT_CLASSIFICATION:
        before, said = fitted.logits(x).softmax(1)[:, 1], given.logits(x).argmax(1) == 1
    else:
        before, said = fitted.logits(x).sigmoid(), given.logits(x) > 0
    assert torch.equal(said, before > 0.2) and said.any() and not said.all()


def by_scikit_learn(average: str, **options: Any) -> Callable[[Tensor, Tensor], float]:
    return lambda said, true: float(f1_score(true, said, average=average, zero_division=0.0, **options))


OTHER_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "of class 0": by_scikit_learn("binary", pos_label=0),
    "macro": by_scikit_learn("macro"),
    "weighted": by_scikit_learn("weighted"),
    "accuracy": lambda said, true: float(said.eq(true).double().mean()),
    "recall": lambda said, true: float(recall_score(true, said)),
    "F2": lambda said, true: float(fbeta_score(true, said, beta=2)),
}


@pytest.mark.parametrize("prevalence", [0.05, 0.5, 0.9])
def test_an_f1_is_known_by_its_values_and_others_are_not_taken_for_one(prevalence: float) -> None:
    draw = torch.Generator().manual_seed(3)
    labels = (torch.rand(300, generator=draw) < prevalence).long()
    logits = torch.randn(300, 2, generator=draw, dtype=torch.float64)
    logits[:, 1] += 2 * labels - 1

    def known(metric: Callable[[Tensor, Tensor], float], near: int = 12) -> bool:
        def of(way: Tensor) -> float:
            return round(metric(way.argmax(1), labels), near)

        return f1_threshold.is_f1(of, logits, labels, TEXT_CLASSIFICATION, 0.3)

    assert known(by_scikit_learn("binary")) and known(by_scikit_learn("binary"), near=3)
    assert [name for name, metric in OTHER_METRICS.items() if known(metric)] == []


def test_the_f1_of_several_labels_is_over_all_of_them() -> None:
    draw = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(50, 3, generator=draw), (torch.rand(50, 3, generator=draw) < 0.3).float()
    said = (logits > 0).int()
    found = f1_threshold.f1(logits, labels, MULTI_LABEL_CLASSIFICATION)
    assert found == pytest.approx(f1_score(labels, said, average="micro"))
    labels[:25, 0] = -100.0
    pairs = [(labels[:, i][labels[:, i] >= 0], said[:, i][labels[:, i] >= 0]) for i in range(3)]
    true, decided = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert f1_threshold.f1(logits, labels, MULTI_LABEL_CLASSIFICATION) == pytest.approx(f1_score(true, decided))


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


def trainer_of(folder: Path, **options: Any) -> OneStepTrainer:
    torch.manual_seed(0)
    options = {"search_dataset": rare_rows(120, seed=3), "eval_dataset": rare_rows(300, seed=5), **FOR_F1, **options}
    return trainer_for(folder, options.pop("train_dataset", rare_rows(120, seed=1)), **options)


def run(folder: Path, **options: Any) -> OneStepTrainer:
    trainer = trainer_of(folder, **options)
    trainer.train()
    return trainer


def head_of(trainer: OneStepTrainer) -> HeadFit:
    return head.current(trainer.head_layer())


def lift_of(trainer: OneStepTrainer) -> float:
    """By how much its threshold has raised the bias."""
    return math.log(1 / trainer.report.threshold["value"] - 1)


def threshold_by_hand(logits: Any) -> float:
    chances = torch.as_tensor(logits).double().softmax(1)[:, 1]
    return max(expected_f1(chances, chances >= one) for one in chances) / 2


def test_the_bias_of_class_one_alone_moves_and_the_f1_of_other_rows_rises(tmp_path: Path) -> None:
    plain, tuned = run(tmp_path / "plain", tune_threshold=False), run(tmp_path / "tuned")
    assert plain.report.threshold == {} and plain.report.decision is None
    threshold = tuned.report.threshold
    assert threshold["metric"] == "f1" and threshold["value"] == threshold["expected"] / 2 < 0.5
    assert tuned.report.steps == plain.report.steps and tuned.report.steps[0]["accepted"]
    assert_same_bits(
        tuned.bare_model, bits(plain.bare_model), only=lambda name: "classifier" not in name or "bias" not in name
    )
    shift = head_of(tuned).bias - head_of(plain).bias
    assert shift.tolist() == [0.0, pytest.approx(lift_of(tuned), rel=1e-5)]
    before, after = (one.report.metrics["after"] for one in (plain, tuned))
    assert after["f1"] > before["f1"] + 0.02
    table = tuned.report.table()
    assert f"says yes from a probability of {threshold['value']:.2g} on" in table and "from before" not in table


def test_the_threshold_is_that_of_held_out_rows_under_heads_that_have_not_seen_them(tmp_path: Path) -> None:
    found: list[LastFit] = []
    original = last_fit.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_fit, "fit", lambda *given: (found.append(original(*given)), found[-1])[1])
        trainer = run(tmp_path)
    assert trainer.report.steps[0]["last_fit"]
    assert trainer.report.threshold["value"] == pytest.approx(threshold_by_hand(found[0].logits), rel=1e-9)
    with torch.no_grad():
        trainer.head_layer().bias[1] -= lift_of(trainer)
    knowing = threshold_by_hand(trainer.predict(trainer.held_rows).predictions)
    assert abs(knowing - trainer.report.threshold["value"]) > 1e-4


@pytest.mark.parametrize("refused", [False, True], ids=["accepted", "refused"])
def test_without_a_last_fit_it_is_that_of_the_head_as_it_is(refused: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"direction": "kfac", "step_size": 30.0} if refused else {"refit_on_held_out": False}
    trainer = run(tmp_path, **options)
    step = trainer.report.steps[0]
    assert step["accepted"] is not refused and step["last_fit"] is None
    assert trainer.report.metrics["after"]["f1"] > trainer.report.metrics["head"]["f1"]
    with torch.no_grad():
        trainer.head_layer().bias[1] -= lift_of(trainer)
    by_hand = threshold_by_hand(trainer.predict(trainer.held_rows).predictions)
    assert trainer.report.threshold["value"] == pytest.approx(by_hand, rel=1e-4)


def test_a_second_run_of_the_same_trainer_has_it_too(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    trainer.train()
    assert trainer.report.threshold and head_of(trainer).bias is not None


def several_labels(number: int, seed: int) -> list[dict[str, Any]]:
    rows = [
        {"text": row["text"], "labels": [float(row["label"]), float(len(row["text"]) % 3 == 0)]}
        for row in rare_rows(number, seed)
    ]
    rows[0]["labels"][0] = -100.0
    return rows


def test_several_labels_a_row_share_one_threshold(tmp_path: Path) -> None:
    options = {
        "train_dataset": several_labels(120, 1), "search_dataset": several_labels(120, 3),
        "eval_dataset": several_labels(100, 5), "metrics": None,
    }  # fmt: skip
    tuned, plain = (
        run(
            tmp_path / str(tune), tune_threshold=tune, **options,
            model=tiny_bert(num_labels=2, problem_type="multi_label_classification"),
        )
        for tune in (True, False)
    )  # fmt: skip
    shift = head_of(tuned).bias - head_of(plain).bias
    assert shift.tolist() == pytest.approx([lift_of(tuned)] * 2, rel=1e-4)


def of_ones_own(prediction: EvalPrediction) -> dict[str, float]:
    said = prediction.predictions.argmax(-1)
    return {"found": round(f1_score(prediction.label_ids, said, zero_division=0.0), 3)}


def test_an_f1_of_ones_own_under_another_name_counts(tmp_path: Path) -> None:
    own = {"metrics": None, "compute_metrics": of_ones_own, "metric_for_best_model": "eval_found"}
    tuned, bundled = run(tmp_path / "own", **own), run(tmp_path / "bundled")
    assert tuned.report.threshold == {**bundled.report.threshold, "metric": "found"}


def no_f1(_: EvalPrediction) -> dict[str, float]:
    return {"f1": 0.5}


def raising(_: EvalPrediction) -> dict[str, float]:
    raise RuntimeError("made for other rows")


def only_for_the_evaluation(prediction: EvalPrediction) -> dict[str, float]:
    return no_f1(prediction) if len(prediction.label_ids) == 300 else raising(prediction)


THREE: dict[str, Any] = {
    f"{name}_dataset": toy_rows(60, seed, classes=3) for name, seed in (("train", 1), ("search", 3), ("eval", 5))
}
OTHERS: dict[str, dict[str, Any]] = {
    "another metric": {"metric_for_best_model": "accuracy"},
    "no metric named": {"metric_for_best_model": None},
    "an F1 that nobody measures": {"metrics": ["accuracy"]},
    "no F1, though it is called so": {"metrics": None, "compute_metrics": no_f1},
    "a metric for the evaluation rows alone": {"metrics": None, "compute_metrics": only_for_the_evaluation},
    "three classes": THREE,
    "held-out rows that are all evaluated": {"eval_dataset": rare_rows(120, seed=3)},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_it_is_left_alone_with(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = run(tmp_path, model=tiny_bert(num_labels=3 if options is THREE else 2), **options)
    assert trainer.report.steps[0]["accepted"] and trainer.report.threshold == {}


def test_a_head_without_a_bias_decides_as_it_did(tmp_path: Path) -> None:
    trainer = run(tmp_path, model=tiny_llama())
    assert head_of(trainer).bias is None and trainer.report.threshold == {}


def test_without_an_evaluation_set_the_held_out_rows_are_scored_before(tmp_path: Path) -> None:
    tuned, plain = (run(tmp_path / str(one), eval_dataset=None, tune_threshold=one) for one in (True, False))
    assert tuned.report.threshold and tuned.report.metrics["after"] == plain.report.metrics["after"]
    assert "from before the head got its threshold" in tuned.report.table()


@pytest.mark.parametrize("what", ["the threshold", "the last fit"])
def test_where_memory_is_short_the_rest_is_done_and_told(what: str, tmp_path: Path) -> None:
    def short(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    module, name, told = (
        (f1_threshold, "best_f1", "decides from one half on")
        if what == "the threshold"
        else (last_fit, "fit", "not fitted to the held-out rows")
    )
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match=told):
        patch.setattr(module, name, short)
        trainer = run(tmp_path / "short", auto_find_batch_size=True)
    options = {"tune_threshold": False} if what == "the threshold" else {"refit_on_held_out": False}
    plain = run(tmp_path / "plain", **options)
    assert len(trainer.report.steps) == 1
    assert trainer.report.steps == plain.report.steps and trainer.report.threshold == plain.report.threshold
    assert torch.equal(head_of(trainer).weight, head_of(plain).weight)
    assert torch.equal(head_of(trainer).bias, head_of(plain).bias)


def resumed(folder: Path, **options: Any) -> OneStepTrainer:
    """Two steps, from the checkpoint after the first step of the run in `first`."""
    again = trainer_of(folder / "again", max_steps=2, **options)
    again.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-1"))
    return again


CHECKPOINTS: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 1, "body_folds": 1, "refit_on_held_out": False,
}  # fmt: skip


def test_more_steps_from_a_checkpoint_begin_with_the_head_as_it_was(tmp_path: Path) -> None:
    first = run(tmp_path / "first", **CHECKPOINTS)
    assert first.report.threshold
    again = resumed(tmp_path, **CHECKPOINTS)
    assert again.report.steps[-1]["loss_before"] == pytest.approx(first.report.steps[0]["loss_after"], rel=1e-5)


def test_so_they_do_where_nothing_is_held_out_any_more(tmp_path: Path) -> None:
    first = run(tmp_path / "first", **CHECKPOINTS)
    options: dict[str, Any] = {
        "direction": "kfac", "step_size": 1e-3, "guard": False, "search_dataset": None, "fit_head": True,
    }  # fmt: skip
    again = resumed(tmp_path, **CHECKPOINTS, **options)
    assert head_of(again).bias[1] == pytest.approx(float(head_of(first).bias[1]) - lift_of(first), abs=0.05)


def test_a_report_from_elsewhere_with_no_threshold_in_its_place_is_refused(tmp_path: Path) -> None:
    report = run(tmp_path).report
    assert StepReport.from_json(report.to_json()).threshold == report.threshold
    for wrong in ({"value": 0.2}, {**report.threshold, "value": "0.2"}, {**report.threshold, "expected": None}):
        with pytest.raises(ValueError, match="`threshold` is"):
            StepReport.from_json(replace(report, threshold=wrong).to_json())
