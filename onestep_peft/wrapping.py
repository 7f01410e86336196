"""The model under its wrappings."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from onestep_peft.tasks import Task


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model under an adapter; a plain model is its own base."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def config_of(model: nn.Module) -> Any:
    """The configuration of a model, or of the base under its adapter."""
    return base_of(model).config


def labels_of(config: Any, task: Task) -> list[str]:
    """Names of a model's classes in the order of their numbers; none where the task has no classes."""
    return [str(config.id2label[i]) for i in range(config.num_labels)] if task.has_classes else []


def described(model: nn.Module) -> dict[str, Any]:
    """The active adapter's configuration as plain values; empty for a plain model."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[str(model.active_adapter)].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
