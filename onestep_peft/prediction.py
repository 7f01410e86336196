"""What a trained model says of texts: one record a text, by task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, pipeline

from onestep_peft.lengths import longest_input, positions_of
from onestep_peft.methods import prompt_tuning
from onestep_peft.tasks import (
    MULTI_LABEL_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    TEXT_REGRESSION,
    TOKEN_CLASSIFICATION,
    Task,
    task_of,
)

Record = dict[str, Any]
#: A text; a pair of texts; a list of words; or a conversation, a list of messages.
Text = str | tuple[str, str] | list[str] | list[dict[str, str]]
# How far a text is continued where the user does not say.
NEW_TOKENS = 64
PAIRED, WORDS = "pairs of texts", "lists of words"
#: What a task reads beside plain texts.
READS = {
    TEXT_CLASSIFICATION.name: PAIRED,
    TOKEN_CLASSIFICATION.name: WORDS,
    TEXT_GENERATION.name: "messages",
}


@dataclass(frozen=True)
class Answer:
    """How a task's pipeline is called, and what is kept of its answer.

    Args:
        record: A text and the pipeline's answer to it -> a record that JSON can hold.
        options: Further arguments of the call.
    """

    record: Callable[[Any, Any], Record]
    options: Mapping[str, Any] = field(default_factory=dict)


def _likeliest(_text: Any, scores: Any) -> Record:
    best = max(scores, key=lambda one: one["score"])
    return {"label": best["label"], "score": best["score"]}


def _those_that_apply(_text: Any, scores: Any) -> Record:
    there = [one for one in scores if one["score"] > 0.5]
    return {"labels": [one["label"] for one in there], "scores": [one["score"] for one in there]}


def _numbers(_text: Any, scores: Any) -> Record:
    values = [one["score"] for one in scores]
    return {"value": values[0]} if len(values) == 1 else {"values": values}


def _entities(text: Any, found: Any) -> Record:
    """Entities with their words as they stand in the text; words of a list are counted with a space between them."""
    whole = text if isinstance(text, str) else " ".join(text)
    return {
        "entities": [{**one, "score": float(one["score"]), "word": whole[one["start"] : one["end"]]} for one in found]
    }


CLASSIFIED = {"truncation": True, "top_k": None}
#: Of the tasks that transformers' pipelines are used for.
ANSWERS = {
    TEXT_CLASSIFICATION: Answer(_likeliest, CLASSIFIED),
    MULTI_LABEL_CLASSIFICATION: Answer(_those_that_apply, CLASSIFIED),
    TEXT_REGRESSION: Answer(_numbers, {**CLASSIFIED, "function_to_apply": "none"}),
    # A word's class is that of its first token: the others had no label.
    TOKEN_CLASSIFICATION: Answer(_entities, {"aggregation_strategy": "first"}),
}


def predict(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[Record]:
    """One record a text, in their order, for what the model's task is about.

    - One class a text: `label` and `score`, its probability.
    - Several labels: `labels` and `scores`, of those whose probability is above one half.
    - Regression: `value`, or `values` of a model with several outputs.
    - Token classification: `entities`, each with `entity_group`, `score`, `word`, `start` and `end`.
    - Text generation: `generated_text`, the likeliest words behind the text.

    Texts that are too long for the model are cut as they are in training, but for text generation.

    Args:
        model: As `load` returns it.
        tokenizer: Its tokenizer, which stays as it is.
        batch_size: Texts in a forward.
        max_length: Tokens of a text, as in `OneStepConfig`.
        max_new_tokens: How far texts are continued, as far as the model has positions; default 64.

    Raises:
        ValueError: A model whose task is not known, texts of a kind that it does not read, or one that leaves no room
            for more.
    """
    task = task_of(model)
    check_texts(task, texts)
    starts = range(0, len(texts), batch_size)
    if task is TEXT_GENERATION:
        for start in starts:
            batch = texts[start : start + batch_size]
            yield from _continued(model, tokenizer, batch, max_new_tokens or NEW_TOKENS, start)
        return
    answer, own = ANSWERS[task], copy.copy(tokenizer)
    virtual_tokens = prompt_tuning.virtual_tokens(None, None, model)
    own.model_max_length = longest_input(tokenizer, positions_of(model), virtual_tokens, max_length)
    if task.by_token or virtual_tokens:
        own.padding_side = "right"  # as in training: padding before a row would shift its positions
    call: Any = cast(Any, pipeline)(task.name, model=model, tokenizer=own, device=_where(model))
    options = {"is_split_into_words": _kind(texts[0]) == WORDS} if texts and task.by_token else {}
    for start in starts:
        batch = texts[start : start + batch_size]
        found = call([_input(text) for text in batch], batch_size=batch_size, **answer.options, **options)
        yield from map(answer.record, batch, found)


def _where(model: Any) -> Any:
    """The device that a pipeline leaves a model on: where it is; None for one that accelerate has spread out."""
    return None if getattr(model, "hf_device_map", None) else model.device


def check_texts(task: Task, texts: Sequence[Text]) -> None:
    """Raises a ValueError for texts of another kind than the task reads, or of more than one kind."""
    kinds = sorted({_kind(text) for text in texts})
    bad = next((kind for kind in kinds if kind not in ("texts", READS[task.name])), None)
    if bad is not None or len(kinds) > 1:
        raise ValueError(
            f"The task {task.name} reads texts or {READS[task.name]}, not {bad or ' and '.join(kinds)}. Give one of "
            "them in every row; `--text-column` names it in the shell."
        )


def _kind(text: Text) -> str:
    if isinstance(text, str):
        return "texts"
    if isinstance(text, tuple):
        return PAIRED
    return "messages" if text and isinstance(text[0], dict) else WORDS


def _input(text: Text) -> Any:
    return {"text": text[0], "text_pair": text[1]} if isinstance(text, tuple) else text


@torch.no_grad()
def _continued(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], new_tokens: int, first: int
) -> list[Record]:
    """How the model goes on with some texts, whatever else is in the batch.

    Args:
        first: Number of the first text, for messages.
    """
    virtual_tokens = prompt_tuning.virtual_tokens(None, None, model)
    room, pad = positions_of(model) - virtual_tokens, cast(int, tokenizer.pad_token_id)
    rows = [_encoded(tokenizer, text) for text in texts]
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if len(row) >= room:
            raise ValueError(
                f"Row {first + i}: the text has {len(row)} tokens and leaves no room for more. Give a shorter one."
            )
        # Rows at the end of their room, or with padding between them and a prompt, go with those of their length only.
        alone = virtual_tokens > 0 or len(row) + new_tokens > room
        groups.setdefault(len(row) if alone else 0, []).append(i)
    found: dict[int, Record] = {}
    for places in groups.values():
        width = max(len(rows[i]) for i in places)
        gaps = [width - len(rows[i]) for i in places]
        ids = torch.tensor([[pad] * gap + rows[i] for gap, i in zip(gaps, places, strict=True)], device=model.device)
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=model.device)
        done = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=min(new_tokens, room - width), do_sample=False,
            pad_token_id=pad,
        )  # fmt: skip
        for i, row in zip(places, done[:, width:].tolist(), strict=True):
            # Decoded together: some tokenizers leave out a space before the first token.
            whole, before = (str(tokenizer.decode(x, skip_special_tokens=True)) for x in (rows[i] + row, rows[i]))
            found[i] = {"generated_text": whole.removeprefix(before)}
    return [found[i] for i in range(len(texts))]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """A text, or a conversation that the model is to answer, without a closing token: it is to go on."""
    if isinstance(text, str):
        ids = list(tokenizer(text, verbose=False)["input_ids"])
    else:
        if tokenizer.chat_template is None:
            raise ValueError("The rows hold messages, and the tokenizer has no chat template. Give texts.")
        done: Any = tokenizer.apply_chat_template(
            cast(Any, text), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        return list(done["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
