"""A base by name: its tokenizer, the model for a task, and the commit that it was loaded at."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from onestep_peft.errors import without_secrets
from onestep_peft.tasks import Task
from onestep_peft.tasks.task import SINGLE_LABEL

# What transformers raises for a base that is not there, or is broken.
UNREADABLE = (OSError, ValueError, StrictDataclassError, UnpicklingError)


def load_tokenizer(base: str, revision: str | None = None, *, spaced: bool = False) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token.

    Args:
        spaced: Whether it is for single words: byte-level tokenizers then put a space before each.

    Raises:
        ValueError: The base cannot be found, or needs code of its own.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
        if spaced and getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = AutoTokenizer.from_pretrained(
                base, revision=revision, trust_remote_code=False, add_prefix_space=True
            )
    except UNREADABLE as error:
        raise ValueError(_not_found(base, "tokenizer", error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(
    base: str, task: Task, labels: Sequence[str], revision: str | None = None, outputs: int | None = None
) -> PreTrainedConfig:
    """The configuration of a base for a task, with these classes where it has any.

    Args:
        outputs: Number of the head's outputs where they are no classes; default 1.

    Raises:
        ValueError: The base cannot be found, or needs code of its own.
    """
    try:
        return AutoConfig.from_pretrained(
            base, revision=revision, trust_remote_code=False, **_options(task, labels, outputs)
        )
    except UNREADABLE as error:
        raise ValueError(_not_found(base, "model", error)) from error


def skeleton(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """A model without weights: its tensors have shapes, and no numbers or memory.

    Raises:
        ValueError: No model can be made of the configuration.
    """
    try:
        with torch.device("meta"):
            return task.auto_model.from_config(config, trust_remote_code=False)
    except Exception as error:  # every architecture has its own way to fail where a number makes no sense
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The configuration of {config.name_or_path!r} describes no model for {task.name} ({said}). Download it "
            "again, or name another base."
        ) from error


def load_base(
    base: str,
    task: Task,
    labels: Sequence[str],
    revision: str | None = None,
    outputs: int | None = None,
    *,
    allow_pickle: bool | None = None,
    **options: Any,
) -> Any:
    """A base model for a task, with these classes where it has any. No code of its own is run, and nobody is asked.

    Args:
        outputs: Number of the head's outputs where they are no classes; default 1.
        allow_pickle: Whether weights that are there as a pickle only may be read, as torch reads them: tensors alone,
            no other objects. None reads them and warns: what is trained on them can be loaded only if one says so.
        **options: For `from_pretrained`.

    Raises:
        ValueError: The base cannot be found, needs code of its own, or is a pickle.
    """
    load_config(base, task, labels, revision, outputs)
    revision = pinned(base, revision) or revision
    options |= {"revision": revision, "trust_remote_code": False, **_options(task, labels, outputs)}
    try:
        return _from_pretrained(base, task, use_safetensors=True, **options)
    except ValueError as error:
        if SAFE_WEIGHTS_NAME not in str(error):
            raise
        if allow_pickle is False:
            raise ValueError(_no_safetensors(base)) from error
    model = _from_pretrained(base, task, use_safetensors=False, **options)
    if allow_pickle is None:
        warnings.warn(
            f"The base {base!r} has its weights in a pickle, and no others. `load` and `onestep push` read it only if "
            "they are told: `allow_pickle=True` (`--allow-pickle`). To be rid of it, save the base once more with "
            "`save_pretrained` and train on that.",
            stacklevel=2,
        )
    return model


def _from_pretrained(base: str, task: Task, *, output_loading_info: bool = False, **options: Any) -> Any:
    try:
        model, found = task.auto_model.from_pretrained(base, output_loading_info=True, **options)
    except UNREADABLE as error:
        raise ValueError(_not_found(base, "model", error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The base {base!r} has weights of other shapes than this task's: most often a head with another number of "
            "classes. Name a base without a head or with a fitting one; or load it yourself, with "
            "`ignore_mismatched_sizes=True`, and pass that model to OneStepTrainer."
        ) from error
    missing = found["missing_keys"]
    # A head is fitted and saved with the rest; nothing does that for a part of a language model.
    if missing and not task.has_head:
        raise ValueError(
            f"The base {base!r} lacks {min(missing)!r}, without which it is no model for {task.name}: it would be "
            f"random, and another one each time. Name a base whose class is a {type(model).__name__}."
        )
    return (model, found) if output_loading_info else model


def _options(task: Task, labels: Sequence[str], outputs: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if task.has_classes:
        id2label = dict(enumerate(labels))
        options = {"id2label": id2label, "label2id": {label: i for i, label in id2label.items()}}
    if task.has_head:
        options["num_labels"] = len(labels) or outputs or 1
    if task.problem_type not in (None, SINGLE_LABEL):
        options["problem_type"] = task.problem_type
    return options


def pinned(base: str | None, revision: str | None = None) -> str | None:
    """The commit that a base on the Hub was loaded at, as the cache has it; None for a folder.

    transformers 5 does not keep it. Without a pin, an adapter would follow whatever its base becomes.
    """
    if not base or os.path.isdir(base):
        return None
    found = try_to_load_from_cache(base, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _no_safetensors(base: str) -> str:
    return (
        f"The base {base!r} has no weights in safetensors. Those of a pickle (pytorch_model.bin), which can run any "
        "program when it is read, are not read unasked: save the base once more with `save_pretrained` and name that "
        "folder; or, if you trust whoever made it, say `allow_pickle=True` (`--allow-pickle` in the shell)."
    )


def _not_found(base: str, what: str, error: Exception) -> str:
    said = without_secrets(str(error).strip())
    if "trust_remote_code" in said:
        return (
            f"The base {base!r} needs program code of its own, from its repository, for its {what}, and none is run "
            "here. If you trust it, load it yourself with transformers' `trust_remote_code=True`, and pass that model "
            "to OneStepTrainer, or put the adapter on it with `PeftModel.from_pretrained`."
        )
    return (
        f"The base {base!r} has no {what} that can be loaded: it is no folder here, or the Hub does not give it "
        f"({type(error).__name__}: {said.splitlines()[0]}). Check the name, the network, and `hf auth login` for a "
        "private or gated one."
    )
