"""What differs by task: the model class, the columns, the loss of a row, the default metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification


@dataclass(frozen=True)
class Task:
    """One kind of job. The step itself sees only layers, rows and a loss.

    Args:
        name: The Hub's `pipeline_tag`.
        peft_task_type: PEFT's name of it.
        auto_model: The auto class that loads a model for it.
        class_suffix: How the model classes of this task end.
        metrics: Names of the metrics where the user gives none.
        row_losses: (logits, labels) -> the *sum* of each row's item losses, `(rows,)`, fp32. An item labelled -100 has
            none.
        row_items: labels -> how many labelled items (the row itself, or its labelled tokens) each row has, `(rows,)`.
    """

    name: str
    peft_task_type: str
    auto_model: Any
    class_suffix: str
    metrics: tuple[str, ...]
    row_losses: Callable[[Tensor, Tensor], Tensor]
    row_items: Callable[[Tensor], Tensor]


def _classification_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels.long(), reduction="none", ignore_index=-100)


def _labelled(labels: Tensor) -> Tensor:
    return labels.ne(-100)


TEXT_CLASSIFICATION = Task(
    name="text-classification",
    peft_task_type="SEQ_CLS",
    auto_model=AutoModelForSequenceClassification,
    class_suffix="ForSequenceClassification",
    metrics=("accuracy",),
    row_losses=_classification_losses,
    row_items=_labelled,
)
TASKS = (TEXT_CLASSIFICATION,)


def task_of(model: nn.Module) -> Task:
    """The task of a model, by its class name.

    Raises:
        ValueError: No task fits, or the head's loss is not a mean of the rows' losses.
    """
    get_base = getattr(model, "get_base_model", None)
    name = type(get_base() if get_base is not None else model).__name__
    for task in TASKS:
        if name.endswith(task.class_suffix):
            return task
    known = ", ".join(f"{task.name} (…{task.class_suffix})" for task in TASKS)
    raise ValueError(
        f"{name} has no task that one step knows. Known: {known}. Load the model with the matching auto class."
    )


def task_named(name: str) -> Task:
    """The task that a report names.

    Raises:
        ValueError: This release does not know it.
    """
    for task in TASKS:
        if task.name == name:
            return task
    known = ", ".join(task.name for task in TASKS)
    raise ValueError(f"The task {name!r} is none that this release knows: {known}. Upgrade onestep-peft.")


def check_problem_type(config: Any) -> None:
    """Refuses heads whose labels are not one class a row.

    Raises:
        ValueError: A regression or multi-label head.
    """
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"`problem_type={problem!r}`: one step knows heads with one class a row. Set "
            '`model.config.problem_type = "single_label_classification"`, or leave it out.'
        )
    if config.num_labels < 2:
        raise ValueError(
            f"The model has num_labels={config.num_labels}, a regression head; text classification needs at least 2 "
            "classes. Load the model with `num_labels=` the number of classes."
        )


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model's output, whichever form it has."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"The model returned {type(logits).__name__} as logits, not a tensor.")
    return logits


def logits_for(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The model's logits for the tokens of its inputs.

    Under prompt tuning a model answers for its virtual tokens too. They are cut off here and nowhere else.

    Args:
        inputs: As the model takes them, without labels: the task has the loss.
    """
    logits = logits_of(model(**inputs))
    return logits[:, -inputs["input_ids"].shape[1] :] if logits.dim() == 3 else logits
