"""A LoRA adapter made one with its base: a plain model, written only if it gives the adapter's logits."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from safetensors.torch import load_file

from onestep_peft.bases import pinned
from onestep_peft.hub import probe
from onestep_peft.hub.load import base_named, fetch, load_with_report
from onestep_peft.methods import full, lora
from onestep_peft.report import PICTURE, StepReport
from onestep_peft.saving import portable, read_whole, save_model_files, save_whole
from onestep_peft.wrapping import config_of

# The largest difference by the largest logit. Weights in fp32 are compared in float64, where only the rounding of
# W + BA is seen (3e-8): in fp32 the rounding on the way would be a hundred times that. Weights of 16 bits lose much of
# BA.
TOLERANCE = 1e-5
TOLERANCE_16_BIT = probe.TOLERANCE_16_BIT


@dataclass(frozen=True)
class MergeResult:
    """A merged model.

    Args:
        folder: Where it is.
        difference: How far a fresh process' logits are from the adapter's, by the largest logit.
        allowed: What was allowed: 1e-5, or 2e-2 for weights of 16 bits.
        dtype: Of its weights.
    """

    folder: Path
    difference: float
    allowed: float
    dtype: str


def merge(
    folder_or_repo: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base_model: str | None = None,
    float32: bool = False,
    allow_pickle: bool = False,
) -> MergeResult:
    """Adds a LoRA's update to its base's weights and saves the sum as a plain model, with tokenizer and report.

    `load`, `onestep push` and transformers' auto classes take the folder. It is whole, or not there: a fresh process
    must get the adapter's logits from it first.

    Args:
        folder_or_repo: A folder that `OneStepTrainer.save_model` wrote, or a repository on the Hub.
        out: A folder that is not there yet, or empty.
        revision: Branch, tag or commit of the repository.
        base_model: The base where it is no longer where the folder says: a Hub id or a folder.
        float32: Whether to widen weights of 16 bits first, so that the sum is not rounded to them.
        allow_pickle: As in `load`. What is saved is no pickle.

    Raises:
        ValueError: No LoRA, a base that is not the one it was made on, a taken `out`, or a merged model that gives
            other logits.
    """
    target = Path(out)
    _check_absent(target)
    source = fetch(folder_or_repo, revision)
    _check_method(read_whole(source), source)
    model, tokenizer, report = load_with_report(source, base_model=base_model, allow_pickle=allow_pickle)
    _check_base(model, source)
    if float32:
        model.float()
    dtype = probe.dtype_of(model)
    base, commit = _base(report, source, base_model, target)

    wide = dtype == "float32" and _runs_in_float64(model, source)

    def write(staging: Path) -> StepReport:
        _record(model, tokenizer, source, staging, wide)
        save_model_files(cast(Any, model).merge_and_unload(safe_merge=True), staging)
        tokenizer.save_pretrained(staging)
        if PICTURE in report.files:
            shutil.copyfile(source / PICTURE, staging / PICTURE)
        return replace(report, method=full.name, merged_from=lora.name, base_model=base, base_revision=commit)

    allowed = TOLERANCE if dtype == "float32" else TOLERANCE_16_BIT
    difference = _write_checked(target, write, wide, allowed)
    return MergeResult(target, difference, allowed, dtype)


def _runs_in_float64(model: Any, source: Path) -> bool:
    try:
        probe.compare_model(model.double(), source / probe.FILE)
        return True
    except RuntimeError:  # it makes tensors of its own in fp32
        return False
    finally:
        model.float()


def _record(model: Any, tokenizer: Any, source: Path, target: Path, wide: bool) -> None:
    """Writes the adapter's logits for the inputs that its folder was checked with."""
    inputs = load_file(source / probe.FILE)
    inputs.pop(probe.LOGITS)
    special = probe.special_ids(config_of(model), tokenizer)
    probe.record(model.double() if wide else model, inputs, special, target / probe.FILE)
    if wide:
        model.float()


def _check_absent(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"The output {str(out)!r} is there already. Name a folder that is not, or an empty one.")


def _check_method(report: StepReport, source: Path) -> None:
    if report.method == full.name:
        raise ValueError(f"{str(source)!r} has the method 'full': it is a whole model already, with nothing to merge.")
    if report.method != lora.name:
        raise ValueError(
            f"{str(source)!r} has the method {report.method!r}, which cannot be merged: virtual tokens are inputs, not "
            "weights. Keep the adapter; `load` and `onestep push` take it as it is."
        )
    if probe.FILE not in report.files:
        raise ValueError(
            f"{str(source)!r} holds no {probe.FILE}, so a merged model could not be checked. Save it again with this "
            "release, with rows of text."
        )


def _check_base(model: PeftModel | Any, source: Path) -> None:
    found = probe.compare_model(model, source / probe.FILE)
    if not found["difference"] <= found["tolerance"]:
        raise ValueError(
            f"On this base the adapter gives other logits than when it was saved: they differ by "
            f"{found['difference']:.2g} of their scale. Name the base that it was made on: `base_model=` "
            "(`--base-model` in the shell)."
        )


def _base(report: StepReport, source: Path, base_model: str | None, out: Path) -> tuple[str, str | None]:
    """The base's name in the merged model's report, and its commit."""
    if report.base_revision is not None:
        return report.base_model, report.base_revision
    base = base_model or base_named(report, source)
    return portable(base, out.resolve()), pinned(base)


def _write_checked(out: Path, write: Callable[[Path], StepReport], wide: bool, allowed: float) -> float:
    """Saves the folder beside its place, and moves it there if a fresh process gets the recorded logits from it.

    Args:
        wide: Whether the logits were computed in float64.

    Returns:
        The largest difference.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as parent:
        staging = Path(parent) / "merged"
        save_whole(staging, write)
        try:
            difference = probe.check_in_fresh_process(staging, float64=wide)
        except ValueError as error:
            fix = (
                "" if allowed == TOLERANCE else " In 16 bits W + BA is rounded; `float32=True` (`--float32`) keeps it."
            )
            raise ValueError(f"The merged model is not the adapter's, and was not saved: {error}{fix}") from error
        if difference > allowed:
            raise ValueError(
                f"The merged model was not saved: its logits differ from the adapter's by {difference:.2g} of their "
                f"scale, and {allowed:.0e} is allowed. Keep the adapter, and load it on its base."
            )
        if out.is_dir():
            out.rmdir()
        staging.rename(out)
    return difference
