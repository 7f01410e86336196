"""An unfinished pass on disk: written while it runs, verified when it is read, gone when the run is done.

    output_dir/onestep_pass/IDENTITY/state.json               how far it is, the checksums of the files below
    output_dir/onestep_pass/IDENTITY/start-1.safetensors      the trainable parameters at the start of step 1 (from 0)
    output_dir/onestep_pass/IDENTITY/sums-1-40-0.safetensors  the sums after 40 micro-batches of process 0

IDENTITY is a hash of all that the sums depend on, so that runs which differ in it leave each other's states alone.
`state.json` is replaced last, in one go, so that it always names a whole state.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestep_peft.saving import sha256
from onestep_peft.step import processes

FOLDER = "onestep_pass"
FILE = "state.json"


@dataclass
class PassState:
    """How far a run has come.

    Args:
        step: Steps that are done; the pass is the next one's.
        batches: Micro-batches of the pass that are in the sums, in each process.
        steps: Records of the steps that are done, as in the report.
        report: The report's fields that earlier parts of the run have filled in.
        seconds: Wall time so far, by part.
        files: sha256 by file name.
    """

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

    Raises:
        OSError: Some process cannot write; raised in all of them.
    """
    written: dict[str, str] = {}
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / f"start-{state.step}.safetensors"
        if processes.rank() == 0:
            written[first.name] = state.files.get(first.name) or _save(start, first)
        own = folder / f"sums-{state.step}-{state.batches}-{processes.rank()}.safetensors"
        written[own.name] = _save(sums, own)
    except OSError as error:
        problem = str(error)
    everywhere = processes.objects((written, problem))
    problem = next((problem for _, problem in everywhere if problem), "")
    if problem:
        raise OSError(problem)
    state.files = {name: digest for part, _ in everywhere for name, digest in part.items()}
    if processes.rank() == 0:
        staged = folder / f".{FILE}"
        staged.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        os.replace(staged, folder / FILE)
        for path in folder.glob("*.safetensors"):
            if path.name not in state.files:
                path.unlink()
    processes.objects(None)  # nobody writes the next state before the last one is cleared away


def _save(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Returns the sha256."""
    staged = path.with_name(f".{path.name}")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, staged)
    except SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from error
    digest = sha256(staged)
    os.replace(staged, path)
    return digest


def read(folder: Path) -> Unfinished | None:
    """The state in a folder, its tensors on the CPU; None where there is none.

    Raises:
        ValueError: It is damaged; the message says which part.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        state = PassState(**json.loads(path.read_text(encoding="utf-8")))
        start = f"start-{state.step}.safetensors"
        sums = f"sums-{state.step}-{state.batches}-{processes.rank()}.safetensors"
        for name in (start, sums):
            file = folder / name
            if name not in state.files or not file.is_file() or sha256(file) != state.files[name]:
                raise ValueError(f"{name} is missing or damaged")
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{FILE} cannot be read ({error})") from error
    tensors = load_file(folder / start)
    return Unfinished(state, [tensors[str(i)] for i in range(len(tensors))], load_file(folder / sums))


def others(folder: Path) -> list[str]:
    """Names of the states beside a folder's own."""
    return sorted(path.parent.name for path in folder.parent.glob(f"*/{FILE}") if path.parent != folder)


def remove(folder: Path) -> None:
    """Deletes a state, and the folder around it where it held no other."""
    if processes.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
