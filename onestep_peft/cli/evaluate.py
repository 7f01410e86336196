"""`onestep evaluate`: scores of a trained model on labelled rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

from onestep_peft import data
from onestep_peft.cli.parsing import Parser, be_quiet, parse, require
from onestep_peft.cli.splits import to_score
from onestep_peft.evaluation import evaluate
from onestep_peft.hub.load import load_with_report
from onestep_peft.report import table
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
        help="accuracy, precision, recall, f1, or any name evaluate.load finds (default: by task).",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="A file for the numbers, as JSON.")
    parser.add_argument(
        "--text-column", "--text_column", nargs="+", default=[],
        help="The column with the text, or two for pairs (default: guessed).",
    )  # fmt: skip
    parser.add_argument("--label-column", "--label_column", help="The column with the class (default: guessed).")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=32, help="Rows at a time (default: 32).")
    parser.add_argument("--bf16", action="store_true", help="Compute in bfloat16, as a run with --bf16 did.")
    parser.add_argument("--use-cpu", "--use_cpu", action="store_true", help="Leave an accelerator alone.")
    parser.add_argument("--revision", help="Branch, tag or commit of a repository.")
    parser.add_argument("--base-model", "--base_model", help="The base, where it has moved.")
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
    model, tokenizer, report = load_with_report(given["folder"], given["revision"], base_model=given["base_model"])
    scores = evaluate(
        model,
        tokenizer,
        rows,
        task=report.task,
        metrics=given["metrics"],
        text_column=given["text_column"] or None,
        label_column=given["label_column"],
        per_device_eval_batch_size=given["batch_size"],
        bf16=given["bf16"],
        use_cpu=given["use_cpu"],
    )
    print(f"\n{len(rows)} rows of {given['dataset']}, split {split}\n\n{table({'': scores})}", end="")
    if given["output"] is not None:
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        found = {"dataset": given["dataset"], "split": split, "rows": len(rows), "metrics": finite}
        with whole_file(Path(given["output"])) as file:
            file.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
