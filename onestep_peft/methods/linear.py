"""Which modules are linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def linear_names(model: PreTrainedModel, excluded: Sequence[str]) -> list[str]:
    """Full names of the linear layers (`nn.Linear`, `Conv1D`), less the head's and the output embedding."""
    output = model.get_output_embeddings()
    return [
        module_name
        for module_name, module in model.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or is_quantised(module))
        and module is not output
        and not any(module_name == head or module_name.startswith(f"{head}.") for head in excluded)
    ]


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is packed integers."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")
