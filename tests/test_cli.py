"""The command `onestep`, as a person types it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from onestep_peft import OneStepConfig, __version__
from onestep_peft.cli import main
from tests.test_load import configurations, named_rows, save_base

QUIET = ["--use-cpu", "true", "--disable-tqdm", "true"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("cli") / "base", configurations()["bert"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of splits, each in another format."""
    folder = tmp_path_factory.mktemp("rows")
    train, validation, test = (Dataset.from_list(named_rows(n, seed)) for seed, n in enumerate((160, 60, 60)))
    train.to_json(folder / "train.jsonl")
    validation.to_csv(folder / "validation.csv", index=False)
    test.to_parquet(folder / "test.parquet")
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The message of a command that must be refused."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("onestep: error: ")
    return captured.err


def test_train_and_predict_in_processes_of_their_own(base: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onestep_peft"]
    out = tmp_path / "out"
    train = subprocess.run(
        [*command, "train", "--model", base, "--dataset", data, "--output-dir", out, "--lora-r", "4", "--use-cpu"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert train.returncode == 0, train.stderr
    for line in ("train_dataset: 160 rows", "search_dataset: 60 rows", "eval_dataset: 60 rows"):
        assert line in train.stdout
    stages = [line.split()[0] for line in train.stdout.splitlines() if line[:5].strip() in ("base", "head", "after")]
    assert stages == ["base", "head", "after"]
    assert "pass 1/1" in train.stderr and "search" in train.stderr  # the bars
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "adapter_model.safetensors", "onestep.json"} <= {file.name for file in out.iterdir()}

    predict = subprocess.run(
        [*command, "predict", out, "w1 w2 w50", "w9 w12 w60"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert predict.returncode == 0, predict.stderr
    assert [(line.split()[0], line.split(maxsplit=2)[2]) for line in predict.stdout.splitlines()] == [
        ("ant", "w1 w2 w50"),
        ("bee", "w9 w12 w60"),
    ]

    again = subprocess.run(
        [*command, "train", "--model", base, "--dataset", data, "--output-dir", out],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert again.returncode == 2 and "holds another run" in again.stderr


def test_one_file_of_rows_gives_its_own_held_out_rows(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--direction", "kfac", "--step-size", "0.001", "--lora-r", "2", *QUIET]
    status = main(
        ["train", "--model", str(base), "--dataset", str(data / "train.jsonl"), "--output-dir", str(out), *options]
    )
    assert status == 0
    report = json.loads((out / "onestep.json").read_text())
    assert report["rows"] == {"gradient": 144, "search": 0, "guard": 16}
    assert report["steps"][0]["direction"] == "kfac" and report["steps"][0]["candidates"][0]["points"][1][0] == 0.001
    assert "on the held-out rows" in capsys.readouterr().out


def test_every_field_of_the_config_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help-all"])
    assert end.value.code == 0
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(OneStepConfig) if field.init} <= words


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "onestep train" in capsys.readouterr().out
    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out
    assert main([]) == 2


def test_what_is_mistyped_is_named_with_the_nearest_word(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--model", base, "--dataset", data, "--output-dir", tmp_path / "out", *QUIET]
    assert "Did you mean 'train'?" in fails(capsys, "trian")
    assert "'--dampin'" in (message := fails(capsys, *run, "--dampin", "0.1")) and "'--damping'" in message
    assert "Did you mean 'kfac'?" in fails(capsys, *run, "--direction", "kfca")
    assert "Did you mean 'accuracy'?" in fails(capsys, *run, "--metrics", "acuracy")
    assert "Did you mean 'label'?" in fails(capsys, *run, "--label-column", "labl")
    assert "Did you mean 'query'?" in fails(capsys, *run, "--lora-target-modules", "qery")
    assert not (tmp_path / "out" / "onestep.json").exists()


def test_bad_input_is_told_before_any_work(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", tmp_path / "out", *QUIET]
    assert "needs --model" in fails(capsys, "train", "--dataset", data)
    assert "needs TEXTS" in fails(capsys, "predict", "folder")
    assert "has no tokenizer that can be loaded" in fails(
        capsys, "train", "--model", "no/base", "--dataset", data, *out
    )
    assert "No data set 'no/rows'" in fails(capsys, "train", "--model", base, "--dataset", "no/rows", *out)
    assert "No file" in fails(capsys, "train", "--model", base, "--dataset", tmp_path / "no.csv", *out)
    assert "must be at least 0" in fails(capsys, "train", "--model", base, "--dataset", data, *out, "--damping", "-1")
    assert "neither" in fails(capsys, "train", "--model", base, "--dataset", data, *out, "--step-size", "far")
    message = fails(capsys, "train", "--model", base, "--dataset", data, *out, "--lora-alpha", "0")
    assert "scales the adapter by zero" in message


def test_a_text_column_that_could_be_any_is_asked_for(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"head": row["text"], "body": row["text"], "label": row["label"]} for row in named_rows(80, 1)]
    file = tmp_path / "rows.csv"
    Dataset.from_list(rows).to_csv(file, index=False)
    run = ["train", "--model", base, "--dataset", file, "--output-dir", tmp_path / "out", *QUIET]
    message = fails(capsys, *run)
    assert "'head'" in message and "'body'" in message and "--text-column" in message
    assert main([*map(str, run), "--text-column", "head", "body", "--direction", "kfac", "--step-size", "0.001"]) == 0
