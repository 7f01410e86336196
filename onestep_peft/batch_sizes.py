"""How many rows go through the model at a time, where nobody has said it."""

from __future__ import annotations

# Rows of a micro-batch, and of a batch of forwards.
USUAL = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32}
# On the CPU so many rows at a time are multiplied as fast as more, and need less padding where a slice has few rows.
ROWS_ON_A_CPU = 8
# A GPU waits for Python unless a batch has so many tokens, times the model's parameters.
WORK_FOR_A_GPU = 200_000_000_000


def rows_for_a_gpu(tokens: int, parameters: int) -> int:
    """How many rows keep a GPU busy, so that more at a time would hardly be faster.

    Args:
        tokens: Of the longest row.
        parameters: Of the model.
    """
    return WORK_FOR_A_GPU // max(1, tokens * parameters)
