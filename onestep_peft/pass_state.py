"""An unfinished pass on disk: written while it runs, verified when it is read, gone when the run is done.

    output_dir/pass/state.json             what it belongs to, how far it is, the checksums of the files below
    output_dir/pass/start-1.safetensors    the trainable parameters at the start of step 1 (counted from 0)
    output_dir/pass/sums-1-40-0.safetensors  the sums after 40 micro-batches of process 0

`state.json` is replaced last, in one go, so that it always names a whole state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from onestep_peft.saving import sha256
from onestep_peft.step import processes

FOLDER = "pass"
FILE = "state.json"


@dataclass
class PassState:
    """How far a run has come.

    Args:
        identity: A hash of all that the sums depend on: rows, model, settings.
        step: Steps that are done; the pass is the next one's.
        batches: Micro-batches of the pass that are in the sums, in each process.
        steps: Records of the steps that are done, as in the report.
        report: The report's fields that earlier parts of the run have filled in.
        seconds: Wall time so far, by part.
        files: sha256 by file name.
    """

    identity: str
    step: int
    batches: int
    steps: list[dict[str, Any]]
    report: dict[str, Any]
    seconds: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfinished:
    """A state that was read, with its tensors.

    Args:
        start: The trainable parameters at the start of the step, in their order.
        sums: This process' sums by name.
    """

    state: PassState
    start: list[Tensor]
    sums: dict[str, Tensor]


def save(folder: Path, state: PassState, start: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Writes a state over an earlier one; whatever cuts this short, one of the two is there and whole.

    Args:
        start: By position, as text. Written once a step, by the first process.
        sums: This process' sums.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    first = folder / f"start-{state.step}.safetensors"
    if processes.rank() == 0:
        if not first.exists() or first.name not in state.files:
            _save(start, first)
            state.files[first.name] = sha256(first)
        written[first.name] = state.files[first.name]
    own = folder / f"sums-{state.step}-{state.batches}-{processes.rank()}.safetensors"
    _save(sums, own)
    written[own.name] = sha256(own)
    files = {name: digest for part in processes.objects(written) for name, digest in part.items()}
    state.files = files
    if processes.rank() == 0:
        text = json.dumps(asdict(state), indent=1)
        staged = folder / f".{FILE}"
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, folder / FILE)
        for path in folder.glob("*.safetensors"):
            if path.name not in files:
                path.unlink()
    processes.objects(None)  # nobody writes the next state before the last one is cleared away


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    staged = path.with_name(f".{path.name}")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, staged)
    os.replace(staged, path)


def read(folder: Path, identity: str) -> Unfinished | None:
    """The state in a folder, its tensors on the CPU; None where there is none.

    Raises:
        ValueError: It belongs to another run, or is damaged; the message says which.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        state = PassState(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{FILE} cannot be read ({error})") from error
    if state.identity != identity:
        raise ValueError("it belongs to other rows, another model or other settings")
    start, sums = f"start-{state.step}.safetensors", f"sums-{state.step}-{state.batches}-{processes.rank()}.safetensors"
    for name in (start, sums):
        file = folder / name
        if name not in state.files or not file.is_file() or sha256(file) != state.files[name]:
            raise ValueError(f"{name} is missing or damaged")
    tensors = load_file(folder / start)
    return Unfinished(state, [tensors[str(i)] for i in range(len(tensors))], load_file(folder / sums))


def remove(folder: Path) -> None:
    """Deletes a state."""
    if processes.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
