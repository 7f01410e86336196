"""`--config FILE`: the same options, typed alike; the command line wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onestep_peft.cli import config_file, main, train
from onestep_peft.cli.parsing import parse
from tests.cli.conftest import QUIET


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_values_are_typed_as_on_the_command_line(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        model: base
        lora-r: 4
        damping: 1e-3
        save_strategy: no        # YAML itself would make false of it
        guard: false
        fit_head: true
        direction: [kfac, kfac_muon]
        text_column: "on"
        stop_at:
        metrics: []
        lr_scheduler_kwargs: {num_cycles: 2}
        """,
    )
    words = [
        "--model", "base", "--lora-r", "4", "--damping", "1e-3", "--save-strategy", "no", "--guard", "false",
        "--fit-head", "true", "--direction", "kfac", "kfac_muon", "--text-column", "on",
        "--lr-scheduler-kwargs", '{"num_cycles": 2}',
    ]  # fmt: skip
    parser = train._parser()
    found = config_file.read(file, parser)
    assert found == parse(parser, words)
    assert (found["lora_r"], found["damping"], found["save_strategy"], found["guard"]) == (4, 1e-3, "no", False)


def test_the_command_line_wins(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = written(
        tmp_path,
        f"model: {base}\ndataset: {data}\noutput-dir: {tmp_path / 'other'}\nlora_r: 4\nlora_alpha: 2\n"
        "direction: kfac_muon\nstep_size: 0.002\n",
    )
    assert main(["train", "--config", str(file), "--output-dir", str(out), "--direction", "kfac", *QUIET]) == 0
    report, config = (json.loads((out / name).read_text()) for name in ("onestep.json", "adapter_config.json"))
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    step = report["steps"][0]
    assert step["direction"] == "kfac" and step["candidates"][0]["points"][1][0] == 0.002
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora_rr: 4", "run.yaml: unknown key 'lora_rr'. Did you mean 'lora_r'?"),
        ("outputdir: x", "Did you mean 'output_dir'?"),
        ("config: other.yaml", "unknown key 'config'"),
        ("lora_r: 4\nlora-r: 5", "run.yaml: the key 'lora-r' is given twice"),
        ("damping: [", "run.yaml is no YAML"),
        ("- damping", "run.yaml holds no options. Write one a line"),
        ("just words", "run.yaml holds no options"),
        ("damping: much", "run.yaml: argument --damping"),
        ("use_cpu: perhaps", "run.yaml: argument --use_cpu"),
        ("direction: [[kfac]]", "the list 'direction' holds more than words and numbers"),
        ("damping: -1", "`damping=-1.0` must be at least 0"),
        ("", "needs --model"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    words = ["--model", "m", "--dataset", "d"] if text else []
    assert said in fails("train", "--config", written(tmp_path, text), *words)


def test_a_file_that_is_not_there(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "no.yaml` cannot be read: No such file" in fails("train", "--config", tmp_path / "no.yaml")
