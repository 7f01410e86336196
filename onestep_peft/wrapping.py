"""The model under its wrappings."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model under an adapter; a plain model is its own base."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def config_of(model: nn.Module) -> Any:
    """The configuration of a model, or of the base under its adapter."""
    return base_of(model).config
