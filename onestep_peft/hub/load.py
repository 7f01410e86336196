"""A saved adapter, from a folder or the Hub, as a model that predicts."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from onestep_peft import tasks
from onestep_peft.bases import load_base, load_tokenizer
from onestep_peft.methods import prompt_tuning
from onestep_peft.report import StepReport
from onestep_peft.saving import read_whole
from onestep_peft.wrapping import config_of


def load(
    folder_or_repo: str | os.PathLike[str], revision: str | None = None, *, base_model: str | None = None
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its head and labels, in evaluation mode, and its tokenizer; ready for `transformers.pipeline`.

    Args:
        folder_or_repo: A folder that `OneStepTrainer.save_model` wrote, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        base_model: The base where it is no longer where the folder says: a Hub id or a folder.

    Raises:
        ValueError: Neither a folder nor a repository, one that is not whole, or a base that cannot be found.
    """
    model, tokenizer, _ = load_with_report(folder_or_repo, revision, base_model=base_model)
    return model, tokenizer


def load_with_report(
    folder_or_repo: str | os.PathLike[str], revision: str | None = None, *, base_model: str | None = None
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase, StepReport]:
    """As `load`, with the report of the run."""
    folder = fetch(folder_or_repo, revision)
    report = read_whole(folder)
    # A base comes without a head, and says so at length; the adapter brings it.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, base = _whole_model(folder, report) if report.method == "full" else _adapted(folder, report, base_model)
    finally:
        logging.set_verbosity(verbosity)
    # Rows that came as tokens leave no tokenizer behind.
    tokenizer = load_tokenizer(str(folder if (folder / "tokenizer_config.json").is_file() else base))
    if config_of(model).pad_token_id is None:
        config_of(model).pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer, report


def _whole_model(folder: Path, report: StepReport) -> tuple[PreTrainedModel, str]:
    """A model whose own weights were moved, and where its base was."""
    return _load(str(folder), report), base_named(report, folder)


def _load(base: str, report: StepReport, revision: str | None = None) -> PreTrainedModel:
    task = tasks.named(report.task, report.problem_type)
    return load_base(base, task, report.labels, revision, report.outputs)


def _adapted(folder: Path, report: StepReport, base_model: str | None) -> tuple[PeftModel, str]:
    """The base with the adapter on it, and where the base is."""
    base = base_model or base_named(report, folder)
    if not base:
        raise ValueError(
            f"{str(folder)!r} does not say what its base is: it was built from a configuration. Save the base in a "
            "folder and name it: `load(..., base_model=...)`."
        )
    try:
        model = _load(base, report, report.base_revision if base_model is None else None)
    except ValueError as error:
        raise ValueError(
            f"{error} If the base has moved, name it: `base_model=` (`--base-model` in the shell)."
        ) from error
    adapted = PeftModel.from_pretrained(model, str(folder))
    if report.method == prompt_tuning.name:
        prompt_tuning.settle(adapted)
    return adapted, base


def fetch(folder_or_repo: str | os.PathLike[str], revision: str | None) -> Path:
    """A folder as it is, or a repository's files.

    Raises:
        ValueError: Neither a folder nor a repository.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"`revision={revision!r}`, but {str(folder)!r} is a folder here. Leave `revision` out.")
        return folder
    try:
        return Path(snapshot_download(str(folder_or_repo), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{str(folder_or_repo)!r} is no folder here, and the Hub does not give it ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). Check the name, the network, and `hf auth login` for a private "
            "one."
        ) from error


def base_named(report: StepReport, folder: Path) -> str:
    """The base as the report names it: a folder is relative to the adapter's own."""
    beside = (folder / report.base_model).resolve()
    return str(beside) if beside.is_dir() and report.base_revision is None and report.base_model else report.base_model
