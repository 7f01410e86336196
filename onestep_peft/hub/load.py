"""A saved adapter, from a folder or the Hub, as a model that predicts."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, logging

from onestep_peft import tasks
from onestep_peft.bases import load_base, load_config, load_tokenizer, skeleton
from onestep_peft.errors import without_secrets
from onestep_peft.file_names import is_cached
from onestep_peft.hub import fit, inspection
from onestep_peft.methods import full, prompt_tuning
from onestep_peft.report import FILE, StepReport
from onestep_peft.saving import CARD, read_report, read_whole
from onestep_peft.wrapping import config_of

BASE_OPTION = "`base_model=` (`--base-model` in the shell)"


def load(
    folder_or_repo: str | os.PathLike[str],
    revision: str | None = None,
    *,
    base_model: str | None = None,
    allow_pickle: bool = False,
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its head and labels, in evaluation mode, and its tokenizer; ready for `transformers.pipeline`.

    The folder may come from anybody: only files that its report answers for are looked at, none of them is a pickle,
    no code is run, and what is damaged, does not fit the base or says two things at once is refused.

    Args:
        folder_or_repo: A folder that `OneStepTrainer.save_model` wrote, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        base_model: The base where it is no longer where the folder says: a Hub id or a folder.
        allow_pickle: Whether the base's weights may be read from a pickle (pytorch_model.bin) where it has no others.

    Raises:
        ValueError: Neither a folder nor a repository, one that is not whole or not to be trusted, or a base that
            cannot be found or is not the one that the weights were made on.
    """
    model, tokenizer, _ = load_with_report(folder_or_repo, revision, base_model=base_model, allow_pickle=allow_pickle)
    return model, tokenizer


def load_with_report(
    folder_or_repo: str | os.PathLike[str],
    revision: str | None = None,
    *,
    base_model: str | None = None,
    allow_pickle: bool = False,
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase, StepReport]:
    """As `load`, with the report of the run."""
    folder = fetch(folder_or_repo, revision)
    report = read_whole(folder)
    inspection.check_kind(folder, report)
    # A base comes without a head, and says so at length; the adapter brings it.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with inspection.only_named(folder, report.files) as files:
            if report.method == full.name:
                model, base = _whole_model(files, report), base_named(report, folder)
            else:
                base = base_model or _base(report, folder)
                model = _adapted(files, report, base, named=base_model is not None, allow_pickle=allow_pickle)
            # Rows that came as tokens leave no tokenizer behind.
            own = "tokenizer_config.json" in report.files
            tokenizer = load_tokenizer(str(files) if own else base)
    finally:
        logging.set_verbosity(verbosity)
    if own:
        tokenizer.name_or_path = str(folder)
    if report.method == full.name:
        model.name_or_path = config_of(model).name_or_path = str(folder)
    if config_of(model).pad_token_id is None:
        config_of(model).pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer, report


def _whole_model(files: Path, report: StepReport) -> Any:
    """A model whose own weights were moved."""
    what = (tasks.named(report.task, report.problem_type), report.labels, None, report.outputs)
    shapes = inspection.check_weights(files, report)
    fit.check_model(skeleton(load_config(str(files), *what), what[0]), shapes)
    model, found = load_base(str(files), *what, allow_pickle=False, output_loading_info=True)
    fit.check_all_found(found["missing_keys"])
    return model


def _adapted(files: Path, report: StepReport, base: str, *, named: bool, allow_pickle: bool) -> PeftModel:
    """The base with the adapter on it.

    Args:
        base: Its name, or a folder.
        named: Whether that is the user's word, which goes before what the adapter says.
    """
    what = (tasks.named(report.task, report.problem_type), report.labels)
    commit = None if named else report.base_revision
    adapter = inspection.adapter_config(files, report)
    if not named:
        inspection.check_base(adapter, report)
    shapes = inspection.check_weights(files, report)
    try:
        config = load_config(base, *what, commit, report.outputs)
        if find_adapter_config_file(base, revision=commit) is not None:
            raise ValueError(f"The base {base!r} is an adapter itself, not a model.")
        fit.check_adapter(skeleton(config, what[0]), adapter, shapes)
        model = load_base(base, *what, commit, report.outputs, allow_pickle=allow_pickle)
    except ValueError as error:
        raise ValueError(f"{error} If the base has moved, name it: {BASE_OPTION}.") from error
    adapted = PeftModel.from_pretrained(model, str(files), config=adapter)
    if report.method == prompt_tuning.name:
        prompt_tuning.settle(adapted)
    return adapted


def fetch(folder_or_repo: str | os.PathLike[str], revision: str | None) -> Path:
    """A folder as it is, or of a repository the files that its report names.

    Raises:
        ValueError: Neither a folder nor a repository, or one that this package did not save.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"`revision={revision!r}`, but {str(folder)!r} is a folder here. Leave `revision` out.")
        return folder
    repo = str(folder_or_repo)
    try:
        found = Path(hf_hub_download(repo, FILE, revision=revision)).parent
        names = [glob.escape(name) for name in read_report(found).files if name != CARD]
        return Path(snapshot_download(repo, revision=found.name, allow_patterns=[FILE, *names]))
    except LocalEntryNotFoundError as error:
        raise ValueError(_not_given(repo, error)) from error
    except EntryNotFoundError as error:
        raise ValueError(f"{repo!r} holds no {FILE}: it was not saved by onestep_peft.") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(_not_given(repo, error)) from error


def _not_given(repo: str, error: Exception) -> str:
    return without_secrets(
        f"{repo!r} is no folder here, and the Hub does not give it ({type(error).__name__}: "
        f"{str(error).strip().splitlines()[0]}). Check the name, the network, and `hf auth login` for a private one."
    )


def _base(report: StepReport, folder: Path) -> str:
    """Where the base is, as the report says.

    Raises:
        ValueError: It does not say, or what stands under that name is something else.
    """
    base = base_named(report, folder)
    if not base:
        raise ValueError(
            f"{str(folder)!r} does not say what its base is: it was built from a configuration. Save the base in a "
            "folder and name it: `load(..., base_model=...)`."
        )
    if (report.base_revision is not None or is_cached(folder)) and os.path.isdir(base):
        raise ValueError(
            f"The base {base!r} must be a repository on the Hub, but here a folder of that name would be taken for it. "
            f"Go to another folder; or, if it is meant, name it: {BASE_OPTION}."
        )
    return base


def base_named(report: StepReport, folder: Path) -> str:
    """The base as the report names it: a folder is relative to the adapter's own, if that was not downloaded."""
    if not report.base_model or report.base_revision is not None or is_cached(folder):
        return report.base_model
    beside = (folder / report.base_model).resolve()
    return str(beside) if beside.is_dir() else report.base_model
