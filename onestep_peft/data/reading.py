"""Rows from files or the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read(source: str, configuration: str | None = None) -> DatasetDict:
    """Rows from a file (jsonl, csv, parquet), a folder of such files named after their splits, or a Hub id.

    Args:
        configuration: Which one of a Hub data set's configurations.

    Raises:
        ValueError: Neither such a path nor a data set on the Hub.
    """
    path = Path(source)
    if path.is_dir():
        files = {f.stem: f for f in sorted(path.iterdir()) if f.suffix in BUILDERS}
        if not files:
            raise ValueError(
                f"The folder {source!r} holds no .jsonl, .csv or .parquet file. Name the files after splits."
            )
        return DatasetDict({split: _read_file(file) for split, file in files.items()})
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise ValueError(f"No file {source!r}. Check the path.")
        return DatasetDict({"train": _read_file(path)})
    try:
        found = datasets.load_dataset(source, configuration)
    except Exception as error:  # datasets raises a dozen kinds for one cause
        raise ValueError(
            f"No data set {source!r}: it is no file or folder here ({', '.join(BUILDERS)}), and the Hub "
            f"does not give it ({type(error).__name__}: {error}). Check the name, the network, and `hf auth login` "
            "for a private one."
        ) from error
    return found if isinstance(found, DatasetDict) else DatasetDict({"train": found})


def _read_file(path: Path) -> Dataset:
    try:
        rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{str(path)!r} cannot be read as {BUILDERS[path.suffix]}: {cause}") from error
    return rows
