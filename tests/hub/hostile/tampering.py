"""What somebody may do to a saved folder, and what `load` says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onestep_peft import load
from tests.conftest import assert_same_bits, bits

Change = Callable[[Path], None]
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
REPORT, RECORD = "onestep.json", "probe.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


def refusal(folder: Path, **options: Any) -> str:
    """What `load` says of a folder: an error for people, in one line."""
    with pytest.raises(ValueError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(model: Any, expected: Any) -> None:
    """Bit by bit, but for the head that the adapter's own stands before."""
    assert_same_bits(model, bits(expected), lambda name: "original_module" not in name)


def edited(name: str, **options: Any) -> Change:
    """Other options in a JSON file."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | options))

    return change


def reweighed(change: Callable[[dict[str, torch.Tensor]], Any], name: str = ADAPTER, **metadata: str) -> Change:
    """Other tensors in a file."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt", **metadata})

    return rewrite


def report_with(folder: Path, **fields: Any) -> Path:
    """A folder whose report is edited as it stands, without regard to anything."""
    edited(REPORT, **fields)(folder)
    return folder


class Marker:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)
