"""Results kept row by row, so that a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from onestep_peft import __version__


class Results:
    """A file of JSON lines in `results/`.

    Args:
        name: Its name, without the ending.
        folder: Another folder than `results/`, for runs that only try a script.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.path = (folder or Path(__file__).parent / "results") / f"{name}.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these fields, or None."""
        return next((row for row in self.rows() if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, with the machine's kind and the versions."""
        self.path.parent.mkdir(exist_ok=True)
        about = {"machine": machine(), "versions": {"onestep_peft": __version__, "torch": torch.__version__}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **about}) + "\n")


def machine() -> str:
    """What kind of machine this is: an accelerator's name, or the processor's kind and the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
