"""A base, a folder of splits and a trained adapter, made once; the command in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from onestep_peft.cli import main
from tests.architectures.models import save_base
from tests.test_load import configurations, named_rows

QUIET = ["--use-cpu", "true", "--disable-tqdm", "true"]
FIXED = ["--direction", "kfac", "--step-size", "0.001"]


def shell(*arguments: Any, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it."""
    return subprocess.run(
        [sys.executable, "-m", "onestep_peft", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, **options,
    )  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("cli") / "base", configurations()["bert"])


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of splits, each in another format."""
    folder = tmp_path_factory.mktemp("rows")
    train, validation, test = (Dataset.from_list(named_rows(n, seed)) for seed, n in enumerate((160, 60, 60)))
    train.to_json(folder / "train.jsonl")
    validation.to_csv(folder / "validation.csv", index=False)
    test.to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture(scope="session")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved folder by method, each trained once; they are only read."""
    folder = tmp_path_factory.mktemp("trained")

    def get(method: str) -> Path:
        out = folder / method
        if not out.exists():
            fixed = ["--method", method, "--step-size", "0.001", "--direction"]
            fixed.append("sgd" if method == "prompt_tuning" else "kfac")
            run = ["train", "--model", base, "--dataset", data, "--output-dir", out, *fixed, *QUIET]
            assert main([str(word) for word in run]) == 0
        return out

    return get


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused, and returns what it says: one line, no traceback."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("onestep: ")]
        assert len(lines) == 1 and lines[0].startswith("onestep: error: ")
        return lines[0]

    return run
