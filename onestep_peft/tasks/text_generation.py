"""Text generation by causal language models: every labelled token is predicted from those before it."""

from __future__ import annotations

import math

from torch import Tensor
from transformers import AutoModelForCausalLM

from onestep_peft.tasks.task import UNLABELLED, Task, argmax, sum_over_items, tokens_fault


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The shift is made here: logits `(rows, tokens, vocabulary)` of a token are for the next one."""
    return sum_over_items(logits[:, :-1], labels[:, 1:])


def _perplexity(loss: float) -> dict[str, float]:
    return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


TEXT_GENERATION = Task(
    name="text-generation",
    peft_task_type="CAUSAL_LM",
    auto_model=AutoModelForCausalLM,
    auto_peft="AutoPeftModelForCausalLM",
    class_suffix=("ForCausalLM", "LMHeadModel"),
    metrics=(),
    row_losses=_losses,
    row_items=lambda labels: labels[:, 1:].ne(UNLABELLED).sum(1),
    predict=argmax,
    fault=lambda labels, tokens, vocabulary: tokens_fault(labels, tokens, vocabulary, "text generation"),
    outputs=lambda config: int(config.get_text_config().vocab_size),
    aligned=lambda predictions, labels: (predictions[:, :-1], labels[:, 1:]),
    scores_of_loss=_perplexity,
    has_head=False,
    by_token=True,
)
