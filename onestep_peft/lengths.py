"""How many tokens a row may have."""

from __future__ import annotations

from typing import Any

from torch import nn

from onestep_peft.wrapping import base_of

# Tokenizers and models that know no limit.
NO_LIMIT = 1_000_000
MAX_LENGTH = 512
# Tokens of the shortest row that is of any use.
ROW_MIN = 2


def positions_of(model: nn.Module) -> int:
    """How many tokens a model has positions for, virtual ones counted; `NO_LIMIT` where it does not say."""
    base = base_of(model)
    for name, module in base.named_modules():
        # RoBERTa and its kin count positions from behind that of the padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    return getattr(base.config, "max_position_embeddings", None) or NO_LIMIT


def check_virtual_tokens(positions: int, virtual_tokens: int) -> None:
    """Raises a ValueError where virtual tokens leave rows no room."""
    if virtual_tokens and virtual_tokens + ROW_MIN > positions:
        raise ValueError(
            f"`num_virtual_tokens={virtual_tokens}` leaves rows no room among the model's {positions} positions. Use "
            f"at most {positions - ROW_MIN}."
        )


def longest_input(tokenizer: Any, positions: int, virtual_tokens: int = 0, max_length: int | None = None) -> int:
    """Where a row's tokens are cut.

    Args:
        positions: Of the model.
        virtual_tokens: How many stand before every row and need positions of their own.
        max_length: What the user wants, or None for the limit of tokenizer and model, at most 512.

    Raises:
        ValueError: The model has no room for `max_length` tokens, or for any behind the virtual ones.
    """
    check_virtual_tokens(positions, virtual_tokens)
    room = positions - virtual_tokens
    if max_length is None:
        return max(ROW_MIN, min(tokenizer.model_max_length, room, MAX_LENGTH))
    if max_length > room:
        virtual = f" less {virtual_tokens} virtual tokens" if virtual_tokens else ""
        raise ValueError(
            f"`max_length={max_length}`, but the model has {positions} positions{virtual}. Use at most {room}."
        )
    return max_length
