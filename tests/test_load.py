"""Saved folders come back, in fresh processes: with `load`, with plain PEFT, from the loopback Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedConfig

from onestep_peft import OneStepTrainer, load
from onestep_peft.hub import probe
from tests.architectures.models import CONFIGS, save_base
from tests.conftest import config_for, toy_rows, word_tokenizer
from tests.hub_server import HubServer
from tests.tasks.small import counting_texts, tiny_causal_llama

LABELS = ["ant", "bee"]


def configurations() -> dict[str, PreTrainedConfig]:
    return {name: CONFIGS[name] for name in ("bert", "distilbert", "deberta-v2", "modernbert", "llama")}


def named_rows(number: int, seed: int, labels: Sequence[str] = LABELS) -> list[dict[str, Any]]:
    return [{**row, "label": labels[row["label"]]} for row in toy_rows(number, seed, classes=len(labels))]


def saved_run(folder: Path, base: Path) -> tuple[OneStepTrainer, Path]:
    trainer = OneStepTrainer(
        model=str(base),
        args=config_for(folder / "adapter"),
        train_dataset=named_rows(160, 1),
        search_dataset=named_rows(60, 2),
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    trainer.save_model()
    return trainer, folder / "adapter"


def logits_of(trainer: OneStepTrainer) -> list[list[float]]:
    tokens = word_tokenizer()([row["text"] for row in named_rows(8, 3)], padding=True, return_tensors="pt")
    tokens = {name: value for name, value in tokens.items() if name != "token_type_ids"}
    with torch.no_grad():
        return trainer.model.eval()(**tokens).logits.tolist()


def fresh_process(script: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Any:
    """What a script in a new interpreter prints last, as JSON."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=env, cwd=cwd, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


RELOAD = """
import json, sys, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import pipeline
from onestep_peft import load
from tests.conftest import word_tokenizer
from tests.test_load import named_rows

texts = [row["text"] for row in named_rows(8, 3)]

def logits(model, tokenizer):
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    tokens = {name: value for name, value in tokens.items() if name != "token_type_ids"}
    with torch.no_grad():
        return model.eval()(**tokens).logits.tolist()

def all_ways(folder):
    model, tokenizer = load(folder)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    plain.config.pad_token_id = tokenizer.pad_token_id
    answers = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts)
    return {
        "load": logits(model, tokenizer),
        "plain": logits(plain, tokenizer),
        "labels": list(model.config.id2label.values()),
        "pipeline": [answer["label"] for answer in answers],
    }
"""


def assert_close(ours: list[list[float]], expected: list[list[float]]) -> None:
    a, b = torch.tensor(ours), torch.tensor(expected)
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_each_architecture_gives_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    expected, folders = {}, {}
    for name, config in configurations().items():
        base = save_base(tmp_path / name / "base", config)
        trainer, folder = saved_run(tmp_path / name, base)
        expected[name], folders[name] = logits_of(trainer), str(folder)
    reloaded = fresh_process(
        RELOAD + f"\nprint(json.dumps({{name: all_ways(folder) for name, folder in {folders!r}.items()}}))"
    )
    for name, logits in expected.items():
        assert_close(reloaded[name]["load"], logits)
        assert_close(reloaded[name]["plain"], logits)
        assert reloaded[name]["labels"] == LABELS
        assert reloaded[name]["pipeline"] == [LABELS[row.index(max(row))] for row in logits]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `adapter`."""
    folder = tmp_path_factory.mktemp("saved")
    saved_run(folder, save_base(folder / "base", configurations()["bert"]))
    return folder


def test_adapter_and_base_may_move_together(saved: Path, tmp_path: Path) -> None:
    texts = [row["text"] for row in named_rows(8, 3)]
    answers = []
    for folder in (saved, Path(shutil.copytree(saved, tmp_path / "elsewhere"))):
        model, tokenizer = load(folder / "adapter")
        with torch.no_grad():
            answers.append(model(**tokenizer(texts, padding=True, return_tensors="pt")).logits)
    assert torch.equal(*answers)


def test_a_base_that_is_gone_is_named_and_can_be_given(saved: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(saved / "adapter", tmp_path / "alone"))
    with pytest.raises(ValueError, match="base"):
        load(alone)
    model, _ = load(alone, base_model=str(saved / "base"))
    assert list(model.config.id2label.values()) == LABELS


def test_a_changed_or_missing_file_is_noticed(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors has changed"):
        load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing"):
        load(folder)


def test_what_is_no_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no onestep.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"Leave `revision` out"):
        load(saved / "adapter", revision="main")
    with pytest.raises(ValueError, match="no folder here, and the Hub does not give it"):
        load("user/nowhere")


def test_a_report_that_names_files_outside_its_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))
    report = json.loads((folder / "onestep.json").read_text())
    report["files"]["../base/config.json"] = "0" * 64
    (folder / "onestep.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="outside its folder"):
        load(folder)


def test_a_base_that_lacks_a_language_models_head_is_refused(saved: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", CONFIGS["llama"])
    with pytest.raises(ValueError, match=r"lacks 'lm_head.weight'.* LlamaForCausalLM"):
        OneStepTrainer(model=str(base), args=config_for(tmp_path / "out"), train_dataset=counting_texts(20, 1))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*\.q_proj|lm_head"])
def test_a_language_models_head_may_be_among_the_targets(targets: Any, tmp_path: Path) -> None:
    tiny_causal_llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    trainer = OneStepTrainer(
        model=str(tmp_path / "base"),
        args=config_for(tmp_path / "out", direction="sgd", step_size=0.5, guard=False),
        train_dataset=counting_texts(20, 1),
        peft_config=LoraConfig(r=4, target_modules=targets),
    )
    trainer.train()
    trainer.save_model()
    assert probe.compare(tmp_path / "out")["difference"] <= 1e-6


def test_a_base_in_a_folder_has_no_revision(saved: Path, tmp_path: Path) -> None:
    trainer = OneStepTrainer(
        model=str(saved / "base"),
        args=config_for(tmp_path / "out", direction="sgd", step_size=0.5, guard=False),
        train_dataset=named_rows(20, 1),
        peft_config=LoraConfig(r=4, revision="main"),
    )
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] is None
    assert probe.compare(tmp_path / "out")["difference"] <= 1e-6


METRIC = """
import datasets
import evaluate

class Errors(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(kinds))

    def _compute(self, predictions, references):
        return {"errors": float(sum(p != r for p, r in zip(predictions, references)))}
"""

TRAIN_FROM_HUB = """
import json, sys
from onestep_peft.cli import main
from huggingface_hub import HfApi

status = main([
    "train", "--model", "user/base", "--dataset", "user/rows", "--metrics", "accuracy", "user/errors",
    "--output-dir", "adapter", "--lora-r", "4", "--disable-tqdm", "true", "--use-cpu", "true",
])
assert status == 0
HfApi().create_repo("user/adapter")
HfApi().upload_folder(repo_id="user/adapter", folder_path="adapter")
report = json.load(open("adapter/onestep.json"))
config = json.load(open("adapter/adapter_config.json"))
print(json.dumps({"report": report, "revision": config["revision"], "base": config["base_model_name_or_path"]}))
"""

PREDICT_FROM_HUB = """
import contextlib, io, json
from onestep_peft.cli import main

with contextlib.redirect_stdout(io.StringIO()) as said:
    assert main(["predict", "user/adapter", "w1 w2 w50", "w9 w12 w60"]) == 0
words = ["evaluate", "user/adapter", "--dataset", "user/rows", "--split", "test", "--metrics", "user/errors"]
with contextlib.redirect_stdout(io.StringIO()):
    assert main([*words, "--output", "metrics.json"]) == 0
print(json.dumps([said.getvalue(), json.load(open("metrics.json"))]))
"""


# evaluate has a variable of its own.
OFFLINE = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")


def test_model_rows_metric_and_adapter_may_come_from_the_hub(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", configurations()["bert"])
    rows = {
        f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in named_rows(number, seed))
        for seed, (split, number) in enumerate({"train": 160, "validation": 60, "test": 60}.items())
    }
    with HubServer() as hub:
        commit = hub.add_repo("user/base", base)
        hub.add_repo("user/rows", rows, type="dataset", private=True)
        hub.add_repo("user/errors", {"errors.py": METRIC}, type="space")
        env = hub.environment("hf_write") | {"OMP_NUM_THREADS": "1"}
        work = tmp_path / "work"
        work.mkdir()
        made = fresh_process(TRAIN_FROM_HUB, env, work)
        assert made["base"] == made["report"]["base_model"] == "user/base"
        assert made["revision"] == made["report"]["base_revision"] == commit.oid
        assert set(made["report"]["metrics"]["after"]) == {"loss", "accuracy", "errors"}
        # A newer base must not matter: the adapter belongs to the commit that it was made on.
        hub.commit("user/base", {"config.json": "{}"})
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        reader = hub.environment("hf_read") | {"OMP_NUM_THREADS": "1"}
        online, scores = fresh_process(PREDICT_FROM_HUB, reader, elsewhere)
        assert [line.split()[0] for line in online.splitlines()] == LABELS
        assert scores["metrics"]["errors"] == made["report"]["metrics"]["after"]["errors"]
        hub.requests.clear()
        offline = fresh_process(PREDICT_FROM_HUB, reader | dict.fromkeys(OFFLINE, "1"), elsewhere)
        assert offline == [online, scores]
        assert not hub.requests
