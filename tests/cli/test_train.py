"""`onestep train`, as a person types it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from onestep_peft import OneStepConfig, __version__, load
from onestep_peft.cli import COMMANDS, main
from tests.cli.conftest import QUIET, shell
from tests.test_load import named_rows


def test_train_and_predict_in_processes_of_their_own(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ["train", "--model", base, "--dataset", data, "--output-dir", out, "--use-cpu"]
    train = shell(*run, "--lora-r", "4", cwd=tmp_path)
    assert train.returncode == 0, train.stderr
    for line in ("train_dataset: 160 rows", "search_dataset: 60 rows", "eval_dataset: 60 rows"):
        assert line in train.stdout
    stages = [line.split()[0] for line in train.stdout.splitlines() if line[:5].strip() in ("base", "head", "after")]
    assert stages == ["base", "head", "after"]
    assert "pass 1/1" in train.stderr and "search" in train.stderr  # the bars
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "adapter_model.safetensors", "onestep.json"} <= {file.name for file in out.iterdir()}

    predict = shell("predict", out, "w1 w2 w50", "w9 w12 w60", cwd=tmp_path)
    assert predict.returncode == 0, predict.stderr
    assert [(line.split()[0], line.split(maxsplit=2)[2]) for line in predict.stdout.splitlines()] == [
        ("ant", "w1 w2 w50"),
        ("bee", "w9 w12 w60"),
    ]

    again = shell(*run, cwd=tmp_path)
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


def test_the_folds_of_the_head_are_an_option(base: Path, data: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    fixed = ["--direction", "kfac", "--step-size", "0.001", "--lora-r", "2", "--no-guard", *QUIET]
    moved = {}
    for folds in ("1", "3"):
        out = tmp_path / folds
        run = ["train", "--model", str(base), "--dataset", str(data / "train.jsonl"), "--output-dir", str(out), *fixed]
        assert main([*run, "--head-folds", folds]) == 0
        moved[folds] = torch.cat([p.flatten() for p in load(out)[0].parameters()])
    assert not torch.equal(moved["1"], moved["3"])
    message = fails(*run, "--head-folds", "0")
    assert "`head_folds=0`" in message and "the default is 5" in message


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
    base: Path, data: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    run = ["train", "--model", base, "--dataset", data, "--output-dir", tmp_path / "out", *QUIET]
    assert "Did you mean 'train'?" in fails("trian")
    assert "'--dampin'" in (message := fails(*run, "--dampin", "0.1")) and "'--damping'" in message
    assert "Did you mean 'kfac'?" in fails(*run, "--direction", "kfca")
    assert "Did you mean 'accuracy'?" in fails(*run, "--metrics", "acuracy")
    assert "Did you mean 'label'?" in fails(*run, "--label-column", "labl")
    assert "Did you mean 'query'?" in fails(*run, "--lora-target-modules", "qery")
    assert not (tmp_path / "out" / "onestep.json").exists()


def test_bad_input_is_told_before_any_work(base: Path, data: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    out = ["--output-dir", tmp_path / "out", *QUIET]
    assert "needs --model" in fails("train", "--dataset", data)
    assert "has no tokenizer that can be loaded" in fails("train", "--model", "no/base", "--dataset", data, *out)
    assert "No data set 'no/rows'" in fails("train", "--model", base, "--dataset", "no/rows", *out)
    assert "No file" in fails("train", "--model", base, "--dataset", tmp_path / "no.csv", *out)
    assert "must be at least 0" in fails("train", "--model", base, "--dataset", data, *out, "--damping", "-1")
    assert "neither" in fails("train", "--model", base, "--dataset", data, *out, "--step-size", "far")
    message = fails("train", "--model", base, "--dataset", data, *out, "--lora-alpha", "0")
    assert "scales the adapter by zero" in message


def test_a_text_column_that_could_be_any_is_asked_for(base: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    rows = [{"head": row["text"], "body": row["text"], "label": row["label"]} for row in named_rows(80, 1)]
    file = tmp_path / "rows.csv"
    Dataset.from_list(rows).to_csv(file, index=False)
    run = ["train", "--model", base, "--dataset", file, "--output-dir", tmp_path / "out", *QUIET]
    message = fails(*run)
    assert "'head'" in message and "'body'" in message and "--text-column" in message
    assert main([*map(str, run), "--text-column", "head", "body", "--direction", "kfac", "--step-size", "0.001"]) == 0


def test_options_of_another_method_are_refused(base: Path, data: Path, fails: Callable[..., str]) -> None:
    run = ["train", "--model", base, "--dataset", data, *QUIET]
    message = fails(*run, "--method", "full", "--lora-r", "4")
    assert "`--lora-r 4` belongs to the method lora, and this run's is full. Leave it out" in message
    message = fails(*run, "--num-virtual-tokens", "4")
    assert "belongs to the method prompt_tuning" in message and "`--method prompt_tuning`" in message
    assert "belongs to the method lora" in fails(*run, "--method", "prompt_tuning", "--lora-target-modules", "query")
    assert "Did you mean 'full'?" in fails(*run, "--method", "ful")
    assert "must be at least 1" in fails(*run, "--method", "prompt_tuning", "--num-virtual-tokens", "0")


def test_a_prompt_starts_from_words_and_names_no_path_of_this_machine(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, options = tmp_path / "out", ["--num-virtual-tokens", "3", "--prompt-tuning-init-text", "w1 w2 w9"]
    plain = ["--direction", "sgd", "--step-size", "1e-9", "--fit-head", "false"]
    run = [
        "train",
        "--model",
        base,
        "--dataset",
        data,
        "--output-dir",
        out,
        "--method",
        "prompt_tuning",
        *plain,
        *QUIET,
    ]
    assert main([str(word) for word in [*run, *options]]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["prompt_tuning_init_text"]) == (3, "w1 w2 w9")
    assert not any(str(value).startswith("/") for value in config.values())
    model, tokenizer = load(out)
    words = model.get_base_model().get_input_embeddings().weight[tokenizer("w1 w2 w9")["input_ids"][:3]]
    prompt = model.prompt_encoder["default"].embedding.weight
    assert torch.allclose(prompt, words, atol=1e-6)


def test_a_dry_run_writes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ["train", "--model", base, "--dataset", data, "--output-dir", out, *QUIET]
    said = shell(*run, "--dry-run", "--lora-r", "4", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "160 gradient, 60 search, 60 guard, 60 evaluation" in said.stdout
    assert "2 × attention.self.query (32×32): kfac_schatten, kfac" in said.stdout
    assert f"Nothing was trained or written. Without --dry-run, the result goes to {out}." in said.stdout
    assert not list(tmp_path.iterdir())


def test_the_help_of_train_shows_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = capsys.readouterr().out.split()
    shown = {
        "--task", "--dry-run", "--config", "--max-length", "--search-budget", "--activation-checkpointing",
        "--save-pass-minutes", "--text-column", "--method",
    }  # fmt: skip
    assert shown <= set(words)


def test_help_of_each_command_is_short_and_in_one_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        said = capsys.readouterr().out
        assert end.value.code == 0 and f"  onestep {command} " in said
        assert len(said.splitlines()) < 100 and "--learning-rate" not in said
        assert not [word for word in said.split() if word.startswith("--") and "_" in word]
