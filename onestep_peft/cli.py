"""The command `onestep`: train an adapter in one step, and predict with it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onestep_peft.errors import PushError, nearest
from onestep_peft.version import __version__

USAGE = """usage: onestep COMMAND ...

Adapt a pretrained model in one optimization step.

commands:
  train     adapt a model to a data set:  onestep train --model M --dataset D --output-dir OUT
  predict   use it on texts:              onestep predict OUT "text" ...
  push      share it on the Hub:          onestep push OUT user/name

`onestep COMMAND --help` lists a command's options.
"""
DEFAULT_OUTPUT = "onestep_output"
# What a split is for, by the names that people give it.
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


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
        default_factory=list, metadata={"help": "accuracy, precision, recall, f1, or any name evaluate.load finds."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=8, metadata={"help": "Scaling of the LoRA adapter: alpha / r."})
    lora_target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Layers to adapt (default: every linear layer but the head)."}
    )


@dataclass
class PredictOptions:
    """What `onestep predict` takes beside the folder and the texts."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a repository."})
    base_model: str | None = field(default=None, metadata={"help": "The base, where it has moved."})


@dataclass
class PushOptions:
    """What `onestep push` takes beside the folder and the repository."""

    private: bool = field(default=False, metadata={"help": "Make a new repository private; never use a public one."})
    revision: str | None = field(default=None, metadata={"help": "The branch (default: main); made if need be."})
    create_pr: bool = field(default=False, metadata={"help": "Propose the commit as a pull request."})
    tag: str | None = field(default=None, metadata={"help": "A tag for the commit."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of a base that was a folder here."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, send nothing."})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for what is refused, 1 for a push that did not arrive.

    Both are told on standard error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {"train": train, "predict": predict, "push": push}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"onestep-peft {__version__}")
        return 0
    if arguments[0] not in commands:
        return _fail(f"unknown command {arguments[0]!r}.{nearest(arguments[0], commands)}")
    try:
        commands[arguments[0]](arguments[1:])
    except ValueError as error:
        return _fail(str(error))
    except PushError as error:
        return _fail(str(error), 1)
    return 0


def _fail(message: str, status: int = 2) -> int:
    print(f"onestep: error: {message}", file=sys.stderr)
    return status


def train(arguments: list[str]) -> None:
    """`onestep train`."""
    from onestep_peft.config import OneStepConfig

    given = _parse("train", [TrainOptions, OneStepConfig], arguments)
    options: TrainOptions = _build(TrainOptions, given)
    config: OneStepConfig = _build(OneStepConfig, {"output_dir": DEFAULT_OUTPUT, **given})
    folder = Path(str(config.output_dir))
    _be_quiet()

    from onestep_peft.saving import check_free

    check_free(folder)
    trainer = _trainer(options, config)
    trainer.train()
    trainer.report.datasets = _hub_sets(options, evaluated=trainer.eval_dataset is not None)
    trainer.save_model(str(folder))
    report = trainer.report
    print(f"\n{report.table()}\n{report.summary()}")
    print(f"{report.seconds['total']:.1f} s for the step, {report.seconds['evaluation']:.1f} s for the evaluation.")
    print(f'Saved to {folder}. Try: onestep predict {folder} "some text"')


def _trainer(options: TrainOptions, config: Any) -> Any:
    from peft import LoraConfig

    from onestep_peft.trainer import OneStepTrainer

    sets = _sets(options)
    for name, rows in sets.items():
        if rows is not None:
            print(f"{name}: {len(rows)} rows")
    return OneStepTrainer(
        model=options.model,
        args=config,
        **sets,
        peft_config=LoraConfig(
            r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=options.lora_target_modules or None
        ),
        metrics=options.metrics or None,
        text_column=options.text_column or None,
        label_column=options.label_column,
        task=options.task,
    )


def _sets(options: TrainOptions) -> dict[str, Any]:
    """The three sets: named ones as they are named, the others from the splits of the training data set."""
    from onestep_peft import data

    splits = data.read(options.dataset, options.dataset_config)

    def split(role: str) -> Any:
        rows = next((splits[name] for name in SPLITS[role] if name in splits), None)
        return None if rows is None or data.hides_labels(rows, options.label_column) else rows

    def named(source: str | None, role: str) -> Any:
        if source is None:
            return None
        rows = data.read(source)
        return rows[next((name for name in SPLITS[role] if name in rows), next(iter(rows)))]

    train_rows = split("train") if len(splits) > 1 else next(iter(splits.values()))
    if train_rows is None:
        raise ValueError(f"{options.dataset!r} has no split 'train' with labels; its splits are {list(splits)}.")
    search, evaluation = named(options.search_dataset, "validation"), named(options.eval_dataset, "test")
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


def predict(arguments: list[str]) -> None:
    """`onestep predict`."""
    given = _parse("predict", [PredictOptions], arguments, positional={"folder": None, "texts": "+"})
    options: PredictOptions = _build(PredictOptions, given)
    _be_quiet()

    from onestep_peft.answers import predictions
    from onestep_peft.hub.load import load

    model, tokenizer = load(given["folder"], options.revision, base_model=options.base_model)
    for line in predictions(model, tokenizer, given["texts"]):
        print(line)


def push(arguments: list[str]) -> None:
    """`onestep push`."""
    # Flags last, or the parser would take the word after one for its value.
    flags = ("--private", "--create-pr", "--create_pr", "--dry-run", "--dry_run")
    arguments = sorted(arguments, key=lambda word: word in flags)
    given = _parse("push", [PushOptions], arguments, positional={"folder": None, "repo": None})
    options: PushOptions = _build(PushOptions, given)
    _be_quiet()

    from onestep_peft.hub.push import push as push_folder

    said = {**vars(options), "private": options.private or None}
    result = push_folder(given["folder"], given["repo"], **said)
    for name, size in result.files.items():
        print(f"{size:>12,}  {name}")
    print(f"A fresh process gets the trained model's logits, to {result.difference:.1e} of their scale.")
    if options.dry_run:
        print(f"Nothing was sent. Without --dry-run, the above goes to {result.url} ({result.revision}).")
    else:
        print(f"Pushed: {result.url}" + (f" (tag {result.tag})" if result.tag else ""))


def _parse(
    command: str, kinds: list[Any], arguments: list[str], positional: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """The options that were given, and only those, so that defaults stay where they are declared.

    Args:
        positional: Words without an option: name -> how many, as argparse's `nargs`.

    Raises:
        ValueError: An unknown option, or a required one that is missing.
    """
    from transformers import HfArgumentParser

    words = [f"{name.upper()}{' ...' if nargs else ''}" for name, nargs in (positional or {}).items()]
    usage = " ".join(["onestep", command, *words, "[options]"])
    parser = HfArgumentParser(kinds, prog=f"onestep {command}", usage=usage, allow_abbrev=False)
    for name, nargs in (positional or {}).items():
        parser.add_argument(name, nargs=nargs)
    required = [action.dest for action in parser._actions if action.required]
    for action in parser._actions:
        action.required = False
        if action.dest != "help":
            action.default = argparse.SUPPRESS
        if action.dest in ("step_size", "fit_head"):  # "search" and "auto" stand beside numbers and flags
            action.type = str
    parser.exit_on_error = False
    try:
        namespace, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"unknown option {rest[0]!r} of `onestep {command}`.{nearest(rest[0].split('=')[0], known)}")
    for name in required:
        if name not in namespace:
            option = name.upper() if name in (positional or {}) else f"--{name.replace('_', '-')}"
            raise ValueError(f"`onestep {command}` needs {option}. See `onestep {command} --help`.")
    return vars(namespace)


def _build(kind: Any, given: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    return kind(**{name: value for name, value in given.items() if name in names})


def _be_quiet() -> None:
    """Leaves the screen to what this command says: bars of single files and reports of expected gaps are noise."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
