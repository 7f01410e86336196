"""`onestep train`: adapt a model to a data set."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onestep_peft import data
from onestep_peft.cli import config_file
from onestep_peft.cli.adapter import OWNERS, AdapterOptions, check_owners, peft_config
from onestep_peft.cli.parsing import Parser, be_quiet, build, parse, require
from onestep_peft.cli.splits import labelled, named
from onestep_peft.config import OneStepConfig
from onestep_peft.metrics import BUNDLED
from onestep_peft.saving import check_free
from onestep_peft.trainer import OneStepTrainer

DEFAULT_OUTPUT = "onestep_output"


@dataclass
class TrainOptions:
    """What `onestep train` takes beside the fields of OneStepConfig."""

    model: str = field(metadata={"help": "The base: a Hub id or a folder."})
    dataset: str = field(metadata={"help": "Rows: a Hub id, a .jsonl, .csv or .parquet file, or a folder of them."})
    task: str | None = field(
        default=None,
        metadata={"help": "text-classification, token-classification or text-generation (default: by the columns)."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    search_dataset: str | None = field(
        default=None, metadata={"help": "Rows that choose the step (default: a validation split, else held out)."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Rows that report (default: a test split, else a validation split)."}
    )
    text_column: list[str] = field(
        default_factory=list,
        metadata={"help": "The column with the text, or two for pairs or completions (default: guessed)."},
    )
    label_column: str | None = field(default=None, metadata={"help": "The column with the labels (default: guessed)."})
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": f"{', '.join(BUNDLED)}, or any name evaluate.load finds (default: by task)."},
    )
    config: str | None = field(
        default=None, metadata={"help": "Options in a YAML file, one a line; the command line wins over it."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Say what would be done, and write nothing."})


ABOUT = """Adapts a pretrained model to your rows in one optimization step.

  onestep train --model distilbert/distilbert-base-uncased --dataset rows.csv --output-dir out

Rows hold a text (or two) and a class, a list of classes or a number; `tokens` and a tag for each; or, for text
generation, `text`, `prompt` and `completion`, or `messages`. Held-out rows choose how far the step goes, and whether
it is kept."""
# Options that take a word beside a number or a flag, as the help shows them.
WORDS = {"step_size": "search|X", "fit_head": "auto|true|false", "slices": "auto|N"}
GROUPS = {
    "what goes in and comes out": ["model", "dataset", "output_dir", "config", "dry_run"],
    "the rows": [],
    "what moves": ["method", *OWNERS],
    "the step": [
        "direction", "step_size", "max_steps", "slices", "stop_at", "damping", "rank", "search_budget", "fit_head",
        "head_folds", "body_folds", "covariance_rows", "search_fraction", "search_rows_max",
        "search_tokens_max", "guard", "guard_confidence",
    ],
    "the machine": [
        "per_device_train_batch_size", "per_device_eval_batch_size", "bf16", "activation_checkpointing", "use_cpu",
        "seed", "save_pass_minutes", "disable_tqdm",
    ],
    "the Hub": ["push_to_hub", "hub_model_id", "hub_private_repo"],
}  # fmt: skip
REST = "all else that transformers.TrainingArguments knows"


def _parser() -> Parser:
    kinds = [TrainOptions, AdapterOptions, OneStepConfig]
    parser = Parser(
        "train", ABOUT, kinds=kinds, epilog="`--help-all` lists the other options of transformers' Trainer."
    )
    for action in parser.options:
        if action.dest in WORDS:
            action.type, action.metavar = str, WORDS[action.dest]
    first = GROUPS["what goes in and comes out"]
    rows = [f.name for f in dataclasses.fields(TrainOptions) if f.name not in first]
    parser.arrange({**GROUPS, "the rows": [*rows, "max_length"]}, REST)
    return parser


def run(arguments: list[str]) -> None:
    """`onestep train`."""
    parser = _parser()
    given = parse(parser, arguments)
    if "config" in given:
        given = {**config_file.read(Path(given["config"]), parser), **given}
    require(parser, given)
    options: TrainOptions = build(TrainOptions, given)
    config: OneStepConfig = build(OneStepConfig, {"output_dir": DEFAULT_OUTPUT, **given})
    check_owners(config.method, given)
    adapter = peft_config(config.method, build(AdapterOptions, given), options.model)
    folder = Path(str(config.output_dir))
    be_quiet()

    check_free(folder)
    if options.dry_run:
        _show_plan(options, config, adapter)
        return
    trainer = _trainer(options, config, adapter)
    trainer.train()
    trainer.report.datasets = _hub_sets(options, evaluated=trainer.eval_dataset is not None)
    if config.should_save:
        trainer.save_folder(folder)
    report = trainer.report
    print(f"\n{report.table()}\n{report.summary()}")
    print(f"{report.seconds['total']:.1f} s for the step, {report.seconds['evaluation']:.1f} s for the evaluation.")
    print(f'Saved to {folder}. Try: onestep predict {folder} "some text"')
    if config.should_save and config.push_to_hub:  # last, so that a push that fails hides nothing
        print(f"Pushed: {trainer.push_folder(folder).url}")


def _show_plan(options: TrainOptions, config: OneStepConfig, adapter: Any) -> None:
    folder = config.output_dir
    with tempfile.TemporaryDirectory() as elsewhere:  # Trainer makes its folder at once
        config.output_dir = elsewhere
        plan = _trainer(options, config, adapter).plan()
    print(f"\n{plan.text()}\nNothing was trained or written. Without --dry-run, the result goes to {folder}.")


def _trainer(options: TrainOptions, config: OneStepConfig, adapter: Any) -> OneStepTrainer:
    sets = _sets(options)
    for name, rows in sets.items():
        if rows is not None:
            print(f"{name}: {len(rows)} rows")
    return OneStepTrainer(
        model=options.model,
        args=config,
        **sets,
        peft_config=adapter,
        metrics=options.metrics or None,
        text_column=options.text_column or None,
        label_column=options.label_column,
        task=options.task,
    )


def _sets(options: TrainOptions) -> dict[str, Any]:
    """The three sets: named ones as they are named, the others from the splits of the training data set."""
    splits = data.read(options.dataset, options.dataset_config)

    def split(role: str) -> Any:
        name = labelled(splits, role, options.label_column)
        return None if name is None else splits[name]

    def of(source: str | None, role: str) -> Any:
        if source is None:
            return None
        rows = data.read(source)
        return rows[named(rows, role) or next(iter(rows))]

    train_rows = split("train") if len(splits) > 1 else next(iter(splits.values()))
    if train_rows is None:
        raise ValueError(f"{options.dataset!r} has no split 'train' with labels; its splits are {list(splits)}.")
    search, evaluation = of(options.search_dataset, "validation"), of(options.eval_dataset, "test")
    if evaluation is None:
        evaluation = split("test")
    if search is None and evaluation is not None:
        search = split("validation")
    elif evaluation is None:  # rows that chose the step would flatter it
        evaluation = split("validation")
    return {"train_dataset": train_rows, "search_dataset": search, "eval_dataset": evaluation}


def _hub_sets(options: TrainOptions, evaluated: bool) -> dict[str, list[str]]:
    """Which of the sets are on the Hub, for the card."""
    evaluation = (options.eval_dataset or options.dataset) if evaluated else None
    named = {"train": options.dataset, "search": options.search_dataset, "evaluation": evaluation}
    return {role: [name] for role, name in named.items() if name and not Path(name).exists()}
