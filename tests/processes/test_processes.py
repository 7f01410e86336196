"""`accelerate launch` with two processes on the CPU: the update of one process, whatever the number of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onestep_peft.out_of_fold import PREFIX
from tests.conftest import relative_difference
from tests.processes.run import CUT, KINDS

ROOT = Path(__file__).parents[2]


def launch(
    folder: Path, number: int, *words: str, cpu: bool = True, environment: Mapping[str, str] = os.environ
) -> None:
    """Runs tests.processes.run: alone, or by `accelerate launch`.

    `--multi_gpu` is what makes accelerate start several processes; on the CPU they talk by gloo.
    """
    command = [sys.executable, "-m"]
    if number > 1:
        command += [
            "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(number),
            "--num_cpu_threads_per_process", "1", "--main_process_port", "0", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--module",
        ]  # fmt: skip
    environment = {
        **environment,
        "ACCELERATE_USE_CPU": str(cpu).lower(),
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
    }
    command += ["tests.processes.run", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders in which one and two processes wrote all kinds."""
    found = {}
    for number in (1, 2):
        found[number] = tmp_path_factory.mktemp(f"processes{number}")
        launch(found[number], number)
    return found


def load(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / f"{kind}.json").read_text()), load_file(folder / f"{kind}.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_update_of_one(kind: str, results: dict[int, Path]) -> None:
    (one, first), (two, second) = (load(results[number], kind) for number in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["rows"] == two["rows"]
    for mine, theirs in zip(one["steps"], two["steps"], strict=True):
        assert mine["direction"] == theirs["direction"]
        assert mine["accepted"] == theirs["accepted"]
        assert mine["step_size"] == pytest.approx(theirs["step_size"], rel=0.01)
    for stage, scores in one["metrics"].items():
        if scores is not None:
            assert two["metrics"][stage] == pytest.approx(scores, rel=1e-3), stage
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    # The search stops within its tolerance; a fixed step has only rounding.
    tolerance = 0.02 if "auto" in kind or "two steps" in kind else 1e-3
    folds = {name for name in first if name.startswith(PREFIX)}
    assert bool(folds) == (not kind.endswith(("whole head", "plain", "texts", "small steps")))
    assert first.keys() == second.keys()
    for name in folds:
        assert relative_difference(second[name], first[name]) < tolerance, name
    for name in first.keys() - folds:
        if "lora_A" in name or "lora_B" in name:
            continue  # compared as products below
        # A polar factor lifts what is small in a gradient, its rounding too.
        atol = 5e-4 if "muon" in kind else 1e-5
        assert torch.allclose(second[name], first[name], rtol=1e-3, atol=atol), name
    products, others = _products(first), _products(second)
    assert bool(products) == kind.startswith(("lora", "activation"))
    for name, product in products.items():
        if bool(product.any()):
            assert relative_difference(others[name], product) < tolerance, name


def _products(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """B · A by layer, in float64."""
    return {
        name: parameters[name.replace("lora_A", "lora_B")].double() @ value.double()
        for name, value in parameters.items()
        if "lora_A" in name
    }


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two processes that were both cut short in their pass, and started again."""
    folder = tmp_path_factory.mktemp("interrupted")
    launch(folder, 2, "--cut")
    return folder


@pytest.mark.parametrize("kind", CUT)
def test_two_processes_go_on_with_a_pass_that_was_cut_short(
    kind: str, results: dict[int, Path], interrupted: Path
) -> None:
    (whole, expected), (resumed, found) = load(results[2], kind), load(interrupted, kind)
    assert resumed["resumed"] == [2]  # cut after three micro-batches, saved after two
    assert resumed["steps"] == whole["steps"]
    assert resumed["metrics"] == whole["metrics"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
