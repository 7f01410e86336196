"""The threshold of an F1 by the search rows, for what was not trained by this package."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.metrics import f1_score
from torch import Tensor

from onestep_peft import f1_threshold
from onestep_peft.tasks import TEXT_CLASSIFICATION

from .settings import Setting


def scores(setting: Setting, logits: Any, labels: Any, test_logits: Any, test_labels: Any) -> dict[str, dict[str, Any]]:
    """The test scores with a threshold from the search rows' probabilities ("test"), and from their F1 ("by count").

    Args:
        logits: The search rows', `(rows, 2)`; the next are their labels, and the same of the test rows.
    """
    logits, labels, there = torch.as_tensor(logits).double(), torch.as_tensor(labels), torch.as_tensor(test_logits)
    found = {"test": by_chances(logits, labels), "by count": by_count(logits.softmax(1)[:, 1], labels)}
    shifts = {name: f1_threshold.shift(at, 2, TEXT_CLASSIFICATION) for name, at in found.items()}
    return {
        name: {"threshold": at, **setting.scores(there.double() + shifts[name], test_labels)}
        for name, at in found.items()
    }


def by_chances(logits: Tensor, labels: Tensor) -> float:
    """As one step chooses it."""
    f1 = f1_threshold.best_f1(f1_threshold.chances(logits, labels, TEXT_CLASSIFICATION))
    return 0.5 if f1 is None else f1 / 2


def by_count(chances: Tensor, labels: Tensor) -> float:
    """Where the rows' own F1 is the highest: between two of their probabilities, of several such places the middle."""
    edges = torch.cat([torch.tensor([1e-6], dtype=torch.float64), chances.unique(), torch.tensor([1 - 1e-6]).double()])
    between = (edges[1:] + edges[:-1]) / 2
    found = torch.tensor([f1_score(labels, chances > one, zero_division=0.0) for one in between])
    best = between[found == found.max()]
    return float(best[len(best) // 2])
