"""Default metrics of the tasks against scikit-learn, numpy, and spans that are counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from transformers import EvalPrediction

from onestep_peft.metrics import compute_metrics, default_names, entities, resolve
from onestep_peft.tasks import (
    MULTI_LABEL_CLASSIFICATION,
    TEXT_GENERATION,
    TEXT_REGRESSION,
    TOKEN_CLASSIFICATION,
    Task,
)
from tests.tasks.small import TAGS


def in_batches(task: Task, names: list[Any], labels: list[str], predictions: Any, references: Any, size: int) -> Any:
    compute = compute_metrics(resolve(names), task, labels)
    found = {}
    for start in range(0, len(references), size):
        part = slice(start, start + size)
        last = start + size >= len(references)
        found = compute(EvalPrediction(predictions[part], references[part]), compute_result=last)
    return found


@pytest.mark.parametrize("size", [1, 7, 100])
def test_several_labels_are_scored_by_all_decisions(size: int) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(2, size=(53, 4)).astype(float)
    logits = draw.normal(size=(53, 4)) + labels
    labels[::9] = -100
    known, decided = labels[labels[:, 0] >= 0], (logits > 0)[labels[:, 0] >= 0]
    names = ["f1", "accuracy", "precision", "recall"]
    found = in_batches(MULTI_LABEL_CLASSIFICATION, names, list("abcd"), logits, labels, size)
    assert found == {
        "f1": pytest.approx(f1_score(known, decided, average="micro")),
        "accuracy": pytest.approx(accuracy_score(known, decided)),
        "precision": pytest.approx(precision_score(known, decided, average="micro")),
        "recall": pytest.approx(recall_score(known, decided, average="micro")),
    }


@pytest.mark.parametrize("size", [1, 7, 100])
def test_numbers_are_scored(size: int) -> None:
    draw = np.random.default_rng(0)
    labels = draw.normal(size=41) * 10 - 100  # -100 is a number like any other
    labels[4] = -100
    predictions = (labels + draw.normal(size=41))[:, None].astype(np.float32)
    marked = labels.copy()
    marked[::5] = np.nan
    keep = ~np.isnan(marked)
    found = in_batches(TEXT_REGRESSION, ["mse", "pearson"], [], predictions, marked, size)
    assert found["mse"] == pytest.approx(np.mean((predictions[keep, 0] - labels[keep]) ** 2), rel=1e-4)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions[keep, 0], labels[keep])[0, 1], rel=1e-4)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),  # another kind begins another one
        ("O I-A I-A O I-A", [("A", 1, 3), ("A", 4, 5)]),
        ("B-A-1 I-A-1 I-A-2", [("A-1", 0, 2), ("A-2", 2, 3)]),
    ],
)
def test_entities_are_found_in_tags(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_tags_are_scored_by_token_and_by_entity() -> None:
    #          O  B-PER I-PER O B-LOC     B-PER I-PER B-LOC pad
    true = [[0, 1, 2, 0, 3], [-100, 1, 2, 3, -100]]
    predicted = [[1, 1, 2, 0, 3], [0, 1, 0, 4, 0]]
    logits = np.eye(len(TAGS))[predicted]
    for size in (1, 2):
        found = in_batches(TOKEN_CLASSIFICATION, ["token_f1", "entity_f1"], TAGS, logits, np.array(true), size)
        # Tokens: 4 right of 6 named and 6 meant. Entities: (PER 1-3) and (LOC 4-5) of the first row are right; in the
        # second, (PER 0-2) is cut short and (LOC 2-3) is right, though it is called inside.
        assert found == {"token_f1": pytest.approx(2 * 4 / (6 + 6)), "entity_f1": pytest.approx(2 * 3 / (5 + 4))}


def test_token_f1_is_scikit_learns_over_the_named_classes() -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(5, size=(9, 11))
    logits = draw.normal(size=(9, 11, 5)) + 1.5 * np.eye(5)[labels]
    labels[draw.random(labels.shape) < 0.3] = -100
    keep = labels != -100
    expected = f1_score(labels[keep], logits.argmax(-1)[keep], labels=[1, 2, 3, 4], average="micro")
    found = in_batches(TOKEN_CLASSIFICATION, ["token_f1", "accuracy"], TAGS, logits, labels, 4)
    assert found["token_f1"] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels[keep], logits.argmax(-1)[keep]))


def test_a_language_models_metrics_compare_each_token_with_the_next_label() -> None:
    logits = torch.eye(6)[torch.tensor([[2, 3, 4, 5]])]
    labels = torch.tensor([[-100, 2, -100, 4]])
    found = in_batches(TEXT_GENERATION, ["accuracy"], [], logits, labels, 1)
    assert found == {"accuracy": 1.0}
    assert in_batches(TEXT_GENERATION, ["accuracy"], [], logits, labels + 1, 1) == {"accuracy": 0.0}


def test_entities_are_a_default_only_where_tags_have_a_beginning() -> None:
    assert default_names(TOKEN_CLASSIFICATION, TAGS) == ["token_f1", "entity_f1"]
    assert default_names(TOKEN_CLASSIFICATION, ["NOUN", "VERB"]) == ["token_f1"]
    assert default_names(TEXT_GENERATION, []) == []
