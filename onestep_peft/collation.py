"""How rows become batches: padded on the right, labels beside their tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from onestep_peft.held_out import listed
from onestep_peft.tasks import Task


def collator_for(task: Task, tokenizer: Any, prompted: bool) -> Callable[..., Any] | None:
    """The collator where the user gives none; None leaves it to Trainer.

    Tokens with labels, and rows behind a prompt, are padded on the right whatever the tokenizer says: padding before a
    row would shift its positions by the longest row of its batch. The tokenizer itself stays as it is: what is saved
    generates with padding on the left, where its author wants it so.

    Args:
        prompted: Whether virtual tokens stand before every row.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not (task.by_token or prompted):
        return None
    right = copy.copy(tokenizer)
    right.padding_side = "right"
    if right.pad_token is None:  # padding is masked and has no label, so any token will do
        right.pad_token = right.eos_token or right.unk_token
    return DataCollatorForTokenClassification(right) if task.by_token else DataCollatorWithPadding(right)


def check_lengths(rows: Any, task: Task, collator: Any, tokenizer: Any) -> None:
    """Refuses rows of different lengths that nothing can pad.

    Raises:
        ValueError: Neither a tokenizer nor a collator, and a token task with rows of different lengths.
    """
    if not task.by_token or collator is not None or tokenizer is not None:
        return
    lengths = {len(row["input_ids"]) for row in listed(rows)}
    if len(lengths) > 1:
        raise ValueError(
            f"Rows of {min(lengths)} to {max(lengths)} tokens must be padded, and nothing here can do it. Pass the "
            "model's tokenizer as `processing_class=`, or a `data_collator=`."
        )
