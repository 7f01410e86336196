"""From what a user hands over (names, rows, a plain model) to what Trainer takes (an adapted model, tokens)."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from onestep_peft import data, head
from onestep_peft.methods import Method
from onestep_peft.step.layers import Layer
from onestep_peft.tasks import TEXT_CLASSIFICATION, Task, check_problem_type, task_of
from onestep_peft.wrapping import base_of

# Tokenizers that know no limit say so with a huge number.
NO_LIMIT = 1_000_000
MAX_LENGTH = 512


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token.

    Raises:
        ValueError: The base cannot be found.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(base, "tokenizer", error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(base: str, labels: Sequence[str], revision: str | None = None) -> PreTrainedModel:
    """A base model for text classification with these classes.

    Raises:
        ValueError: The base cannot be found.
    """
    id2label = dict(enumerate(labels))
    label2id = {label: i for i, label in id2label.items()}
    try:
        AutoConfig.from_pretrained(base, revision=revision)
        revision = pinned(base, revision) or revision
        return TEXT_CLASSIFICATION.auto_model.from_pretrained(
            base, revision=revision, num_labels=len(labels), id2label=id2label, label2id=label2id
        )
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(base, "model", error)) from error


def pinned(base: str | None, revision: str | None = None) -> str | None:
    """The commit that a base on the Hub was loaded at, as the cache has it; None for a folder.

    transformers 5 does not keep it. Without a pin, an adapter would follow whatever its base becomes.
    """
    if not base or os.path.isdir(base):
        return None
    found = try_to_load_from_cache(base, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _not_found(base: str, what: str, error: Exception) -> str:
    return (
        f"The base {base!r} has no {what} that can be loaded: it is no folder here, or the Hub does not give it "
        f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Check the name, the network, and "
        "`hf auth login` for a private or gated one."
    )


def as_rows(name: str, rows: Any) -> Any:
    """Lists of dicts and pandas frames become a `datasets.Dataset`; other sets stay.

    Raises:
        ValueError: A dict of splits, where one set is wanted.
    """
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{name} is a dict of sets with the keys {list(rows)}. Pass one of them, such as rows['train']."
        )
    if type(rows).__name__ == "DataFrame":
        return Dataset.from_pandas(rows, preserve_index=False)
    return Dataset.from_list(list(rows)) if isinstance(rows, list | tuple) else rows


def is_raw(rows: Any) -> bool:
    """Whether rows still hold text."""
    return isinstance(rows, Dataset) and "input_ids" not in rows.column_names


@dataclass
class Sets:
    """The sets that a run uses, by role; each a raw or tokenised set, or None."""

    train: Any
    search: Any
    evaluation: Any  # may be a dict of sets by name

    def items(self) -> list[tuple[str, Any]]:
        """Names for messages and the sets that are there."""
        sets = [("train_dataset", self.train), ("search_dataset", self.search)]
        if isinstance(self.evaluation, Mapping):
            sets += [(f"eval_dataset[{name!r}]", rows) for name, rows in self.evaluation.items()]
        else:
            sets.append(("eval_dataset", self.evaluation))
        return [(name, rows) for name, rows in sets if rows is not None]

    def map(self, change: Any) -> Sets:
        """The sets with `change(name, rows)` done to each."""
        done = {name: change(name, rows) for name, rows in self.items()}
        if isinstance(self.evaluation, Mapping):
            evaluation: Any = {name: done[f"eval_dataset[{name!r}]"] for name in self.evaluation}
        else:
            evaluation = done.get("eval_dataset")
        return Sets(done.get("train_dataset"), done.get("search_dataset"), evaluation)


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


@dataclass(frozen=True)
class Tokeniser:
    """Makes tokens and integer labels of rows with text; rows that are tokens already are only checked.

    Args:
        tokenizer: None where no set holds text.
        columns: None where no set holds text.
        config: The model's configuration: its classes and its longest input.
    """

    tokenizer: Any
    columns: data.Columns | None
    config: Any

    def __call__(self, name: str, rows: Any, *, labelled: bool = True) -> Any:
        """The set `name` as the model takes it; rows to predict may come without labels."""
        rows = as_rows(name, rows)
        if not is_raw(rows):
            return check_tokenised(name, rows, self.config.num_labels) if labelled else rows
        if self.tokenizer is None or self.columns is None:
            raise ValueError(f"{name} holds text, so `processing_class=` must be the model's tokenizer.")
        columns = self.columns
        if not labelled and columns.label not in rows.column_names:
            columns = data.Columns(columns.text, None)
        data.check_columns(rows, columns, name)
        max_length = longest_input(self.tokenizer, self.config)
        return data.tokenise(
            rows, columns, self.tokenizer, self.config.label2id, self.config.num_labels, max_length, name
        )


def longest_input(tokenizer: Any, config: Any) -> int:
    """Where a row's tokens are cut: the limit of the tokenizer or of the model, else 512."""
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    return min(limits) if min(limits) < NO_LIMIT else MAX_LENGTH


def check_tokenised(name: str, rows: Any, classes: int) -> Any:
    """Checks a tokenised set: some rows, labels there and in range.

    Raises:
        ValueError: It is empty or has no length, no labels, or a label that is no class.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError(f"{name} has no length; one step needs to know its rows. Pass a map-style dataset.")
    data.check_some(rows, name)
    names = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
    column = next((column for column in ("labels", "label") if column in names), None)
    if column is None or (column == "label" and not isinstance(rows, Dataset)):
        raise ValueError(f"{name} has no column 'labels'; its columns are {names}.")
    for i, label in enumerate(rows[column] if isinstance(rows, Dataset) else [row[column] for row in rows]):
        if label != -100 and not 0 <= label < classes:
            raise data.out_of_range(name, i, label, classes)
    return rows.rename_column("label", "labels") if isinstance(rows, Dataset) and column == "label" else rows


@dataclass
class Prepared:
    """A model that is not adapted yet, its tokenizer, tokenised sets, and how to tokenise more."""

    model: nn.Module
    processing_class: Any
    sets: Sets
    tokenise: Tokeniser


def prepare(
    model: nn.Module | str, processing_class: Any, sets: Sets, text: str | Sequence[str] | None, label: str | None
) -> Prepared:
    """Finds the columns, loads the model where it is given by name, names its classes, tokenises the rows.

    Raises:
        ValueError: Rows, columns, labels or a base that cannot be used; before any expensive work.
    """
    sets = sets.map(as_rows)
    raw = [(name, rows) for name, rows in sets.items() if is_raw(rows)]
    for name, rows in raw:
        data.check_some(rows, name)
    columns = data.guess_columns(raw[0][1], text, label) if raw else None
    for name, rows in raw:
        assert columns is not None
        data.check_columns(rows, columns, name)
    if isinstance(model, str):
        if columns is None or columns.label is None or not is_raw(sets.train):
            raise ValueError(
                f"`model={model!r}` is a name, so its classes must come from rows with text. Load the model."
            )
        processing_class = processing_class or load_tokenizer(model)
        model = load_base(model, class_names(sets, columns.label))
    task_of(model)
    check_problem_type(model.config)
    if columns is not None and columns.label is not None and is_raw(sets.train):
        name_labels(model, sets.train, columns.label)
    tokenise = Tokeniser(processing_class, columns, model.config)
    return Prepared(model, processing_class, sets.map(tokenise), tokenise)


@dataclass
class Adapted:
    """A model as it is trained.

    Args:
        model: A PeftModel, or the model itself for full weights.
        method: What of it moves.
        head: Name of the head's last layer where it is fresh, else None.
        base_revision: The base's commit, or None for a folder.
    """

    model: nn.Module
    method: Method
    task: Task
    head: str | None
    base_revision: str | None


def adapt(model: nn.Module, method: Method, peft_config: Any, pad_token_id: int | None) -> Adapted:
    """Puts the adapter on a plain model, or takes a PeftModel as it is.

    Args:
        pad_token_id: What rows are padded with; decoders find a row's last token by it.

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
        fresh = head.fresh_copies(base) if _is_untrained(model, method) else []
        return Adapted(model, method, task, head.last_layer(base, fresh, classes), config.revision)
    if peft_config is None:
        peft_config = method.default()
    fresh = head.fresh_modules(model)
    last = head.last_layer(model, fresh, classes)
    # A copy: a configuration that is used for two models must not carry the first one's layers to the second.
    config = copy.deepcopy(peft_config)
    revision = getattr(config, "revision", None) or pinned(base.config.name_or_path)
    return Adapted(method.wrap(base, config, fresh, revision, task.peft_task_type), method, task, last, revision)


def _is_untrained(model: PeftModel, method: Method) -> bool:
    """Whether an adapter stands as it was made, so that the head beside it may be fresh too."""
    layers = method.layers(model, None)
    written = [layer.read() for layer in layers if isinstance(layer, Layer) and layer.read is not None]
    return all(update is None for update in written) and head.copies_are_as_made(model)
