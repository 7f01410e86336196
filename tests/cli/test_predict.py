"""`onestep predict`: texts, files and standard input."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onestep_peft.cli import main
from onestep_peft.cli.rows import texts_of
from tests.cli.conftest import shell
from tests.test_load import LABELS

TEXTS = ["w1 w2 w50", "w9 w12 w60", "w3 w70"]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_keep_their_fields_in_a_process_of_its_own(trained: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"id": f"00{i}", "text": text, "more": [i, None]} for i, text in enumerate(TEXTS * 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    said = shell("predict", trained("lora"), "--input", "rows.jsonl", "--output", "out.jsonl", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "60 rows in out.jsonl." in said.stdout and "60/60" in said.stderr
    found = lines((tmp_path / "out.jsonl").read_text())
    assert [{name: row[name] for name in ("id", "text", "more")} for row in found] == rows
    assert {row["label"] for row in found} == set(LABELS) and all(0.5 <= row["score"] <= 1 for row in found)
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl"}
    alone = shell("predict", trained("lora"), *TEXTS, cwd=tmp_path)
    assert [line.split()[0] for line in alone.stdout.splitlines()] == [row["label"] for row in found[:3]]


def test_csv_and_text_files_give_the_same(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(trained("lora"))
    (tmp_path / "rows.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "rows.csv").write_text("label,body,id\n" + "".join(f'?,"{text}",007\n' for text in TEXTS))
    for kind in ("txt", "csv"):
        source, out = str(tmp_path / f"rows.{kind}"), str(tmp_path / f"{kind}.jsonl")
        assert main(["predict", folder, "--input", source, "--output", out]) == 0
    plain, table = (lines((tmp_path / f"{kind}.jsonl").read_text()) for kind in ("txt", "csv"))
    # A field of the rows is never written over.
    assert [row["label"] for row in table] == ["?"] * 3 and [row["id"] for row in table] == ["007"] * 3
    assert [row["predicted_label"] for row in table] == [row["label"] for row in plain]
    assert [row["predicted_score"] for row in table] == [row["score"] for row in plain]


@pytest.mark.parametrize("text", ["\n".join(TEXTS), "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)])
@pytest.mark.parametrize("words", [["-"], ["--input", "-"]])
def test_standard_input(
    text: str, words: list[str], trained: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = str(trained("lora"))
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["predict", folder, *words, "--batch-size", "2"]) == 0
    assert [(row["text"], row["label"]) for row in lines(capsys.readouterr().out)] == [
        (TEXTS[0], "ant"), (TEXTS[1], "bee"), (TEXTS[2], "ant")
    ]  # fmt: skip


def test_texts_longer_than_the_model_are_cut(
    trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(trained("lora")), " ".join(["w1"] * 200)]) == 0
    assert "ant" in capsys.readouterr().out


def test_each_fault_of_the_input_is_named(
    trained: Callable[[str], Path], tmp_path: Path, fails: Callable[..., str]
) -> None:
    def written(name: str, text: str | bytes) -> Path:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    def said(*words: Any) -> str:
        return fails("predict", "no/where", *words)

    good = written("good.txt", "w1\n")
    assert "needs TEXTS or --input" in said()
    assert "Texts and `--input` are both given" in said("text", "--input", good)
    assert "cannot be read: No such file" in said("--input", tmp_path / "no.csv")
    assert "none of .jsonl, .json, .csv, .txt or `-`" in said("--input", written("rows.parquet", "x"))
    assert "is not UTF-8" in said("--input", written("latin.txt", b"caf\xe9\n"))
    assert "holds no rows" in said("--input", written("empty.jsonl", "\n"))
    assert "bad.jsonl, line 2: no JSON" in said("--input", written("bad.jsonl", '{"text": "a"}\n{"text"\n'))
    assert "line 1: list in place of an object" in said("--input", written("list.jsonl", '["a"]\n'))
    assert "bad.csv, line 3: not as many values" in said("--input", written("bad.csv", "text,id\na,1\nb,c,2\n"))
    assert "Row 1 has no text in 'text': 3" in said("--input", written("n.jsonl", '{"text": "a"}\n{"text": 3}\n'))
    two = written("two.jsonl", '{"head": "a", "body": "b"}\n')
    assert "Which column is the text is not clear" in said("--input", two)
    assert "Did you mean 'body'?" in said("--input", two, "--text-column", "bdy")
    assert "must be at least 1" in said("text", "--batch-size", "0")
    assert "is a folder. Name a file" in said("--input", good, "--output", tmp_path)
    assert "has no folder to be in" in said("--input", good, "--output", tmp_path / "no" / "out.jsonl")
    assert "is the input too" in said("--input", good, "--output", tmp_path / "." / "good.txt")
    assert "no folder here, and the Hub does not give it" in said("text")
    assert "'--inptu'" in (message := said("--inptu", good)) and "Did you mean '--input'?" in message


def test_a_fault_on_the_way_leaves_the_old_output(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    folder = str(trained("lora"))

    def broken(*args: Any, **options: Any) -> Any:
        yield {"label": "ant", "score": 1.0}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onestep_peft.cli.predict.predict", broken)
    (tmp_path / "rows.txt").write_text("w1\nw2\n")
    assert main(["predict", folder, "--input", str(tmp_path / "rows.txt"), "--output", str(out)]) == 1
    assert out.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 2


def test_pairs_of_texts() -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": "x"}]
    assert texts_of(rows, []) == [("a", "b")] and texts_of(rows, ["hypothesis"]) == ["b"]
