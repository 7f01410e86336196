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
from collections.abc import Callable

import torch
from torch import Tensor

from onestep_peft.head import HeadFit, labelled
from onestep_peft.tasks import Task
from onestep_peft.tasks.task import MULTI_LABEL, SINGLE_LABEL, UNLABELLED

# With fewer than so many that are to be expected of the class, nothing is known of its F1.
EXPECTED_MIN = 1.0
# A metric is an F1 of yes if it gives the same on three ways to decide, as far as people round it.
SAME = 1e-3
# A logit that says yes to everything.
ALWAYS = 1e4


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
        decided, true = task.aligned(logits.sigmoid(), labels)
        return decided[true != UNLABELLED]
    return logits.softmax(1)[:, 1]


def best_f1(probabilities: Tensor) -> float | None:
    """The highest F1 to expect by a threshold, `2 · hits / (said + true)` with the expected hits and true ones.

    Args:
        probabilities: Of a yes for each decision, `(decisions,)`.

    Returns:
        None where too few are to be expected.
    """
    ordered = probabilities.double().sort(descending=True).values
    expected = float(ordered.sum())
    if not expected >= EXPECTED_MIN:
        return None
    said = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    return min(1.0, float((2 * ordered.cumsum(0) / (said + expected)).max()))


def f1(logits: Tensor, labels: Tensor, task: Task) -> float:
    """The F1 of the decisions by one half; 0 where nobody says yes and nothing is one."""
    logits, labels = labelled(logits, labels, task)
    said, true = task.aligned(task.predict(logits), labels)
    known = true != UNLABELLED
    said, true = said[known].eq(1), true[known].eq(1)
    either = int(said.sum() + true.sum())
    return 2 * int((said & true).sum()) / either if either else 0.0


def is_f1(metric: Callable[[Tensor], float], logits: Tensor, labels: Tensor, task: Task, threshold: float) -> bool:
    """Whether a metric is the F1 of yes: it is on these items by one half, by a threshold, and for all that say yes.

    Others that go by this name (of class 0, or a mean over classes) differ at the last at the latest.

    Args:
        metric: Logits `(items, outputs)` -> its value.
    """
    yes = _yes(logits.shape[1], task).to(logits)
    ways = (logits, logits + shift(threshold, len(yes), task).to(logits), logits + ALWAYS * yes)
    return all(abs(metric(way) - f1(way, labels, task)) <= SAME for way in ways)


def shift(threshold: float, outputs: int, task: Task) -> Tensor:
    """What is added to logits so that one half stands where a threshold stood: `(outputs,)`."""
    return math.log(1 / threshold - 1) * _yes(outputs, task)


def _yes(outputs: int, task: Task) -> Tensor:
    """1 for each output that stands for a yes, `(outputs,)`."""
    yes = torch.ones(outputs, dtype=torch.float64)
    if task.problem_type == SINGLE_LABEL:
        yes[0] = 0
    return yes


def with_threshold(fitted: HeadFit, threshold: float, task: Task) -> HeadFit:
    """The head that says yes, by one half, where this one's probability is above a threshold. It has a bias."""
    assert fitted.bias is not None
    bias = fitted.bias.double()
    return HeadFit(fitted.weight, bias + shift(threshold, len(bias), task).to(bias), fitted.penalty, None)
