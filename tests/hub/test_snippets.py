"""Every way of loading that a card tells, executed: by task, by method, and for merged models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onestep_peft import StepReport
from onestep_peft.hub.card import card
from onestep_peft.merging import merge
from onestep_peft.saving import read_whole
from tests.hub_server.card import validate_card
from tests.tasks.test_run import KINDS, logits_of, run, sample

METHODS = ["lora", "full", "prompt_tuning"]
SAID = {
    "lora": "A LoRA adapter for a local base model",
    "full": "A fully tuned copy of a local base model",
    "prompt_tuning": "A tuned prompt (an adapter) for a local base model",
}


def executed(report: StepReport, folder: Path) -> Iterator[dict[str, Any]]:
    """What each of the card's pieces of code leaves, with the folder in place of the repository."""
    text = card(report, "user/whole")
    assert validate_card(text, "model") == ([], [])
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        namespace: dict[str, Any] = {}
        exec(snippet.replace('"user/whole"', repr(str(folder))), namespace)
        yield namespace


def same(expected: torch.Tensor, logits: torch.Tensor) -> bool:
    return float((expected - logits).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tags", "topics", "score", "gpt2"])
def test_a_folder_of_each_task_and_method(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {} if method == "lora" else {"method": method}
    trainer = run(tmp_path, name, **options, direction="sgd", step_size=0.01, guard=False, fit_head=False)
    folder = tmp_path / method
    assert SAID[method] in card(trainer.report)
    expected = logits_of(trainer.model, name)
    capsys.readouterr()
    for namespace in executed(trainer.report, folder):
        assert same(expected, logits_of(namespace["model"], name))
        assert capsys.readouterr().out.strip()
        tokens = sample(name)["input_ids"].shape[1]
        if method == "prompt_tuning" and KINDS[name].task == "token-classification":
            with torch.no_grad():
                # PEFT alone answers for the prompt too, as the card says; `load` does not.
                answered = namespace["model"](**sample(name)).logits.shape[1]
            assert answered == (tokens if "load" in namespace else tokens + 20)


@pytest.mark.parametrize("name", ["tags", "topics", "score", "gpt2", "llama"])
def test_a_merged_model_of_each_task(name: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, name, direction="sgd", step_size=0.01, guard=False, fit_head=False)
    found = merge(tmp_path / "lora", tmp_path / "whole")
    assert found.difference <= found.allowed
    report = read_whole(tmp_path / "whole")
    assert (report.method, report.merged_from, report.task) == ("full", "lora", KINDS[name].task)
    assert "A LoRA adapter merged into a local base model" in card(report)
    expected = logits_of(trainer.model, name)
    for namespace in executed(report, tmp_path / "whole"):
        model = namespace["model"]
        assert type(model) is type(trainer.model.get_base_model())
        assert same(expected, logits_of(model, name))
        if KINDS[name].labels:
            assert list(model.config.id2label.values()) == KINDS[name].labels
