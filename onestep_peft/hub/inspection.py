"""What a saved folder holds, looked at before any of it is loaded: it may come from anybody.

`saving.read_whole` sees to its names and checksums; `fit` to whether the weights belong to the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from onestep_peft import tasks
from onestep_peft.file_names import check_names
from onestep_peft.hub import probe
from onestep_peft.methods import METHODS, full
from onestep_peft.report import FILE, StepReport
from onestep_peft.saving import CARD, read_text

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CONFIG = "config.json"
INDEX = ".safetensors.index.json"
# By name, how large every tensor of a file is.
Shapes = dict[str, tuple[int, ...]]


@contextlib.contextmanager
def only_named(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder that shows nothing but these files of another one.

    PEFT and transformers look for many names: a pickle of weights, another configuration, a chat template. What the
    report does not answer for is not there for them.
    """
    with tempfile.TemporaryDirectory(prefix="onestep-load-") as parent:
        for name in set(names) - {CARD}:
            link = Path(parent) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).resolve())
        yield Path(parent)


def check_kind(folder: Path, report: StepReport) -> None:
    """Raises a ValueError for a task or method that is unknown, or files that are not those of the method."""
    tasks.named(report.task, report.problem_type)
    if report.method not in METHODS:
        raise ValueError(
            f"{FILE} names the method {report.method!r}, and this release knows {', '.join(METHODS)}. Upgrade "
            "onestep-peft, if it comes from a newer one."
        )
    needed, foreign = [ADAPTER_CONFIG, ADAPTER_WEIGHTS], CONFIG
    if report.method == full.name:
        needed, foreign = [CONFIG], ADAPTER_CONFIG
    for name in needed:
        if name not in report.files:
            raise ValueError(f"{str(folder)!r} has the method {report.method!r}, but no {name}. Save it again.")
    if foreign in report.files:
        raise ValueError(
            f"{str(folder)!r} has the method {report.method!r}, to which no {foreign} belongs: with it, other programs "
            "would load something else. Do not use this folder."
        )


def adapter_config(folder: Path, report: StepReport) -> PeftConfig:
    """The adapter's configuration, if it is one that this package saves.

    Raises:
        ValueError: It is of another class or for another task than the report says, or has options that do more than
            describe where the weights belong.
    """
    given = read_object(folder / ADAPTER_CONFIG)
    method, task = METHODS[report.method], tasks.named(report.task, report.problem_type)
    kind = type(method.default())
    for name, wanted in (("peft_type", kind().peft_type.value), ("task_type", task.peft_task_type)):
        # An adapter that was made without a task, and so without a class of its own, has none here either.
        if given.get(name) != wanted and (name, given.get(name)) != ("task_type", None):
            raise ValueError(
                f"{ADAPTER_CONFIG} says `{name}={given.get(name)!r}`, but {FILE} stands for {wanted!r}. Do not use "
                "this folder, or save it again."
            )
    known = {f.name for f in dataclasses.fields(kind)} - {"runtime_config"}
    news = sorted(name for name in given.keys() - known if given[name])
    if news:
        raise ValueError(
            f"{ADAPTER_CONFIG} has {', '.join(news)}, which this release of PEFT does not know. Upgrade peft."
        )
    try:
        config = kind(**{name: given[name] for name in given.keys() & known} | {"inference_mode": False})
        method.validate(config)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise ValueError(f"{ADAPTER_CONFIG} will not do: {str(error).splitlines()[0]}") from error
    return config


def check_base(config: PeftConfig, report: StepReport) -> None:
    """Raises a ValueError where the adapter's configuration, which PEFT goes by, names another base than the report."""
    said, known = (config.base_model_name_or_path or "", config.revision), (report.base_model, report.base_revision)
    if report.base_revision is None and config.revision is None:
        # A folder is told from where each was saved; what both paths have in common is how they end.
        said, known = ((Path(os.path.normpath(name)).name.strip("."), None) for name, _ in (said, known))
        if "" in (said[0], known[0]):
            return
    if said != known:
        raise ValueError(
            f"{ADAPTER_CONFIG} names the base {config.base_model_name_or_path!r} at {config.revision}, and {FILE} "
            f"{report.base_model!r} at {report.base_revision}. Do not use this folder; or say which base you mean: "
            "`base_model=` (`--base-model` in the shell)."
        )


def check_weights(folder: Path, report: StepReport) -> Shapes:
    """How large the tensors are, once all of their numbers are known to be finite.

    Raises:
        ValueError: A file is not in the format of safetensors, a tensor holds NaN or infinity, or an index names
            files that the report does not.
    """
    for name in report.files:
        if name.endswith(INDEX):
            _check_index(folder, name, report)
    names = [ADAPTER_WEIGHTS]
    if report.method == full.name:
        names = sorted(name for name in report.files if name.endswith(".safetensors") and name != probe.FILE)
    shapes: Shapes = {}
    for name in names:
        try:
            shapes |= _shapes(folder, name)
        except SafetensorError as error:
            raise ValueError(f"{name} is no whole file of safetensors ({error}). Download or save it again.") from error
    return shapes


def _shapes(folder: Path, name: str) -> Shapes:
    shapes = {}
    with safe_open(folder / name, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{name} has NaN or infinity in {key!r}, so no answer would be a number. Train and save it again."
                )
            shapes[key] = tuple(tensor.shape)
    return shapes


def _check_index(folder: Path, name: str, report: StepReport) -> None:
    """Raises a ValueError for an index of weights that leads to other files than those of the folder."""
    places = read_object(folder / name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{name} is no index of weights. Save it again.")
    check_names(folder, places.values())
    missing = sorted(set(places.values()) - report.files.keys())
    if missing:
        raise ValueError(f"{name} names {missing[0]}, which {FILE} does not. Download or save it again.")


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: It holds none.
    """
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error}). Download or save it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds a {type(found).__name__} instead of options. Download or save it again.")
    return found
