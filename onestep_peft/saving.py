"""Folders that are whole or absent: staged beside their place, checked by sha256, the report moved in last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from peft import PeftModel

from onestep_peft.file_names import check_names
from onestep_peft.report import FILE, StepReport

CARD = "README.md"
# Bytes of the largest JSON file that is read: half a million classes, or a thousand steps.
TEXT_MAX = 16 << 20
# Where configurations name the base (the tokenizer is the one that a prompt's first words were read with).
BASES = ("base_model_name_or_path", "_name_or_path", "tokenizer_name_or_path")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder: Path) -> None:
    """Raises a ValueError where the folder is a file."""
    if folder.is_file():
        raise ValueError(f"The output folder {str(folder)!r} is a file. Choose another `output_dir`.")


def check_free(folder: Path) -> None:
    """Raises a ValueError where the folder holds a run already, or is a file."""
    check_folder(folder)
    for taken in (FILE, "adapter_config.json"):
        if (folder / taken).exists():
            raise ValueError(
                f"The output folder {str(folder)!r} holds another run ({taken}). Choose another `output_dir`, or "
                "delete that folder."
            )


def save_whole(folder: Path, write: Callable[[Path], StepReport]) -> StepReport:
    """Lets `write` fill a staging folder, then moves its files in, `onestep.json` with their checksums last.

    A crash at any point leaves either no report or the report of a whole folder.

    Args:
        write: Writes every file but the report into the folder it is given, and returns the report.

    Returns:
        The report as saved, with the checksums.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        report = write(staging)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        report = replace(report, files={path.relative_to(staging).as_posix(): sha256(path) for path in files})
        (staging / FILE).write_text(report.to_json(), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777 & ~_umask())
        (folder / FILE).unlink(missing_ok=True)
        for path in [*files, staging / FILE]:
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
            os.replace(path, target)
        return report
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_file(path: Path, source: str | None = None) -> None:
    """Raises a ValueError for a file that cannot be written, or that is the one that is read."""
    if path.is_dir():
        raise ValueError(f"The output {str(path)!r} is a folder. Name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"The output {str(path)!r} has no folder to be in. Make {str(path.parent)!r} first.")
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"The output {str(path)!r} is the input too. Name another file.")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to write to, which stands under its name only once it is whole."""
    if path.exists() and not path.is_file():  # a device or a pipe
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    staging = Path(name)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yield file
        staging.chmod(0o666 & ~_umask())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def save_model_files(model: Any, folder: Path) -> None:
    """An adapter, or a whole model, as PEFT and transformers save it, less what must not travel.

    Both write a local base as the absolute path of this machine; here it is relative to the working directory, where
    PEFT looks for it. PEFT's README is a form that nobody has filled in.
    """
    options = {"safe_serialization": True} if isinstance(model, PeftModel) else {}
    model.save_pretrained(str(folder), **options)
    (folder / "README.md").unlink(missing_ok=True)
    for name in ("adapter_config.json", "config.json"):
        file = folder / name
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        bases = {key: portable(config[key], Path.cwd()) for key in BASES if config.get(key)}
        if bases:
            file.write_text(json.dumps(config | bases, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def portable(name_or_path: str, start: Path) -> str:
    """A base's name as it may stand in a saved file: a Hub id as it is, a folder relative to `start`."""
    return os.path.relpath(name_or_path, start) if name_or_path and os.path.isdir(name_or_path) else name_or_path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_report(folder: Path) -> StepReport:
    """The report of a saved folder, whose files may be anything.

    Raises:
        ValueError: There is none, it is no report, or it names files that are not its own.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no {FILE}: it was not saved by onestep_peft, or not to the end.")
    report = StepReport.from_json(read_text(path))
    check_names(folder, report.files)
    return report


def read_whole(folder: Path) -> StepReport:
    """The report of a folder whose files all have the checksums that it names.

    Raises:
        ValueError: No report, a file that is no file of the folder's own, a missing one, or one whose bytes are not
            those that were saved.
    """
    report = read_report(folder)
    for name, digest in report.files.items():
        if name == CARD:  # people edit a card on the Hub's pages, and nothing is loaded from it
            continue
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{str(folder)!r} is not whole: {name} is missing. Save or download it again.")
        if sha256(file) != digest:
            raise ValueError(
                f"{str(folder)!r} is not whole: {name} has changed since it was saved. Save or download it again."
            )
    return report


def read_text(path: Path) -> str:
    """A saved JSON file's text.

    Raises:
        ValueError: It is larger than any such file, or no text.
    """
    if path.stat().st_size > TEXT_MAX:
        raise ValueError(
            f"{path.name} has {path.stat().st_size:,} bytes; none that was saved has more than {TEXT_MAX:,}. Do not "
            "use this folder."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no text in UTF-8 ({error.reason}). Save or download it again.") from error
