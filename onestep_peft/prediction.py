"""What a loaded model says of texts, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from transformers import pipeline

from onestep_peft.tasks import MULTI_LABEL_CLASSIFICATION, TEXT_REGRESSION, Task, task_of
from onestep_peft.wrapping import config_of


def predictions(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[str]:
    """Classes with their probabilities, entities, numbers or continuations: what the model's task is about.

    Args:
        model: As `onestep_peft.load` gives it.
        tokenizer: Its tokenizer.
    """
    task = task_of(model)
    show = {"token-classification": _entities, "text-generation": _continuations}.get(task.name, _classes)
    pipe: Any = cast(Any, pipeline)(task.name, model=model, tokenizer=tokenizer, **OPTIONS.get(task.name, {}))
    yield from show(pipe, task, texts)


OPTIONS: dict[str, dict[str, Any]] = {"token-classification": {"aggregation_strategy": "simple"}}


def _classes(pipe: Any, task: Task, texts: Sequence[str]) -> Iterator[str]:
    if task is TEXT_REGRESSION:
        for text, result in zip(texts, pipe(list(texts), truncation=True, function_to_apply="none"), strict=True):
            yield f"{result['score']:.4f}  {text}"
    elif task is MULTI_LABEL_CLASSIFICATION:
        for text, results in zip(texts, pipe(list(texts), truncation=True, top_k=None), strict=True):
            there = [f"{result['label']} {result['score']:.3f}" for result in results if result["score"] > 0.5]
            yield f"{', '.join(there) or '-'}  {text}"
    else:
        width = max(len(str(label)) for label in config_of(pipe.model).id2label.values())
        for text, result in zip(texts, pipe(list(texts), truncation=True), strict=True):
            yield f"{result['label']:{width}}  {result['score']:.3f}  {text}"


def _entities(pipe: Any, _task: Task, texts: Sequence[str]) -> Iterator[str]:
    for text, found in zip(texts, pipe(list(texts)), strict=True):
        yield text
        for entity in found:
            yield f"  {entity['entity_group']}  {entity['score']:.3f}  {text[entity['start'] : entity['end']]}"


def _continuations(pipe: Any, _task: Task, texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        (result,) = pipe(text, return_full_text=True)
        yield str(result["generated_text"])
