"""`onestep evaluate`: the numbers of the report, from the folder alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onestep_peft import OneStepTrainer, load
from onestep_peft.cli import main
from onestep_peft.evaluation import evaluate
from tests.cli.conftest import shell
from tests.conftest import config_for, tiny_bert, tokenised, toy_rows
from tests.test_load import named_rows


def test_a_fresh_process_gives_the_numbers_of_the_report(
    trained: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    folder = trained("lora")
    said = shell("evaluate", folder, "--dataset", data, "--output", "metrics.json", "--use-cpu", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "metrics.json").read_text())
    report = json.loads((folder / "onestep.json").read_text())
    assert found == {
        "dataset": str(data), "split": "test", "rows": 60, "metrics": report["metrics"]["after"],
        "class_counts": report["class_counts"], "class_recall": report["class_recall"]["after"],
    }  # fmt: skip
    assert f"60 rows of {data}, split test" in said.stdout
    lines = [line.split() for line in said.stdout.splitlines()]
    assert [f"{value:.4f}" for value in found["metrics"].values()] in lines
    for label, recall in found["class_recall"].items():
        assert [label, str(found["class_counts"][label]), f"{recall:.4f}"] in lines


@pytest.mark.parametrize("method", ["full", "prompt_tuning"])
def test_every_method(method: str, trained: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    folder, out = trained(method), tmp_path / "metrics.json"
    assert main(["evaluate", str(folder), "--dataset", str(data), "--output", str(out), "--use-cpu"]) == 0
    report = json.loads((folder / "onestep.json").read_text())
    assert json.loads(out.read_text())["metrics"] == report["metrics"]["after"]


def test_splits_columns_and_metrics_are_as_named(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "metrics.json"
    words = ["--split", "validation", "--metrics", "f1", "recall", "--text-column", "text", "--label-column", "label"]
    assert main(["evaluate", str(trained("lora")), "--dataset", str(data), *words, "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["split"] == "validation" and set(found["metrics"]) == {"loss", "f1", "recall"}
    assert "validation" in capsys.readouterr().out


def test_what_is_wrong_is_named(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    def said(*words: Any) -> str:
        return fails("evaluate", trained("lora"), *words)

    assert "needs --dataset" in said()
    assert "needs FOLDER" in fails("evaluate", "--dataset", data)
    assert "No split 'tst'" in (message := said("--dataset", data, "--split", "tst")) and "'test'?" in message
    assert "Did you mean 'accuracy'?" in said("--dataset", data, "--metrics", "acuracy")
    assert "Did you mean 'label'?" in said("--dataset", data, "--label-column", "labl")
    assert "must be at least 1" in said("--dataset", data, "--batch-size", "0")
    assert "has no folder to be in" in said("--dataset", data, "--output", tmp_path / "no" / "m.json")
    other = tmp_path / "other.csv"
    other.write_text("text,label\nw1,cow\n")
    assert "label 'cow' is none of the model's classes ['ant', 'bee']" in said("--dataset", other)


def test_the_function_tells_the_task_by_the_model(trained: Callable[[str], Path], tmp_path: Path) -> None:
    model, tokenizer = load(trained("lora"))
    rows = toy_rows(40, 5)
    options = {"use_cpu": True, "disable_tqdm": True}
    assert evaluate(model, tokenizer, tokenised(rows), **options) == evaluate(model, tokenizer, rows, **options)
    with pytest.raises(ValueError, match="BertModel has no task that one step knows"):
        evaluate(tiny_bert().bert, tokenizer, rows)


def test_the_model_of_a_run_scores_as_the_run_does(base: Path, tmp_path: Path) -> None:
    rows = named_rows(60, 7)
    trainer = OneStepTrainer(
        model=str(base),
        args=config_for(tmp_path, direction="kfac", step_size=0.001, per_device_eval_batch_size=7),
        train_dataset=named_rows(80, 1),
        eval_dataset=rows,
    )
    trainer.train()
    options = {"per_device_eval_batch_size": 7, "use_cpu": True, "disable_tqdm": True}
    found = evaluate(trainer.model, trainer.processing_class, rows, **options)
    assert found.metrics == trainer.report.metrics["after"]
    assert found.class_recall == trainer.report.class_recall["after"]
