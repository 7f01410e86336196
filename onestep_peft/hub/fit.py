"""Whether saved weights belong to the model that they are for: told from shapes alone, before any memory is spent."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PromptLearningConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from onestep_peft.hub.inspection import ADAPTER_WEIGHTS, CONFIG, Shapes


def check_adapter(skeleton: PreTrainedModel, config: PeftConfig, found: Shapes) -> None:
    """Whether an adapter's weights are those that its configuration makes room for on this base.

    Args:
        skeleton: The base without weights, on the device "meta".
        found: The weights' shapes.

    Raises:
        ValueError: They are not; the message names the first that differ.
    """
    kind = type(skeleton).__name__
    try:
        wanted, optional = _room(skeleton, config)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, IndexError, re.error) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"The adapter does not fit the base, a {kind}: {reason}") from error
    for name, shape in optional.items():
        if found.get(name, shape) != shape:
            raise ValueError(
                f"The adapter does not fit the base, a {kind}: {name!r} in {ADAPTER_WEIGHTS} is {_by(found[name])}, "
                f"and its place is {_by(shape)}."
            )
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has no place for", found.keys() - optional.keys())):
        if names:
            who = ADAPTER_WEIGHTS if what == "lacks" else "the base"
            raise ValueError(f"The adapter does not fit the base, a {kind}: {who} {what} {min(names)!r}{_more(names)}.")


def _room(skeleton: PreTrainedModel, config: PeftConfig) -> tuple[Shapes, Shapes]:
    """The shapes of an adapter's weights on this base, by the names that PEFT saves them under.

    Returns:
        Those that it must have, and those with what may stand beside them: where `target_modules` name a language
        model's head, PEFT saves the head's own weights too.
    """
    embedding: Any = skeleton.get_input_embeddings()
    if isinstance(config, PromptLearningConfig) and config.token_dim != embedding.embedding_dim:
        raise ValueError(
            f"its virtual tokens have {config.token_dim} numbers each, and the base's {embedding.embedding_dim}."
        )
    config = copy.deepcopy(config)
    config.inference_mode = True  # no words of a prompt are looked up
    config.base_model_name_or_path = None
    with torch.device("meta"):
        model: Any = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the head is among the targets
        must, may = (get_peft_model_state_dict(model, save_embedding_layers=option) for option in (False, "auto"))
    return _shapes(must), _shapes(may)


def _shapes(room: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in room.items()}


def check_model(skeleton: PreTrainedModel, found: Shapes) -> None:
    """Whether a whole model's weights are those that its configuration describes.

    transformers may save some under other names than the model has; names that are missing are told when it loads.

    Raises:
        ValueError: A weight of another shape, or a model that is larger than its weights.
    """
    kind = type(skeleton).__name__
    for name, value in skeleton.state_dict().items():
        if found.get(name, tuple(value.shape)) != tuple(value.shape):
            raise ValueError(
                f"{CONFIG} describes a {kind} whose {name!r} is {_by(tuple(value.shape))}, but the weights have "
                f"{_by(found[name])}. Download or save it again."
            )
    described, saved = sum(p.numel() for p in skeleton.parameters()), sum(math.prod(shape) for shape in found.values())
    if described > saved:
        raise ValueError(
            f"{CONFIG} describes a {kind} of {described:,} numbers, and the weights are {saved:,}. Download or save it "
            "again."
        )


def check_all_found(missing: set[str]) -> None:
    """Raises a ValueError for parameters that no file has filled, so that they would be random."""
    if missing:
        raise ValueError(f"The weights lack {min(missing)!r}{_more(missing)}. Download or save the folder again.")


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a number"


def _more(names: Any) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
