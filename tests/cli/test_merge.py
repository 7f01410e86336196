"""`onestep merge`: a plain model with the adapter's logits, or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from onestep_peft import load, merging
from onestep_peft.saving import read_whole
from tests.architectures.models import save_base
from tests.cli.conftest import FIXED, QUIET, main, shell
from tests.test_load import LABELS, configurations, named_rows


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    texts = [row["text"] for row in named_rows(8, 3)]
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.float()


def test_the_merged_folder_is_a_plain_model(trained: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    said = shell("merge", trained("lora"), "whole", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "Merged: whole (float32)" in said.stdout and "1e-05 is allowed" in said.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["whole"]
    adapter, tokenizer = load(trained("lora"))
    expected = logits(adapter, tokenizer)
    ours, _ = load(tmp_path / "whole")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    for model in (ours, plain):
        assert type(model).__name__ == "BertForSequenceClassification"
        assert list(model.config.id2label.values()) == LABELS
        assert float((logits(model, tokenizer) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    report = read_whole(tmp_path / "whole")
    assert (report.method, report.merged_from, report.labels) == ("full", "lora", LABELS)
    assert (tmp_path / "whole" / report.base_model).resolve() == base.resolve()
    predict = shell("predict", "whole", "w1 w2 w50", "w9 w12 w60", cwd=tmp_path)
    assert [line.split()[0] for line in predict.stdout.splitlines()] == LABELS


@pytest.mark.parametrize(("size", "reason"), [(1e-1, "other logits"), (2e-6, "was not saved: its logits differ")])
def test_a_merge_that_is_off_leaves_nothing(
    size: float, reason: str, trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_merge = LoraModel.merge_and_unload

    def off(self: LoraModel, **options: Any) -> Any:
        merged = whole_merge(self, **options)
        with torch.no_grad():
            merged.classifier.bias.add_(torch.tensor([size, -size]) * float(merged.classifier.weight.norm()))
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", off)
    with pytest.raises(ValueError, match=reason):
        merging.merge(trained("lora"), tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(folder: Path, **options: Any) -> float:
        raise KeyboardInterrupt

    folder = str(trained("lora"))
    monkeypatch.setattr(merging.probe, "check_in_fresh_process", interrupted)
    capsys.readouterr()
    assert main(["merge", folder, str(tmp_path / "whole")]) == 130
    assert capsys.readouterr().err == "onestep: interrupted; no result was saved\n"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_merged_is_refused_by_name(
    trained: Callable[[str], Path], base: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "whole"
    assert "the method 'full': it is a whole model already" in fails("merge", trained("full"), out)
    assert "the method 'prompt_tuning', which cannot be merged" in fails("merge", trained("prompt_tuning"), out)
    assert "needs OUT" in fails("merge", trained("lora"))
    assert "is there already" in fails("merge", trained("lora"), base)
    other = save_base(tmp_path / "base", configurations()["bert"])
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(other)
    torch.nn.init.normal_(model.bert.encoder.layer[0].output.dense.weight, std=0.1)
    model.bert.save_pretrained(other)
    assert weights.keys() == load_file(other / "model.safetensors").keys()
    message = fails("merge", trained("lora"), out, "--base-model", other)
    assert "On this base the adapter gives other logits" in message and "--base-model" in message
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_checked_as_such(
    dtype: torch.dtype, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base", configurations()["bert"])
    AutoModel.from_pretrained(base).to(dtype).save_pretrained(base)
    run = ["train", "--model", base, "--dataset", data, "--output-dir", tmp_path / "out", *FIXED, *QUIET]
    assert main([str(word) for word in run]) == 0
    capsys.readouterr()
    merge = ["merge", str(tmp_path / "out"), str(tmp_path / "whole")]
    status = main(merge)
    said = capsys.readouterr()
    if dtype == torch.float16:
        assert status == 0
        assert "(float16)" in said.out and "2e-02 is allowed; weights in float16 round the sum" in said.out
        return
    # A net of 32 random units is worse off in bfloat16's 8 bits than any that is used.
    assert status == 2 and "`--float32`" in said.err and not (tmp_path / "whole").exists()
    assert main([*merge, "--float32"]) == 0
    assert "(float32)" in capsys.readouterr().out


def test_a_base_that_has_moved_can_be_named(trained: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(trained("lora"), tmp_path / "deep" / "er" / "adapter"))
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    merging.merge(alone, tmp_path / "whole", base_model=str(moved))
    assert json.loads((tmp_path / "whole" / "onestep.json").read_text())["base_model"] == "../moved"
