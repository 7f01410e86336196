"""A base by name: its tokenizer, the model for a task, and the commit that it was loaded at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from onestep_peft.tasks import Task
from onestep_peft.tasks.task import SINGLE_LABEL


def load_tokenizer(base: str, revision: str | None = None, *, spaced: bool = False) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token.

    Args:
        spaced: Whether it is for single words: byte-level tokenizers then put a space before each.

    Raises:
        ValueError: The base cannot be found.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
        if spaced and getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, add_prefix_space=True)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(base, "tokenizer", error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: str, task: Task, labels: Sequence[str], revision: str | None = None, outputs: int | None = None
) -> PreTrainedModel:
    """A base model for a task, with these classes where it has any.

    Args:
        outputs: Number of the head's outputs where they are no classes; default 1.

    Raises:
        ValueError: The base cannot be found.
    """
    options: dict[str, Any] = {}
    if task.has_classes:
        id2label = dict(enumerate(labels))
        options = {"id2label": id2label, "label2id": {label: i for i, label in id2label.items()}}
    if task.has_head:
        options["num_labels"] = len(labels) or outputs or 1
    if task.problem_type not in (None, SINGLE_LABEL):
        options["problem_type"] = task.problem_type
    try:
        AutoConfig.from_pretrained(base, revision=revision)
        revision = pinned(base, revision) or revision
        return task.auto_model.from_pretrained(base, revision=revision, **options)
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
