"""Which names the report of a saved folder may give to its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import constants

# A pickle can run any program while it is read. Nothing that is saved here is one.
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill", ".distcp"}
PROGRAMS = {".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe"}


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Whether all of a folder's files lie inside it, and none is a pickle or a program.

    Args:
        names: As the report gives them, relative to the folder.

    Raises:
        ValueError: A name that leads outside, by itself or as a link, or a file that is not only data.
    """
    inside = _own(folder)
    for name in names:
        if _leads_outside(name):
            raise ValueError(f"The report names {name!r}, outside its folder. Do not use this folder.")
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in PICKLES:
            raise ValueError(
                f"{str(folder)!r} holds {name}, a pickle, which can run any program when it is read, so it is not. "
                "Ask for a folder whose weights are in safetensors; this package saves no other."
            )
        if suffix in PROGRAMS:
            raise ValueError(f"{str(folder)!r} holds {name}, a program, and none is run here. Do not use this folder.")
        if not is_cached(folder) and not (folder / name).resolve().is_relative_to(inside):
            raise ValueError(
                f"{name} in {str(folder)!r} is a link to a file outside its folder. Do not use this folder; if the "
                "link is yours, put the file itself there."
            )


def is_cached(folder: Path) -> bool:
    """Whether a folder is one of the Hub's client, so that what its files say was written elsewhere."""
    return folder.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve())


def _own(folder: Path) -> Path:
    """What a folder's files may be links into: itself.

    The Hub's client keeps the content of a snapshot in `blobs`, two folders up, also in a cache by another name.
    """
    real = folder.resolve()
    repository = real.parents[1] if len(real.parents) > 1 else real
    is_snapshot = real.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if is_snapshot else real


def _leads_outside(name: str) -> bool:
    """Whether a name is more than a path downwards, here or on another system."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and not PureWindowsPath(name).drive
    return not plain or path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == "."
