"""A model's logits, for its inputs' own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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


def wide(logits: Tensor) -> Tensor:
    """Logits in fp32, or as they are in float64: losses are never taken in 16 bits."""
    return logits if logits.dtype == torch.float64 else logits.float()
