"""From what a user hands over (names, rows, a plain model) to what Trainer takes (an adapted model, tokens)."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from onestep_peft import data, head, tasks
from onestep_peft.bases import load_base, load_tokenizer, pinned
from onestep_peft.lengths import positions_of
from onestep_peft.methods import Method, prompt_tuning
from onestep_peft.rows import Sets, Tokeniser, as_rows, is_raw
from onestep_peft.step.layers import Layer
from onestep_peft.tasks import MULTI_LABEL_CLASSIFICATION, TEXT_CLASSIFICATION, Task, task_of
from onestep_peft.wrapping import base_of

# So many rows tell what all rows begin with.
LOOKED_AT = 8


def class_names(sets: Sets, column: str) -> list[str]:
    """Names of the classes for a model that is still to be loaded, from the training rows."""
    names, number = data.count_labels(sets.train, column)
    if names is None:
        # A class that only the other sets have still needs its place.
        number = max(number, *(data.count_labels(rows, column)[1] for _, rows in sets.items() if is_raw(rows)))
        names = [f"LABEL_{i}" for i in range(number)]
    if len(names) < 2:
        raise ValueError(
            f"The training rows have {len(names)} class in column {column!r} ({names}); it takes at least 2."
        )
    return names


def name_labels(model: nn.Module, rows: Dataset, column: str) -> None:
    """Gives the model the names of string labels, where it has as many classes and only default names for them."""
    config: Any = model.config
    if any(not str(name).startswith("LABEL_") for name in config.id2label.values()):
        return
    names = data.label_names(rows, column)
    if names is not None and len(names) == config.num_labels:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}


def name_alike(config: Any, template: Any) -> None:
    """Gives a model the classes' names and the kind of problem that another one's configuration has."""
    for name in ("id2label", "label2id", "problem_type"):
        if hasattr(template, name):
            setattr(config, name, copy.copy(getattr(template, name)))


@dataclass
class Prepared:
    """A model that is not adapted yet, its task, its tokenizer, tokenised sets, and how to tokenise more."""

    model: nn.Module
    task: Task
    processing_class: Any
    sets: Sets
    tokenise: Tokeniser


def prepare(
    model: nn.Module | str,
    processing_class: Any,
    sets: Sets,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    task: str | None = None,
    max_length: int | None = None,
    virtual_tokens: int = 0,
) -> Prepared:
    """Finds the task and the columns, loads the model where it is given by name, names its classes, tokenises the rows.

    Args:
        text: The user's word for the columns with the text.
        label: And for that with the label.
        task: Its name; None for what the model's class or else the columns say.
        max_length: Tokens of a row.
        virtual_tokens: How many stand before every row.

    Raises:
        ValueError: Rows, columns, labels or a base that cannot be used; before any expensive work.
    """
    sets = sets.map(as_rows)
    raw = [(name, rows) for name, rows in sets.items() if is_raw(rows)]
    for name, rows in raw:
        data.check_some(rows, name)
    kind = _kind_of(model, sets.train, task, text, label)
    columns = data.guess_columns(raw[0][1], text, label, kind) if raw else None
    for name, rows in raw:
        assert columns is not None
        data.check_columns(rows, columns, name)
    if isinstance(model, str):
        processing_class = processing_class or load_tokenizer(model, spaced=kind is tasks.TOKEN_CLASSIFICATION)
        model = _loaded(model, kind, sets, columns)
    elif kind.has_classes and columns is not None and columns.label is not None and is_raw(sets.train):
        name_labels(model, sets.train, columns.label)
    assert isinstance(model, nn.Module)
    if kind in (tasks.MULTI_LABEL_CLASSIFICATION, tasks.TEXT_REGRESSION):
        config: Any = base_of(model).config
        config.problem_type = kind.problem_type  # so that it is saved
    positions = positions_of(model)
    tokenise = Tokeniser(processing_class, columns, model.config, kind, positions, max_length, virtual_tokens)
    return Prepared(model, kind, processing_class, sets.map(tokenise), tokenise)


def _kind_of(
    model: nn.Module | str, rows: Any, task: str | None, text: str | Sequence[str] | None, label: str | None
) -> Task:
    """The task that the user names, or that the model's class or the columns stand for."""
    raw = is_raw(rows)
    if isinstance(model, str):
        named = tasks.named(task) if task is not None else None
        if raw and (named is None or named is TEXT_CLASSIFICATION):
            guessed = data.guess_task(rows, text, label)
            return guessed if named is None or guessed.name == named.name else named
        if named is None:
            raise ValueError(
                f"`model={model!r}` is a name, so its task and classes must come from rows with text. Load the model."
            )
        return named
    kind = task_of(model)
    if task is not None and tasks.named(task).name != kind.name:
        raise ValueError(
            f"`task={task!r}`, but {type(base_of(model)).__name__} is for {kind.name}. Leave `task` out, or load the "
            "model with the task's auto class."
        )
    if kind is TEXT_CLASSIFICATION and base_of(model).config.problem_type is None and _has_lists(rows, label):
        return MULTI_LABEL_CLASSIFICATION
    return kind


def _has_lists(rows: Any, label: str | None) -> bool:
    """Whether rows have several labels each."""
    if not isinstance(rows, Dataset):
        return False
    names = [label] if label else [name for name in data.LABEL_COLUMNS if name in rows.column_names]
    return any(hasattr(rows.features.get(name), "feature") for name in names)


def _loaded(name: str, task: Task, sets: Sets, columns: data.Columns | None) -> Any:
    if not task.has_classes:
        return load_base(name, task, [])
    if columns is None or columns.label is None or not is_raw(sets.train):
        raise ValueError(f"`model={name!r}` is a name, so its classes must come from rows with text. Load the model.")
    return load_base(name, task, class_names(sets, columns.label))


@dataclass
class Adapted:
    """A model as it is trained.

    Args:
        model: A PeftModel, or the model itself for full weights.
        method: What of it moves.
        fresh: Names of the modules that no checkpoint filled.
        head: Name of the head's last layer where it is fresh, else None.
        base_revision: The base's commit, or None for a folder.
    """

    model: nn.Module
    method: Method
    task: Task
    fresh: Sequence[str]
    head: str | None
    base_revision: str | None


def first_token(rows: Any, token_id: int | None) -> int | None:
    """The token, if the first few rows all begin with it, padding aside; else None."""
    if token_id is None:
        return None
    for row in (rows[i] for i in range(min(len(rows), LOOKED_AT))):
        mask = row.get("attention_mask") or [1] * len(row["input_ids"])
        there = [token for token, real in zip(row["input_ids"], mask, strict=True) if real]
        if not there or int(there[0]) != token_id:
            return None
    return token_id


def adapt(
    model: nn.Module, method: Method, peft_config: Any, *, pad_token_id: int | None, first_token_id: int | None
) -> Adapted:
    """Puts the adapter on a plain model, or takes a PeftModel as it is.

    Args:
        pad_token_id: What rows are padded with; decoders find a row's last token by it.
        first_token_id: What rows begin with, whatever they say.

    Raises:
        ValueError: A task, a head or an adapter that one step does not know.
    """
    task = task_of(model)
    base = base_of(model)
    classes = getattr(base.config, "num_labels", 0)
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad_token_id
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("The model has an adapter already, so `peft_config` has nothing to say. Leave it out.")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("The model's adapter is frozen. Load it with `is_trainable=True`.")
        config = model.peft_config[str(model.active_adapter)]
        method.validate(config)
        _check_task(config, task)
        fresh = head.fresh_copies(base) if task.has_head and _is_untrained(model, method) else []
        config.revision = _commit(base, config)
        return Adapted(model, method, task, fresh, head.last_layer(base, fresh, classes), config.revision)
    if peft_config is None:
        peft_config = method.default()
    _check_task(peft_config, task)
    fresh = head.fresh_modules(model) if task.has_head else []
    last = head.last_layer(model, fresh, classes)
    # A copy: a configuration that is used for two models must not carry the first one's layers to the second.
    config = copy.deepcopy(peft_config)
    commit = _commit(base, config)
    if config is not None:
        config.revision = commit
    wrapped = method.wrap(base, config, fresh, commit, task.peft_task_type)
    prompt_tuning.begin_like_a_row(wrapped, first_token_id)
    return Adapted(wrapped, method, task, fresh, last, commit)


def _commit(base: PreTrainedModel, config: Any) -> str | None:
    """The base's commit; None for a folder, whatever revision a configuration that came from elsewhere names.

    A branch or a tag may move on, so what it stands for now is kept in its place.
    """
    name, revision = base.config.name_or_path, getattr(config, "revision", None)
    if not name or os.path.isdir(name):
        return None
    return pinned(name, revision) or revision


def _check_task(config: Any, task: Task) -> None:
    if getattr(config, "task_type", None) not in (None, task.peft_task_type):
        raise ValueError(
            f"`task_type={config.task_type!s}` in the adapter's configuration, but the model is for {task.name}, which "
            f"PEFT calls {task.peft_task_type}. Leave `task_type` out."
        )


def _is_untrained(model: PeftModel, method: Method) -> bool:
    """Whether an adapter stands as it was made, so that the head beside it may be fresh too."""
    layers = method.layers(model, None)
    written = [layer.read() for layer in layers if isinstance(layer, Layer) and layer.read is not None]
    return all(update is None for update in written) and head.copies_are_as_made(model)
