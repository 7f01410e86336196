"""`onestep evaluate`: scores of a trained model on labelled rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestep_peft import data
from onestep_peft.cli.parsing import Parser, add_source_options, be_quiet, parse, require
from onestep_peft.cli.splits import to_score
from onestep_peft.evaluation import Evaluation, evaluate
from onestep_peft.hub.load import load
from onestep_peft.metrics import BUNDLED
from onestep_peft.report import recall_table, table
from onestep_peft.saving import check_file, whole_file

ABOUT = """How good a trained model is on labelled rows.

  onestep evaluate out --dataset rows.csv
  onestep evaluate user/name --dataset fancyzhx/ag_news --split test --metrics accuracy f1 --output metrics.json

For the rows that a run has reported on, these are the numbers of its report."""


def _parser() -> Parser:
    parser = Parser("evaluate", ABOUT, "FOLDER --dataset D")
    parser.positional("folder", help="What `onestep train` wrote, or a repository on the Hub.")
    parser.add_argument("--dataset", help="Rows: a Hub id, a .jsonl, .csv or .parquet file, or a folder of them.")
    parser.add_argument("--dataset-config", "--dataset_config", help="Configuration of a data set on the Hub.")
    parser.add_argument("--split", help="Which of its splits (default: test, else validation, else the only one).")
    parser.add_argument(
        "--metrics", nargs="+", default=[],
        help=f"{', '.join(BUNDLED)}, or any name evaluate.load finds (default: by task).",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="A file for the numbers, as JSON.")
    parser.add_argument(
        "--text-column", "--text_column", nargs="+", default=[],
        help="The column with the text, or two for pairs or completions (default: guessed).",
    )  # fmt: skip
    parser.add_argument("--label-column", "--label_column", help="The column with the labels (default: guessed).")
    parser.add_argument(
        "--max-length", "--max_length", type=int, help="Tokens of a row (default: the model's limit, at most 512)."
    )
    parser.add_argument("--batch-size", "--batch_size", type=int, default=32, help="Rows at a time (default: 32).")
    parser.add_argument("--bf16", action="store_true", help="Compute in bfloat16, as a run with --bf16 did.")
    parser.add_argument("--use-cpu", "--use_cpu", action="store_true", help="Leave an accelerator alone.")
    add_source_options(parser)
    parser.required.append("dataset")
    return parser


def run(arguments: list[str]) -> None:
    """`onestep evaluate`."""
    parser = _parser()
    given = parse(parser, arguments)
    require(parser, given)
    if given["batch_size"] < 1:
        raise ValueError(f"`--batch-size {given['batch_size']}` must be at least 1; the default is 32.")
    if given["output"] is not None:
        check_file(Path(given["output"]), given["dataset"])
    be_quiet()

    splits = data.read(given["dataset"], given["dataset_config"])
    split = to_score(splits, given["split"], given["label_column"])
    rows = splits[split]
    model, tokenizer = load(
        given["folder"], given["revision"], base_model=given["base_model"], allow_pickle=given["allow_pickle"]
    )
    found = evaluate(
        model,
        tokenizer,
        rows,
        metrics=given["metrics"],
        text_column=given["text_column"] or None,
        label_column=given["label_column"],
        max_length=given["max_length"],
        per_device_eval_batch_size=given["batch_size"],
        bf16=given["bf16"],
        use_cpu=given["use_cpu"],
    )
    _show(found, f"{len(rows)} rows of {given['dataset']}, split {split}")
    if given["output"] is not None:
        about = {"dataset": given["dataset"], "split": split, "rows": len(rows)}
        with whole_file(Path(given["output"])) as file:
            file.write(_json(found, about))


def _show(found: Evaluation, title: str) -> None:
    recall = {"recall": found.class_recall} if found.class_recall else {}
    print(f"\n{title}\n\n{table({'': found.metrics})}{recall_table(recall, found.class_counts)}", end="")


def _json(found: Evaluation, about: Mapping[str, Any]) -> str:
    metrics = {name: value if math.isfinite(value) else None for name, value in found.metrics.items()}
    classes = {"class_counts": found.class_counts, "class_recall": found.class_recall} if found.class_recall else {}
    return json.dumps({**about, "metrics": metrics, **classes}, indent=2, allow_nan=False) + "\n"
