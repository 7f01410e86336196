"""`onestep predict`: classify texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from transformers import pipeline

from onestep_peft.cli.parsing import be_quiet, build, parse
from onestep_peft.hub.load import load
from onestep_peft.wrapping import config_of


@dataclass
class PredictOptions:
    """What `onestep predict` takes beside the folder and the texts."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a repository."})
    base_model: str | None = field(default=None, metadata={"help": "The base, where it has moved."})


def run(arguments: list[str]) -> None:
    """`onestep predict`."""
    given = parse("predict", [PredictOptions], arguments, positional={"folder": None, "texts": "+"})
    options: PredictOptions = build(PredictOptions, given)
    be_quiet()

    texts = given["texts"]
    model, tokenizer = load(given["folder"], options.revision, base_model=options.base_model)
    classify: Any = cast(Any, pipeline)("text-classification", model=model, tokenizer=tokenizer)
    width = max(len(str(label)) for label in config_of(model).id2label.values())
    for text, result in zip(texts, classify(texts, truncation=True), strict=True):
        print(f"{result['label']:{width}}  {result['score']:.3f}  {text}")
