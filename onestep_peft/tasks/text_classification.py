"""Text classification: one class a row, any number of classes a row, or a number (regression)."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from onestep_peft.tasks.logits import wide
from onestep_peft.tasks.task import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    UNLABELLED,
    Task,
    argmax,
    class_fault,
    counts_of_classes,
    sum_over_items,
)

COMMON: dict[str, Any] = {
    "name": "text-classification",
    "peft_task_type": "SEQ_CLS",
    "auto_model": AutoModelForSequenceClassification,
    "auto_peft": "AutoPeftModelForSequenceClassification",
    "class_suffix": ("ForSequenceClassification",),
}


TEXT_CLASSIFICATION = Task(
    **COMMON,
    problem_type=SINGLE_LABEL,
    metrics=("accuracy",),
    row_losses=sum_over_items,
    row_items=lambda labels: labels.ne(UNLABELLED),
    predict=argmax,
    fault=lambda label, _tokens, classes: class_fault(label, classes),
    class_counts=counts_of_classes,
)


def _mean_over(losses: Tensor, known: Tensor) -> Tensor:
    """Mean of each row's known entries, zero where it has none: `(rows, k)` -> `(rows,)`."""
    return torch.where(known, losses, 0).sum(1) / known.sum(1).clamp_min(1)


def _multi_label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over the classes, so that a row is one item."""
    known = _known_classes(labels)
    targets = torch.where(known, labels, 0).to(wide(logits))
    return _mean_over(nn.functional.binary_cross_entropy_with_logits(wide(logits), targets, reduction="none"), known)


def _known_classes(labels: Tensor) -> Tensor:
    # Rows that fill up the last batches of several processes are marked by NaN where labels are floats.
    return labels.ne(UNLABELLED) & ~labels.isnan()


def _decisions(labels: Tensor) -> Tensor:
    """Targets as 0 and 1, unlabelled ones as -100."""
    return torch.where(_known_classes(labels), (labels > 0.5).long(), UNLABELLED)


def _multi_label_counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    there = _decisions(labels).eq(1)
    return there.float(), (there & (logits > 0)).float()


def _multi_label_fault(label: Any, _tokens: int, classes: int) -> str | None:
    if not hasattr(label, "__len__"):
        return f"label {label!r} is no list. Multi-label rows have {classes} numbers, 1 for a class that applies."
    if len(label) != classes:
        return f"{len(label)} labels for {classes} classes. Give one number a class, 1 where it applies, else 0."
    bad = [one for one in label if not (isinstance(one, numbers.Real) and (one == UNLABELLED or 0 <= float(one) <= 1))]
    return f"label {bad[0]!r} is not between 0 and 1. Give 1 where the class applies, else 0." if bad else None


MULTI_LABEL_CLASSIFICATION = Task(
    **COMMON,
    problem_type=MULTI_LABEL,
    metrics=("f1", "accuracy"),
    row_losses=_multi_label_losses,
    row_items=lambda labels: _known_classes(labels).any(1),
    predict=lambda logits: (logits > 0).long(),
    fault=_multi_label_fault,
    aligned=lambda predictions, labels: (predictions, _decisions(labels)),
    class_counts=_multi_label_counts,
)


def _squared_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error, averaged over the outputs where there are several. NaN is no label; -100 is a number."""
    labels = labels.reshape(len(labels), -1).to(wide(logits))
    known = ~labels.isnan()
    return _mean_over((wide(logits) - torch.where(known, labels, 0)).square(), known)


def _number_fault(label: Any, _tokens: int, outputs: int) -> str | None:
    values = list(label) if hasattr(label, "__len__") and not isinstance(label, str) else [label]
    bad = next((v for v in values if not isinstance(v, numbers.Real) and not isinstance(v, Tensor)), None)
    if bad is not None:
        return f"label {bad!r} is no number, and the model is a regression."
    if len(values) != outputs:
        return f"{len(values)} numbers for the model's {outputs} outputs. Give as many, NaN where one is not known."
    return None


TEXT_REGRESSION = Task(
    **COMMON,
    problem_type=REGRESSION,
    metrics=("mse", "pearson"),
    row_losses=_squared_errors,
    row_items=lambda labels: ~labels.reshape(len(labels), -1).isnan().all(1),
    predict=wide,
    fault=_number_fault,
)
