"""`onestep predict`: what a trained model says of texts."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from onestep_peft.cli import rows as inputs
from onestep_peft.cli.parsing import Parser, add_source_options, be_quiet, parse, require
from onestep_peft.hub.load import load
from onestep_peft.prediction import Record, check_texts, predict
from onestep_peft.saving import check_file, whole_file
from onestep_peft.tasks import task_of
from onestep_peft.wrapping import config_of

ABOUT = """What a trained model says of texts: classes, entities, numbers, or how they go on.

  onestep predict out "Could you send the invoice again?" "Thank you!"
  onestep predict out --input rows.csv --output predictions.jsonl
  cat texts.txt | onestep predict out -

A row of a file holds `text`, or two texts; `tokens`, a list of words, for token classification; `prompt` or
`messages` for text generation. Rows keep their fields; the prediction is added to them. Where a row has a field of
that name, such as the true `label`, the prediction's are called `predicted_label` and `predicted_score`."""


def _parser() -> Parser:
    parser = Parser("predict", ABOUT, "FOLDER [TEXT ...]")
    parser.positional("folder", help="What `onestep train` wrote, or a repository on the Hub.")
    parser.positional("texts", "*", metavar="TEXT", help="Texts; `-` reads them from standard input.")
    parser.add_argument("--input", help="Rows: a .jsonl, .csv or .txt file, or `-` for standard input.")
    parser.add_argument("--output", help="A file for JSON lines, one a row (default: the screen).")
    parser.add_argument(
        "--text-column", "--text_column", nargs="+", default=[],
        help="The field with the text (or words, or messages), or two for pairs (default: guessed).",
    )  # fmt: skip
    parser.add_argument("--batch-size", "--batch_size", type=int, default=32, help="Texts at a time (default: 32).")
    parser.add_argument(
        "--max-length", "--max_length", type=int, help="Tokens of a text (default: the model's limit, at most 512)."
    )
    parser.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=int,
        help="How far a text is continued, in text generation (default: 64).",
    )  # fmt: skip
    add_source_options(parser)
    return parser


def run(arguments: list[str]) -> None:
    """`onestep predict`."""
    parser = _parser()
    given = parse(parser, arguments)
    require(parser, given)
    source, rows = _rows(given["texts"], given["input"])
    texts = inputs.texts_of(rows, given["text_column"])
    for name, least in (("batch_size", 1), ("max_length", 2), ("max_new_tokens", 1)):
        if given[name] is not None and given[name] < least:
            raise ValueError(f"`--{name.replace('_', '-')} {given[name]}` must be at least {least}, or left out.")
    output = None if given["output"] in (None, inputs.STDIN) else Path(given["output"])
    if output is not None:
        check_file(output, source)
    be_quiet()

    model, tokenizer = load(
        given["folder"], given["revision"], base_model=given["base_model"], allow_pickle=given["allow_pickle"]
    )
    check_texts(task_of(model), texts)
    if torch.accelerator.is_available():
        cast(nn.Module, model).to(torch.accelerator.current_accelerator())
    options = {name: given[name] for name in ("batch_size", "max_length", "max_new_tokens")}
    records = predict(model, tokenizer, texts, **options)
    if given["output"] is None and source is None:
        _show(given["texts"], records, config_of(model))
        return
    with _opened(output) as file:
        for row in _joined(rows, tqdm(records, total=len(rows), desc="predict", unit="row", dynamic_ncols=True)):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if output is not None:
        print(f"{len(rows)} rows in {output}.")


def _rows(texts: Sequence[str], source: str | None) -> tuple[str | None, list[inputs.Row]]:
    """Where the rows come from (None for the command line), and the rows."""
    if texts and source is not None:
        raise ValueError("Texts and `--input` are both given. Leave one of them out.")
    if list(texts) == [inputs.STDIN]:
        source = inputs.STDIN
    if not texts and source is None:
        raise ValueError("`onestep predict` needs TEXTS or --input. See `onestep predict --help`.")
    return source, inputs.read(source) if source is not None else [{"text": text} for text in texts]


def _opened(output: Path | None) -> contextlib.AbstractContextManager[TextIO]:
    return whole_file(output) if output is not None else contextlib.nullcontext(sys.stdout)


def _joined(rows: Sequence[inputs.Row], records: Iterable[Record]) -> Iterator[inputs.Row]:
    """Each row with its prediction, in fields of their own."""
    taken = {name for row in rows for name in row}
    for row, record in zip(rows, records, strict=True):
        prefix = "predicted_" if not taken.isdisjoint(record) else ""
        yield {**row, **{f"{prefix}{name}": value for name, value in record.items()}}


def _show(texts: Sequence[str], records: Iterable[Record], config: Any) -> None:
    """For a person to read."""
    width = max((len(str(label)) for label in config.id2label.values()), default=0)
    for text, record in zip(texts, records, strict=True):
        print("\n".join(shown(text, record, width)))


def shown(text: str, record: Record, width: int) -> Iterator[str]:
    """A text with what was said of it, in lines.

    Args:
        width: Of the longest label.
    """
    if "generated_text" in record:
        yield f"{text}{record['generated_text']}"
    elif "entities" in record:
        yield text
        for entity in record["entities"]:
            yield f"  {entity['entity_group']:{width}}  {entity['score']:.3f}  {entity['word']}"
    elif "label" in record:
        yield f"{record['label']:{width}}  {record['score']:.3f}  {text}"
    elif "labels" in record:
        pairs = zip(record["labels"], record["scores"], strict=True)
        yield f"{', '.join(f'{label} {score:.3f}' for label, score in pairs) or '-'}  {text}"
    else:
        values = record.get("values", [record.get("value")])
        yield f"{', '.join(f'{value:.4f}' for value in values)}  {text}"
