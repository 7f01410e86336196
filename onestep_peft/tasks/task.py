"""What the rest of the package asks of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onestep_peft.tasks.logits import wide

# `problem_type` in the configuration of a sequence classifier, as transformers spells it.
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"

#: What stands for "no label", as in torch's cross-entropy.
UNLABELLED = -100


def unchanged(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and labels that stand opposite each other as they are."""
    return predictions, labels


def number_of_labels(config: Any) -> int:
    """The outputs of a model with a head of its own."""
    return int(config.num_labels)


def no_scores(_loss: float) -> dict[str, float]:
    """Tasks whose loss says no more than itself."""
    return {}


@dataclass(frozen=True)
class Task:
    """One kind of job. The step itself sees only layers, rows and a loss.

    Args:
        name: The Hub's `pipeline_tag`.
        peft_task_type: PEFT's name of it.
        auto_model: The auto class that loads a model for it.
        auto_peft: Name of PEFT's auto class for it.
        class_suffix: How the model classes of this task end.
        metrics: Names of the metrics where the user gives none.
        row_losses: (logits, labels) -> the *sum* of each row's item losses, `(rows,)`, in fp32 or wider. An item
            labelled -100 has none.
        row_items: labels -> how many labelled items (the row itself, or its labelled tokens) each row has, `(rows,)`.
        predict: logits -> what metrics compare with the labels.
        fault: (a row's labels, its number of tokens, the model's outputs) -> what is wrong with them, or None.
        outputs: A model's configuration -> the number of its outputs.
        aligned: (predictions, labels) -> the same two, brought opposite each other.
        class_counts: (logits, labels) -> how many items of each class a row has, and how many of them are found, both
            `(rows, classes)`; None for a task without classes.
        scores_of_loss: Mean loss of the items -> scores that follow from it.
        problem_type: Of a sequence classifier's configuration; None for the other tasks.
        has_head: Whether its models end in a head of their own, which a base may come without.
        by_token: Whether labels stand beside tokens, so that they are padded with them.
    """

    name: str
    peft_task_type: str
    auto_model: Any
    auto_peft: str
    class_suffix: tuple[str, ...]
    metrics: tuple[str, ...]
    row_losses: Callable[[Tensor, Tensor], Tensor]
    row_items: Callable[[Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    fault: Callable[[Any, int, int], str | None]
    outputs: Callable[[Any], int] = number_of_labels
    aligned: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = unchanged
    class_counts: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    scores_of_loss: Callable[[float], dict[str, float]] = no_scores
    problem_type: str | None = None
    has_head: bool = True
    by_token: bool = False

    @property
    def has_classes(self) -> bool:
        """Whether items belong to classes that have names."""
        return self.class_counts is not None


def sum_over_items(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of items with one class each, summed by row: `(rows, ..., classes)`, `(rows, ...)` -> `(rows,)`.

    Only the labelled items' logits are widened: those of a language model are the largest tensors of all.
    """
    known = labels.ne(UNLABELLED)
    losses = nn.functional.cross_entropy(wide(logits[known]), labels[known].long(), reduction="none")
    summed = torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device).masked_scatter(known, losses)
    return summed.reshape(len(labels), -1).sum(1)


def counts_of_classes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For items with one class each: how many a row has of each class, and how many are found, `(rows, classes)`."""
    known = labels.ne(UNLABELLED).reshape(len(labels), -1)
    found = known & logits.argmax(-1).eq(labels).reshape(len(labels), -1)
    classes = labels.long().clamp_min(0).reshape(len(labels), -1)
    empty = torch.zeros(len(labels), logits.shape[-1], device=logits.device)
    return empty.scatter_add(1, classes, known.float()), empty.scatter_add(1, classes, found.float())


def argmax(logits: Tensor) -> Tensor:
    """The likeliest class of each item."""
    return logits.argmax(-1)


def class_fault(label: Any, classes: int) -> str | None:
    """What is wrong with one class number, or None."""
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        return f"label {label!r} is no class number. Give integers from 0 to {classes - 1}, or -100 for no label."
    if int(label) == UNLABELLED or 0 <= int(label) < classes:
        return None
    return (
        f"label {label} is out of range: the model has {classes} classes, 0 to {classes - 1}. "
        "Fix the row, or load the model with a larger `num_labels`."
    )


def tokens_fault(labels: Any, tokens: int, classes: int, what: str) -> str | None:
    """What is wrong with a row of labels that stand beside tokens, or None."""
    if not hasattr(labels, "__len__"):
        return f"`labels` is {labels!r}; {what} takes one label a token, -100 where there is none."
    if len(labels) != tokens:
        return f"{len(labels)} labels for {tokens} tokens. Give one a token, -100 where there is none."
    return next((fault for label in labels if (fault := class_fault(label, classes)) is not None), None)
