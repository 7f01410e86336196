"""From which probability on to say yes, where an F1 is what counts.

A head that is fitted by its log-loss says yes from one half on, which is best for the accuracy. For an F1 the best
threshold is half of the F1 that it brings, whatever the probabilities, as long as they are calibrated (Lipton, Elkan &
Naryanaswamy, "Optimal thresholding of classifiers to maximize F1 measure", ECML PKDD 2014): never above one half, and
far below it where a class is rare and hard to tell.

That F1 is worked out from held-out probabilities, not from labels: where a hundred rows hold eight of the class, the
best threshold by count is that of the few rows beside which it lies, and one by probabilities asks all rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestep_peft.head import HeadFit, labelled
from onestep_peft.tasks import Task
from onestep_peft.tasks.task import MULTI_LABEL, SINGLE_LABEL, UNLABELLED

# With fewer than so many that are to be expected of the class, nothing is known of its F1.
EXPECTED_MIN = 1.0


def is_for(task: Task, outputs: int) -> bool:
    """Whether the task's F1 is one of yes and no: of class 1 of two, or over all decisions of several labels a row."""
    return task.problem_type == MULTI_LABEL or (task.problem_type == SINGLE_LABEL and outputs == 2)


def chances(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """The probability of a yes for each decision that an F1 counts, `(decisions,)`, float64.

    Args:
        logits: `(items, outputs)`.
        labels: `(items,)`, or `(items, outputs)`; what has none is left out.
    """
    logits, labels = labelled(logits.double(), labels, task)
    if task.problem_type == MULTI_LABEL:
        return logits.sigmoid()[task.aligned(logits, labels)[1] != UNLABELLED]
    return logits.softmax(1)[:, 1]


def best_f1(chances: Tensor) -> float | None:
    """The highest F1 to expect by a threshold, `2 · hits / (said + true)` with the expected hits and true ones.

    Args:
        chances: The probability of a yes for each decision, `(decisions,)`.

    Returns:
        None where too few are to be expected.
    """
    ordered = chances.double().sort(descending=True).values
    expected = float(ordered.sum())
    if not expected >= EXPECTED_MIN:
        return None
    said = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    return min(1.0, float((2 * ordered.cumsum(0) / (said + expected)).max()))


def lowered(fitted: HeadFit, threshold: float, task: Task) -> HeadFit:
    """The head that says yes, by its own half, where this one's probability is above a threshold.

    Args:
        fitted: With a bias.
        threshold: Above 0, at most one half.
    """
    assert fitted.bias is not None
    yes = torch.ones_like(fitted.bias)
    if task.problem_type == SINGLE_LABEL:
        yes[0] = 0
    return HeadFit(fitted.weight, fitted.bias + math.log(1 / threshold - 1) * yes, fitted.penalty, None)
