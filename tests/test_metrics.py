"""Metrics against scikit-learn; in batches as all at once; without a network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from transformers import EvalPrediction

from onestep_peft.metrics import compute_metrics, resolve
from onestep_peft.tasks import TEXT_CLASSIFICATION

OF_CLASSES = ("accuracy", "precision", "recall", "f1")
SCIKIT_LEARN = {"precision": precision_score, "recall": recall_score, "f1": f1_score}


def drawn(classes: int, rows: int = 101, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels that agree more often than not."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=rows)
    logits = draw.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += 1.0
    return logits, labels


def computed(metrics: Any, classes: int) -> Any:
    return compute_metrics(metrics, TEXT_CLASSIFICATION, [f"c{i}" for i in range(classes)])


def expected(name: str, predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    if name == "accuracy":
        return accuracy_score(labels, predicted)
    return SCIKIT_LEARN[name](labels, predicted, average="binary" if classes == 2 else "macro", zero_division=0)


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_bundled_metrics_match_scikit_learn(name: str, classes: int) -> None:
    logits, labels = drawn(classes)
    compute = computed(resolve([name]), classes)
    found = compute(EvalPrediction(logits, labels))
    assert found == {name: pytest.approx(expected(name, logits.argmax(1), labels, classes))}


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_class_that_is_never_predicted_or_never_there_scores_zero(name: str, classes: int) -> None:
    logits, labels = drawn(classes)
    logits[:, 1] = -100.0
    labels[labels == classes - 1] = 0
    found = computed(resolve([name]), classes)(EvalPrediction(logits, labels))
    assert found[name] == pytest.approx(expected(name, logits.argmax(1), labels, classes))


@pytest.mark.parametrize("sizes", [[1] * 101, [32, 32, 32, 5]])
def test_batches_give_the_metrics_of_all_rows_at_once(sizes: list[int]) -> None:
    logits, labels = drawn(3)
    once = computed(resolve(OF_CLASSES), 3)(EvalPrediction(logits, labels))
    compute = computed(resolve(OF_CLASSES), 3)
    ends = np.cumsum(sizes)
    for round_ in range(2):  # a second evaluation starts from nothing
        for size, end in zip(sizes, ends, strict=True):
            part = slice(end - size, end)
            found = compute(EvalPrediction(logits[part], labels[part]), compute_result=bool(end == 101))
            assert (found == {}) == (end < 101), round_
        assert found == pytest.approx(once)


def test_rows_without_a_label_are_left_out() -> None:
    logits, labels = drawn(3)
    marked = labels.copy()
    marked[::4] = -100
    keep = marked != -100
    found = computed(resolve(["accuracy"]), 3)(EvalPrediction(logits, marked))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels[keep], logits[keep].argmax(1)))


def test_logits_in_a_tuple_are_the_first_of_it_and_decisions_do_as_well() -> None:
    logits, labels = drawn(3)
    compute = computed(resolve(["accuracy"]), 3)
    expected_ = compute(EvalPrediction(logits, labels))
    assert compute(EvalPrediction((logits, np.zeros((101, 9))), labels)) == expected_
    assert compute(EvalPrediction(logits.argmax(1), labels)) == expected_


class ShareOf(evaluate.Metric):
    """A user's own: the share of rows that are given class 1."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(kinds))

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return {"share": float(np.mean(np.asarray(predictions) == 1))}


def test_any_metric_object_goes_beside_the_bundled_ones() -> None:
    logits, labels = drawn(3)
    metrics = resolve([ShareOf(keep_in_memory=True), "accuracy"])
    found = computed(metrics, 3)(EvalPrediction(logits, labels))
    assert found == {
        "share": pytest.approx(float((logits.argmax(1) == 1).mean())),
        "accuracy": pytest.approx(accuracy_score(labels, logits.argmax(1))),
    }


@pytest.mark.parametrize(("name", "near"), [("acuracy", "accuracy"), ("f_1", "f1"), ("recal", "recall")])
def test_an_unknown_metric_names_the_nearest_without_a_network(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"No metric '{name}'.*Did you mean '{near}'"):
        resolve([name])
