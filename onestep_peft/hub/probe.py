"""What a model answers to a few inputs, kept with it, so that any later process can tell whether it is the same model.

`python -m onestep_peft.hub.probe FOLDER [float64] [allow_pickle]` loads a saved folder and prints, as JSON, how far its
answers are off.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onestep_peft.tasks import logits_for, task_of
from onestep_peft.wrapping import config_of

FILE = "probe.safetensors"
LOGITS = "logits"
MADE_ON = "made_on"
# The largest difference from what was recorded, by the largest logit. A head that PEFT loses is off by 0.004 or more,
# two runs in fp32 by 1e-6, on another device by 1e-5; in 16 bits a logit itself is good to 2^-8 only.
TOLERANCE = 1e-4
TOLERANCE_16_BIT = 2e-2
# The most logits that are kept: a language model has one for every word of its vocabulary at every token.
LOGITS_MAX = 1 << 20
PATIENCE_S = 1800  # a base of many gigabytes may have to be downloaded


def special_ids(config: Any, tokenizer: Any) -> set[int]:
    """Ids of the special tokens, as the tokenizer knows them, else as the model's configuration does."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    ids = [getattr(config, name, None) for name in names]
    return {int(i) for i in [*ids, *getattr(tokenizer, "all_special_ids", ())] if isinstance(i, int)}


def record(model: nn.Module, batch: Mapping[str, Any], keep: set[int], file: Path) -> None:
    """Writes inputs and the model's logits for them, `(rows, classes)` or `(rows, tokens, classes)`, fp32, on the CPU.

    The file travels with the model, so it must not hold anybody's rows: words give way to words drawn from a seed,
    and what remains of a row is its length and its special tokens (which some heads read from).

    Args:
        batch: Inputs as the model takes them, on its device; labels are left out.
        keep: Ids of the special tokens.
    """
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    inputs["input_ids"] = _redrawn(inputs["input_ids"], keep, int(embeddings.num_embeddings))
    task = task_of(model)
    if task.by_token:
        inputs = _shortened(inputs, LOGITS_MAX // task.outputs(config_of(model)))
    logits = _logits(model, inputs)
    tensors = {name: value.cpu().contiguous() for name, value in inputs.items()} | {LOGITS: logits}
    # One entry: safetensors writes several in an order that changes from call to call, and so would the checksum.
    save_file(tensors, file, metadata={MADE_ON: f"{next(model.parameters()).device.type} {dtype_of(model)}"})


def _shortened(inputs: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """As many rows and tokens of inputs `(rows, length)` as make `tokens` in all; at least one row of two."""
    rows, length = inputs["input_ids"].shape
    rows = max(1, min(rows, tokens // 2))
    length = max(2, min(length, tokens // rows))
    return {name: value[:rows, :length] for name, value in inputs.items()}


def _redrawn(ids: Tensor, keep: set[int], vocabulary: int) -> Tensor:
    words = torch.tensor([i for i in range(vocabulary) if i not in keep])
    drawn = words[torch.randint(len(words), ids.shape, generator=torch.Generator().manual_seed(0))].to(ids)
    special = torch.isin(ids, torch.tensor(sorted(keep), device=ids.device, dtype=ids.dtype))
    return torch.where(special, ids, drawn)


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    was_training = model.training
    model.eval()
    with _own_precision(model):
        logits = logits_for(model, inputs).float().cpu().contiguous()
    model.train(was_training)
    return logits


@contextlib.contextmanager
def _own_precision(model: nn.Module) -> Iterator[None]:
    """While open, a model that is trained under autocast answers without it, as one does that has been loaded.

    accelerate puts a forward that opens autocast in the place of the model's own, which it keeps beside it.
    """
    wrapped, own = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    try:
        if wrapped is not None and own is not None:
            model.forward = own
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        if wrapped is not None and own is not None:
            model.forward = wrapped


def dtype_of(model: nn.Module) -> str:
    """Of the base's weights: adapters and fresh heads are kept in fp32."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return str(embeddings.weight.dtype).removeprefix("torch.")


def compare(folder: Path, float64: bool = False, allow_pickle: bool = False) -> dict[str, float]:
    """How far the folder's model, loaded by `load`, is from what was recorded; see `compare_model`.

    Args:
        float64: Whether to compute in float64: what differs then is the weights, not the rounding on the way.
        allow_pickle: As in `load`.
    """
    from onestep_peft.hub.load import load

    model, _ = load(folder, allow_pickle=allow_pickle)
    return compare_model(model.double() if float64 else model, folder / FILE)


def compare_model(model: nn.Module, file: Path) -> dict[str, float]:
    """How far a model is from what was recorded.

    Returns:
        "difference" (the largest, by the largest recorded logit; infinite where they are not numbers) and the
        "tolerance" for it.

    Raises:
        ValueError: The file is no record for this model.
    """
    made_on, made_in, tensors = _recorded(file)
    _check_words(tensors["input_ids"], model)
    expected = tensors.pop(LOGITS)
    if made_on == "cuda" and torch.cuda.is_available():
        model.to(torch.device("cuda"))
    device = next(model.parameters()).device
    found = _logits(model, {name: value.to(device) for name, value in tensors.items()})
    difference = float("inf")
    if found.shape == expected.shape:
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    exact = {made_in, dtype_of(model)} <= {"float32", "float64"}
    return {
        "difference": difference if difference == difference else float("inf"),
        "tolerance": TOLERANCE if exact else TOLERANCE_16_BIT,
    }


def _recorded(file: Path) -> tuple[str, str, dict[str, Tensor]]:
    """Kind of device and dtype that a record was made on and in, and its tensors."""
    try:
        with safe_open(file, "pt") as record:
            made_on, made_in = record.metadata()[MADE_ON].split()
            tensors = {name: record.get_tensor(name) for name in record.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file.name} is no record of a model's answers ({error}). Save the folder again.") from error
    if not {"input_ids", LOGITS} <= tensors.keys():
        raise ValueError(f"{file.name} holds no inputs, or no answers to them. Save the folder again.")
    return made_on, made_in, tensors


def _check_words(ids: Tensor, model: nn.Module) -> None:
    """Raises a ValueError for a record's inputs that the model has no embeddings for."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    words = not ids.is_floating_point() and ids.numel() > 0
    if not words or int(ids.min()) < 0 or int(ids.max()) >= embeddings.num_embeddings:
        raise ValueError(f"{FILE} holds inputs that are no words of this model. Save the folder again.")


def check_in_fresh_process(
    folder: Path, token: str | None = None, *, float64: bool = False, allow_pickle: bool = False
) -> float:
    """Loads the folder in a process of its own and compares its logits with those that were recorded.

    Whatever the saving process still had in memory and did not write cannot help there.

    Args:
        token: For a private base; None for the one that the Hub's client knows.
        float64: Whether what was recorded was computed in float64, and is to be.
        allow_pickle: As in `load`.

    Returns:
        The largest difference, by the largest recorded logit.

    Raises:
        ValueError: The folder has no record, cannot be loaded, or answers otherwise.
    """
    if not (folder / FILE).is_file():
        raise ValueError(
            f"The folder holds no {FILE}, so its model cannot be checked. Save it again with this release."
        )
    # From an empty folder: a local folder that is named like the base's repository would stand in for it.
    with tempfile.TemporaryDirectory() as empty:
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, **({"HF_TOKEN": token} if token else {})}
        words = [str(folder.resolve()), *["float64"] * float64, *["allow_pickle"] * allow_pickle]
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "onestep_peft.hub.probe", *words],
            capture_output=True, text=True, env=environment, cwd=empty, timeout=PATIENCE_S,
        )  # fmt: skip
    if run.returncode != 0:
        reason = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"A fresh process cannot load the folder: {reason}")
    found = json.loads(run.stdout.splitlines()[-1])
    if not found["difference"] <= found["tolerance"]:
        raise ValueError(
            f"A fresh process that loads the folder gets other logits than the trained model gave: they differ by "
            f"{found['difference']:.2g} of their scale, and {found['tolerance']:.0e} is allowed. Either the base is "
            "not the one that was trained on (check its name and commit), or a part of the model was not saved."
        )
    return float(found["difference"])


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), **dict.fromkeys(sys.argv[2:], True))))
