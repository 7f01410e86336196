"""What differs by task: the model class, the loss of a row, what is predicted, the default metrics; a file each."""

from __future__ import annotations

from typing import Any

from torch import nn

from onestep_peft.errors import nearest
from onestep_peft.tasks.logits import logits_for, logits_of
from onestep_peft.tasks.task import REGRESSION, SINGLE_LABEL, Task
from onestep_peft.tasks.text_classification import (
    MULTI_LABEL_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_REGRESSION,
)
from onestep_peft.tasks.text_generation import TEXT_GENERATION
from onestep_peft.tasks.token_classification import TOKEN_CLASSIFICATION

__all__ = [
    "MULTI_LABEL_CLASSIFICATION", "TASKS", "TEXT_CLASSIFICATION", "TEXT_GENERATION", "TEXT_REGRESSION",
    "TOKEN_CLASSIFICATION", "Task", "logits_for", "logits_of", "named", "task_of",
]  # fmt: skip

TASKS = (TEXT_CLASSIFICATION, MULTI_LABEL_CLASSIFICATION, TEXT_REGRESSION, TOKEN_CLASSIFICATION, TEXT_GENERATION)


def named(name: str, problem_type: str | None = None) -> Task:
    """The task of this name; text classification has one for each `problem_type` of a model's configuration.

    Raises:
        ValueError: No such task.
    """
    tasks = [task for task in TASKS if task.name == name]
    if not tasks:
        names = sorted({task.name for task in TASKS})
        raise ValueError(f"`task={name!r}` is none of {', '.join(names)}.{nearest(str(name), names)}")
    fitting = [task for task in tasks if task.problem_type == problem_type]
    if problem_type is not None and len(tasks) > 1 and not fitting:
        known = [str(task.problem_type) for task in tasks]
        raise ValueError(
            f"`problem_type={problem_type!r}` in the model's configuration is none of {', '.join(known)}."
            f"{nearest(problem_type, known)}"
        )
    return (fitting or tasks)[0]


def task_of(model: nn.Module) -> Task:
    """The task of a model, by its class name and the `problem_type` of its configuration.

    A model with one output and no `problem_type` is a regression, as transformers has it.

    Raises:
        ValueError: No task fits.
    """
    get_base = getattr(model, "get_base_model", None)
    base: Any = get_base() if get_base is not None else model
    name = type(base).__name__
    for task in TASKS:
        if name.endswith(task.class_suffix):
            problem = getattr(base.config, "problem_type", None)
            if problem is None and task.problem_type is not None:
                problem = REGRESSION if base.config.num_labels == 1 else SINGLE_LABEL
            return named(task.name, problem)
    suffixes = {task.name: " or ".join(f"…{suffix}" for suffix in task.class_suffix) for task in TASKS}
    known = ", ".join(f"{task} ({suffix})" for task, suffix in suffixes.items())
    raise ValueError(
        f"{name} has no task that one step knows. Known: {known}. Load the model with the matching auto class."
    )
