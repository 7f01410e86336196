"""What a loaded model says of texts, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import pipeline

from onestep_peft.methods import prompt_tuning
from onestep_peft.tasks import (
    MULTI_LABEL_CLASSIFICATION,
    TEXT_GENERATION,
    TEXT_REGRESSION,
    TOKEN_CLASSIFICATION,
    Task,
    task_of,
)
from onestep_peft.wrapping import config_of

# How far a text is continued.
NEW_TOKENS = 64


def predictions(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[str]:
    """Classes with their probabilities, entities, numbers or continuations: what the model's task is about.

    Args:
        model: As `onestep_peft.load` gives it.
        tokenizer: Its tokenizer.
    """
    task = task_of(model)
    if task is TEXT_GENERATION:
        yield from (_continued(model, tokenizer, text) for text in texts)
        return
    if task is TOKEN_CLASSIFICATION:
        tag: Any = cast(Any, pipeline)(task.name, model=model, tokenizer=tokenizer, aggregation_strategy="first")
        for text, found in zip(texts, tag(list(texts)), strict=True):
            yield from _entities(text, found)
        return
    classify: Any = cast(Any, pipeline)(task.name, model=model, tokenizer=tokenizer)
    options = {"function_to_apply": "none"} if task is TEXT_REGRESSION else {}
    results = classify(list(texts), truncation=True, top_k=None, **options)
    width = max(len(str(label)) for label in config_of(model).id2label.values())
    for text, scores in zip(texts, results, strict=True):
        yield f"{_said(task, scores, width)}  {text}"


def _said(task: Task, scores: Sequence[dict[str, Any]], width: int) -> str:
    """A number; the classes that apply; or the likeliest class."""
    if task is TEXT_REGRESSION:
        return ", ".join(f"{score['score']:.4f}" for score in scores)
    if task is MULTI_LABEL_CLASSIFICATION:
        return ", ".join(f"{score['label']} {score['score']:.3f}" for score in scores if score["score"] > 0.5) or "-"
    best = max(scores, key=lambda score: score["score"])
    return f"{best['label']:{width}}  {best['score']:.3f}"


def _entities(text: str, found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The text, and a line for each entity in it."""
    yield text
    for entity in found:
        yield f"  {entity['entity_group']}  {entity['score']:.3f}  {text[entity['start'] : entity['end']]}"


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, text: str) -> str:
    """The text and how the model goes on with it, its likeliest words."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    if ids[0, -1] == tokenizer.eos_token_id and ids.shape[1] > 1:  # it is to go on
        ids = ids[:, :-1]
    positions = getattr(config_of(model), "max_position_embeddings", None) or ids.shape[1] + NEW_TOKENS + 1
    room = positions - ids.shape[1] - prompt_tuning.virtual_tokens(None, None, model)
    if room < 1:
        raise ValueError(f"The text has {ids.shape[1]} tokens and leaves no room for more. Give a shorter one.")
    mask = torch.ones_like(ids)
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=min(NEW_TOKENS, room), do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return str(tokenizer.decode(new[0], skip_special_tokens=True))
