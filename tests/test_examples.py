"""Every script of `examples/`, as a reader runs it, on tiny models and without a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from onestep_peft import load
from onestep_peft.saving import read_whole
from tests.conftest import CLS, PAD, SEP, SMALL, SPECIAL

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# By script: the base that it needs, the method that it is about, and the last line that it prints.
SCRIPTS = {
    "text_classification": ("encoder", "lora", r"(complaint|praise|question|request|cancellation|spam) <- .+"),
    "full_weights": ("encoder", "full", r"(complaint|praise|question|request|cancellation|spam) <- .+"),
    "prompt_tuning": ("encoder", "prompt_tuning", r"(complaint|praise|question|request|cancellation|spam) <- .+"),
    "from_trainer": ("encoder", "lora", r"(complaint|praise|question|request|cancellation|spam) <- .+"),
    "token_classification": ("encoder", "lora", r"A seat from Bratislava .+|  (origin|destination|when) +\w.*"),
    "causal_language_model": ("decoder", "lora", r"after:.*"),
}


def texts() -> Iterator[str]:
    """All that the bundled rows say."""
    for file in EXAMPLES.glob("data/*/*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield " ".join(row["tokens"]) if "tokens" in row else row.get("text") or row["prompt"] + row["completion"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Pairs of letters merged into 300 tokens, learnt from the bundled rows."""
    found = Tokenizer(models.BPE(unk_token=SPECIAL[1]))
    found.normalizer = normalizers.Lowercase()
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL)))
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=128, **special)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder and a decoder."""
    folder = tmp_path_factory.mktemp("bases")
    small = {**SMALL, "vocab_size": 300, "max_position_embeddings": 160, "pad_token_id": PAD}
    torch.manual_seed(0)
    BertModel(BertConfig(**small)).save_pretrained(folder / "encoder")
    LlamaForCausalLM(
        LlamaConfig(**small, num_key_value_heads=2, bos_token_id=CLS, eos_token_id=SEP)
    ).save_pretrained(folder / "decoder")  # fmt: skip
    for base in ("encoder", "decoder"):
        tokenizer().save_pretrained(folder / base)
    return folder


def test_every_script_is_run() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == SCRIPTS.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_steps_saves_reloads_and_predicts(script: str, bases: Path, tmp_path: Path) -> None:
    base, method, last_line = SCRIPTS[script]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), "--model", str(bases / base), "--output-dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"^base |^before:", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^step 1: .+; (accepted|refused).*", done.stdout, re.MULTILINE), done.stdout
    assert re.fullmatch(last_line, done.stdout.splitlines()[-1]), done.stdout
    report = read_whole(tmp_path / "out")
    assert report.method == method and len(report.steps) == 1
    load(tmp_path / "out")
