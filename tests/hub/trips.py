"""Both ends of a trip by the Hub, each in a process of its own: one trains and pushes, the other reads.

python -m tests.hub.trips push|read BASE:METHOD ...

Both leave in the working directory what each model answers, in `push.json` or `read.json` and `.safetensors`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import pipeline

from onestep_peft import OneStepTrainer
from onestep_peft.cli import main
from onestep_peft.cli.predict import shown
from onestep_peft.hub import probe, push
from onestep_peft.hub.load import load_with_report
from onestep_peft.prediction import predict
from onestep_peft.tasks import logits_for, task_of
from tests.architectures.models import CONFIGS, save_base
from tests.conftest import config_for, toy_rows, word_tokenizer
from tests.tasks.small import tiny_causal_llama
from tests.test_load import LABELS, named_rows

CHAT = "chat"
TEMPLATE = (
    "{% for m in messages %}{{ 'w0 ' if m.role == 'user' else 'w1 ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'w1 ' }}{% endif %}"
)
NEW_TOKENS = 6
texts = [row["text"] for row in toy_rows(6, 3)]


def talks(number: int, seed: int) -> list[dict[str, Any]]:
    """Conversations in which the answer is the class' first word, three times."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": " ".join([f"w{8 * row['label']}"] * 3)},
            ]
        }
        for row in toy_rows(number, seed)
    ]


def base_of(name: str, folder: Path) -> Path:
    """A base as it stands on the Hub: a backbone, or a language model that knows a chat template."""
    if CHAT not in name:
        return save_base(folder, CONFIGS[name])
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_causal_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    """For the texts, padded, in fp32."""
    # A pipeline that generates turns the side of the tokenizer that it is given.
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    wanted = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return logits_for(model.eval(), wanted).float().contiguous()


def said(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What `pipeline` and `onestep predict` say of the texts, and what belongs to the model beside its weights."""
    spoken: Any = pipeline(task_of(model).name, model=model, tokenizer=tokenizer)
    classifies = task_of(model).has_classes
    options = {"top_k": None, "function_to_apply": "none"} if classifies else {"max_new_tokens": NEW_TOKENS}
    talk = talks(1, 9)[0]["messages"]
    labels = list(model.config.id2label.values()) if classifies else []
    return {
        "pipeline": spoken(texts, **options, **({} if classifies else {"do_sample": False})),
        "labels": labels,
        "ids": tokenizer(texts)["input_ids"],
        "talk": tokenizer.apply_chat_template(talk, tokenize=False) if tokenizer.chat_template else None,
    }


def trained(base: str, method: str, name: str, seed: int = 1, labels: Sequence[str] = LABELS) -> OneStepTrainer:
    """A step on `user/BASE`, pushed to `user/NAME`."""
    rows = talks(60, seed) if CHAT in base else named_rows(60, seed, labels)
    options = {"direction": "sgd", "step_size": 0.5, "guard": False, "method": method}
    trainer = OneStepTrainer(model=f"user/{base}", args=config_for(Path(name), **options), train_dataset=rows)
    trainer.train()
    trainer.push_to_hub(repo_id=f"user/{name}")
    return trainer


def push_one(base: str, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Trains on `user/BASE` and pushes to `user/BASE-METHOD`; what the model in memory answers."""
    trainer = trained(base, method, f"{base}-{method}")
    model, tokenizer = trainer.model, trainer.processing_class
    answers = {"memory": logits(model, tokenizer)}
    records = predict(model, tokenizer, texts, max_new_tokens=NEW_TOKENS)
    width = max((len(label) for label in trainer.report.labels), default=0)
    lines = [line for text, record in zip(texts, records, strict=True) for line in shown(text, record, width)]
    found = said(model, tokenizer) | {"predict": lines, "base": trainer.report.base_revision}
    erase(model)
    return found, answers | {"erased": logits(model, tokenizer)}


@torch.no_grad()
def erase(model: Any) -> None:
    """Takes the step back where it went into an adapter; its head stays."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "prompt_encoder" in name:
            parameter.zero_()


def read_one(base: str, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `user/BASE-METHOD` answers: by `load`, by the card's snippets, by plain PEFT, by the command."""
    repo = f"user/{base}-{method}"
    model, tokenizer, report = load_with_report(repo)
    answers = {"load": logits(model, tokenizer)}
    card = Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        for way, snippet in zip(
            ("card", "card alone"), re.findall(r"```python\n(.*?)```", card, re.DOTALL), strict=True
        ):
            scope: dict[str, Any] = {}
            exec(snippet, scope)
            answers[way] = logits(scope["model"], scope["tokenizer"])
    if isinstance(model, PeftModel):
        revision = model.peft_config["default"].revision
        options = {"num_labels": len(report.labels)} if report.labels else {}
        bare = task_of(model).auto_model.from_pretrained(f"user/{base}", revision=revision, **options)
        bare.config.pad_token_id = tokenizer.pad_token_id
        answers["PeftModel"] = logits(PeftModel.from_pretrained(bare, repo), tokenizer)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["predict", repo, *texts, "--max-new-tokens", str(NEW_TOKENS)]) == 0
    return said(model, tokenizer) | {"predict": out.getvalue().splitlines(), "base": report.base_revision}, answers


def checked(folder: Path, *_: Any, **__: Any) -> float:
    """As a push checks, but in this process, whose imports are done: the reader is the fresh one."""
    found = probe.compare(folder)
    assert found["difference"] <= found["tolerance"], found
    return found["difference"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    push.check_in_fresh_process = checked
    one = {"push": push_one, "read": read_one}[sys.argv[1]]
    told: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for pair in sys.argv[2:]:
        told[pair], found = one(*pair.split(":"))
        tensors |= {f"{pair} {way}": value for way, value in found.items()}
    Path(f"{sys.argv[1]}.json").write_text(json.dumps(told))
    save_file(tensors, f"{sys.argv[1]}.safetensors")
