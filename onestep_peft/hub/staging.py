"""The copy of a saved folder that is pushed: its base pinned, its card written, and whole again."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from onestep_peft.hub.card import card
from onestep_peft.hub.remote import Journal, attempt
from onestep_peft.report import StepReport
from onestep_peft.saving import BASES, CARD, save_whole


@contextlib.contextmanager
def staged(source: Path, report: StepReport, repo_id: str, base: tuple[str, str]) -> Iterator[Path]:
    """A folder for the Hub: the files that the report names, no others, and a card.

    The card needs the repository's name and the base its Hub id, so neither can be written when the folder is saved.
    The copy has a report of its own with checksums of its own files, the card's among them: what is on the Hub is
    whole if and only if its `onestep.json` verifies, as everywhere.

    Args:
        source: A whole folder.
        base: The base's Hub id and commit.
    """
    published = replace(report, base_model=base[0], base_revision=base[1])

    def write(staging: Path) -> StepReport:
        for name in report.files.keys() - {CARD}:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, staging / name)
        _name_base(staging, *base)
        (staging / CARD).write_text(card(published, repo_id), encoding="utf-8")
        return published

    with tempfile.TemporaryDirectory(prefix="onestep-push-") as parent:
        copy = Path(parent) / "adapter"
        save_whole(copy, write)
        yield copy


def _name_base(folder: Path, base: str, commit: str) -> None:
    """Writes the base's Hub id wherever PEFT or transformers keep its name."""
    for name, always in (
        ("adapter_config.json", {"base_model_name_or_path": base, "revision": commit}),
        ("config.json", {}),
    ):
        file = folder / name
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            config |= always | {key: base for key in BASES if config.get(key)}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pinned_base(
    api: HfApi, source: Path, report: StepReport, base_model: str | None, journal: Journal
) -> tuple[str, str]:
    """The base's Hub id and commit.

    Args:
        base_model: Its Hub id where the report does not have it.

    Raises:
        ValueError: The base is a folder here, or no repository that can be read.
    """
    if base_model is None:
        if is_local(report, source):
            raise ValueError(
                f"The base {report.base_model!r} is a folder on this machine, which nobody else has. If it is on the "
                "Hub too, name it: `base_model=` (`--base-model` in the shell). If not, push it there first."
            )
        if report.base_revision is not None:
            return report.base_model, report.base_revision
    name = base_model or report.base_model
    if not is_repo_id(name):
        raise ValueError(f"`base_model={name!r}` is no id on the Hub. Give it as `user/name`.")
    commit = attempt(f"looking up the base {name!r}", lambda: api.model_info(name).sha, journal)
    assert commit is not None
    return name, commit


def is_local(report: StepReport, folder: Path) -> bool:
    """Whether the base that a report names is a folder, which may be gone by now."""
    if report.base_revision is not None:
        return False
    return not is_repo_id(report.base_model) or (folder / report.base_model).is_dir()


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)
