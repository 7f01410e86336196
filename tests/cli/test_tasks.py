"""The command on folders of each task: train, predict, evaluate and merge, from raw rows on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from onestep_peft import load
from onestep_peft.cli import main
from onestep_peft.cli.rows import texts_of
from tests.cli.conftest import QUIET
from tests.tasks.small import TAGS
from tests.tasks.test_run import KINDS, eos_tokenizer, logits_of

RUN = {"tags": ["kfac", "0.3"], "gpt2": ["kfac", "0.03"], "topics": ["kfac", "0.03"], "score": ["kfac", "0.03"]}


@pytest.fixture(scope="module", params=RUN)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder with splits `rows` and what the command has made of them, `out`."""
    name, kind = request.param, KINDS[request.param]
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    kind.base().save_pretrained(folder / "base")
    eos_tokenizer(name).save_pretrained(folder / "base")
    (folder / "rows").mkdir()
    for seed, (split, number) in enumerate({"train": 120, "validation": 40, "test": 40}.items()):
        Dataset.from_list(kind.rows(number, seed)).to_json(folder / "rows" / f"{split}.jsonl")
    direction, size = RUN[name]
    words = ["--direction", direction, "--step-size", size, "--task", kind.task, "--lora-r", "4", *QUIET]
    run = ["train", "--model", folder / "base", "--dataset", folder / "rows", "--output-dir", folder / "out", *words]
    assert main([str(word) for word in run]) == 0
    return name, folder


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "onestep.json").read_text()))


def test_evaluate_gives_the_numbers_of_the_report(made: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = made
    out = folder / "metrics.json"
    capsys.readouterr()
    assert main(["evaluate", str(folder / "out"), "--dataset", str(folder / "rows"), "--output", str(out)]) == 0
    found, report = json.loads(out.read_text()), report_of(folder / "out")
    assert report["task"] == KINDS[name].task and report["problem_type"] == KINDS[name].problem_type
    assert found["metrics"] == pytest.approx(report["metrics"]["after"], rel=1e-6)
    assert found.get("class_counts", {}) == report["class_counts"]
    assert found.get("class_recall", {}) == report["class_recall"].get("after", {})
    assert ("recall of each class" in capsys.readouterr().out) == bool(KINDS[name].labels)


def test_predict_from_words_and_from_a_file(made: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = made
    source, out, test = str(folder / "in.jsonl"), str(folder / "out.jsonl"), folder / "rows" / "test.jsonl"
    rows = lines(test.read_text())
    (folder / "in.jsonl").write_text(test.read_text())
    assert main(["predict", str(folder / "out"), "--input", source, "--output", out, "--batch-size", "7"]) == 0
    found = lines(Path(out).read_text())
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    capsys.readouterr()
    text = "w1 w2 w50 w60"
    assert main(["predict", str(folder / "out"), text, "w9 w70"]) == 0
    said = capsys.readouterr().out.splitlines()
    if name == "tags":
        entities = [entity for row in found for entity in row["entities"]]
        assert {entity["entity_group"] for entity in entities} <= {tag[2:] for tag in TAGS[1:]}
        for row in found:
            whole = " ".join(row["tokens"])
            assert all(whole[entity["start"] : entity["end"]] == entity["word"] for entity in row["entities"])
        assert said[0] == text and "w9 w70" in said and any(line.split()[0] in ("PER", "LOC") for line in said[1:])
    elif name == "gpt2":
        assert all(isinstance(row["generated_text"], str) for row in found) and said[0].startswith(f"{text} w")
        assert main(["predict", str(folder / "out"), text, "--max-new-tokens", "1"]) == 0
        assert len(capsys.readouterr().out.split()) == 5
    elif name == "topics":
        assert {"predicted_labels", "predicted_scores"} <= found[0].keys() and said[0].endswith(f"  {text}")
    else:
        assert isinstance(found[0]["value"], float) and float(said[0].split()[0])


def test_merge_gives_a_plain_model_that_the_command_takes(made: tuple[str, Path]) -> None:
    name, folder = made
    assert main(["merge", str(folder / "out"), str(folder / "whole")]) == 0
    whole, tokenizer = load(folder / "whole")
    adapter, _ = load(folder / "out")
    assert type(whole) is type(adapter.get_base_model())
    expected = logits_of(adapter, name)
    assert float((expected - logits_of(whole, name)).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert tokenizer.eos_token == eos_tokenizer(name).eos_token
    found = []
    for model in ("out", "whole"):
        out = folder / f"{model}.json"
        assert main(["evaluate", str(folder / model), "--dataset", str(folder / "rows"), "--output", str(out)]) == 0
        found.append(json.loads(out.read_text())["metrics"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert main(["predict", str(folder / "whole"), "w1 w2 w3"]) == 0


def test_a_dry_run_of_each_task(made: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = made
    words = ["--output-dir", str(folder / "never"), "--search-budget", "1", "--dry-run", *QUIET]
    capsys.readouterr()
    assert main(["train", "--model", str(folder / "base"), "--dataset", str(folder / "rows"), *words]) == 0
    said = capsys.readouterr().out
    assert "120 gradient, 40 search, 40 guard, 40 evaluation" in said
    assert "left out   kfac: beyond `search_budget`" in said and not (folder / "never").exists()


def test_what_rows_of_each_task_hold() -> None:
    words = [{"id": "0", "tokens": ["w1", "w2"], "ner_tags": [0, 1]}]
    assert texts_of(words, []) == [["w1", "w2"]]
    assert texts_of([{"prompt": "w1", "completion": "w2"}], []) == ["w1"]
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    assert texts_of([{"messages": messages}], []) == [messages[:1]]
    assert texts_of([{"prompt": messages[:1], "completion": messages[1:]}], []) == [messages[:1]]
    assert texts_of([{"talk": messages}], []) == [messages[:1]]
    for bad in ({"text": []}, {"text": ["a", 1]}, {"text": [1, 2]}):
        with pytest.raises(ValueError, match="has no text in 'text'"):
            texts_of([{"text": "a"}, bad], ["text"])


def test_texts_of_another_task_are_refused(made: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = made
    row = {"premise": "w1", "hypothesis": "w2"} if name in ("tags", "gpt2") else {"tokens": ["w1", "w2"]}
    (folder / "bad.jsonl").write_text(json.dumps(row) + "\n")
    capsys.readouterr()
    assert main(["predict", str(folder / "out"), "--input", str(folder / "bad.jsonl")]) == 2
    assert f"The task {KINDS[name].task} reads texts or" in capsys.readouterr().err
