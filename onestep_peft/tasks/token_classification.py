"""Token classification: a class for every labelled token, as in named entity recognition."""

from __future__ import annotations

from transformers import AutoModelForTokenClassification

from onestep_peft.tasks.task import (
    UNLABELLED,
    Task,
    argmax,
    counts_of_classes,
    sum_over_items,
    tokens_fault,
)

TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    peft_task_type="TOKEN_CLS",
    auto_model=AutoModelForTokenClassification,
    auto_peft="AutoPeftModelForTokenClassification",
    class_suffix=("ForTokenClassification",),
    metrics=("token_f1", "entity_f1"),
    row_losses=sum_over_items,
    row_items=lambda labels: labels.ne(UNLABELLED).sum(1),
    predict=argmax,
    fault=lambda labels, tokens, classes: tokens_fault(labels, tokens, classes, "token classification"),
    class_counts=counts_of_classes,
    by_token=True,
)
