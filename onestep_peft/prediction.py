"""What a trained model says of texts: one record a text, by task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, pipeline

from onestep_peft.preparation import longest_input
from onestep_peft.wrapping import config_of

Record = dict[str, Any]
#: One text, or a pair of them.
Text = str | tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """How a task's pipeline is called, and what is kept of its answer.

    Args:
        record: The pipeline's answer to one text -> a record that JSON can hold.
        options: Further arguments of the call.
        pairs: Whether an input may be a pair of texts.
    """

    record: Callable[[Any], Record]
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: bool = False


def _entities(found: Any) -> Record:
    return {"entities": [{**entity, "score": float(entity["score"])} for entity in found]}


#: By the report's task, which is the pipeline's name as well.
ANSWERS = {
    "text-classification": Answer(
        lambda found: {"label": found["label"], "score": float(found["score"])}, {"truncation": True}, pairs=True
    ),
    "token-classification": Answer(_entities, {"aggregation_strategy": "simple"}),
    "text-generation": Answer(
        lambda found: {"generated_text": found[0]["generated_text"]}, {"return_full_text": False}
    ),
}


def check_task(task: str, texts: Sequence[Text]) -> None:
    """Raises a ValueError for a task that nothing is known of, or for pairs where it takes single texts."""
    if task not in ANSWERS:
        raise ValueError(f"The task {task!r} is none that predictions are known for: {', '.join(ANSWERS)}.")
    if not ANSWERS[task].pairs and any(isinstance(text, tuple) for text in texts):
        raise ValueError(f"The task {task} reads one text a row, not two. Name one `--text-column`.")


def predict(
    task: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    **options: Any,
) -> Iterator[Record]:
    """One record a text, in their order: `label` and `score`, `entities`, or `generated_text`.

    Texts that are too long for the model are cut as they are in training.

    Args:
        task: As the report names it.
        batch_size: Texts in a forward.
        **options: For the task's pipeline, such as `max_new_tokens`.

    Raises:
        ValueError: A task that nothing is known of, or pairs where it takes single texts.
    """
    check_task(task, texts)
    answer = ANSWERS[task]
    tokenizer.model_max_length = longest_input(tokenizer, config_of(model))
    if task == "text-generation":
        tokenizer.padding_side = "left"  # what is generated follows a row's last token
    call: Any = cast(Any, pipeline)(task, model=model, tokenizer=tokenizer)
    for start in range(0, len(texts), batch_size):
        batch = [_input(text) for text in texts[start : start + batch_size]]
        yield from map(answer.record, call(batch, batch_size=batch_size, **answer.options, **options))


def _input(text: Text) -> Any:
    return text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
