"""Adapters and their bases: several on one, switched or swapped in place; and one whose base moves on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub.client import Client
from tests.hub.trips import base_of
from tests.hub_server import HubServer
from tests.tasks.small import tiny_causal_llama
from tests.test_load import LABELS

# Trains two on one base, pushes both, loads the first, and puts the second beside it, or by a hot-swap in its place.
SCRIPT = """
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter
from tests.hub.trips import logits, trained

pushing.check_in_fresh_process = lambda *args, **kwargs: 0.0
base, method, others = {base!r}, {method!r}, {others!r}
names = [f"{{base}}-{{method}}-{{len(others)}}-{{which}}" for which in ("first", "second")]
trainers = [trained(base, method, names[0]), trained(base, method, names[1], seed=7, labels=others)]
expected = [logits(one.model, one.processing_class).tolist() for one in trainers]

def switched():
    model, tokenizer = load(f"user/{{names[0]}}")
    model.load_adapter(f"user/{{names[1]}}", "second")
    found = []
    for adapter in ("default", "second", "default"):
        model.set_adapter(adapter)
        found.append(logits(model, tokenizer).tolist())
    heads = [one.modules_to_save for one in model.modules() if isinstance(one, ModulesToSaveWrapper)]
    return {{
        "logits": found,
        "labels": list(model.config.id2label.values()),
        "heads": len(heads),
        "same heads": [torch.equal(head["default"].weight, head["second"].weight) for head in heads[-1:]],
    }}

def swapped():
    model, tokenizer = load(f"user/{{names[0]}}")
    error = ""
    try:
        hotswap_adapter(model, f"user/{{names[1]}}", "default", torch_device="cpu")
    except (KeyError, ValueError) as refused:
        error = str(refused)
    return {{"logits": logits(model, tokenizer).tolist(), "error": error}}

try:
    answer = {{"expected": expected, "switched": switched(), "swapped": swapped()}}
except RuntimeError as refused:
    answer = str(refused)
"""
OTHERS = ["cat", "dog"]
# Base, method, number of modules that each adapter saves whole, what PEFT's hot-swap says.
CASES = [
    ("llama-chat", "lora", 0, ""),
    ("bert", "lora", 1, "classifier"),
    ("deberta-v2", "lora", 2, "classifier"),
    ("bert", "prompt_tuning", 1, "only supports LORA"),
]


def two(
    base: str, method: str, hub: HubServer, client: Client, space: Path, others: Sequence[str] = OTHERS
) -> dict[str, Any]:
    if hub.store.find("model", f"user/{base}") is None:
        hub.add_repo(f"user/{base}", base_of(base, space / base))
    return client.run(SCRIPT.format(base=base, method=method, others=others))


def difference(found: list[Any], expected: list[Any]) -> float:
    ours, theirs = torch.tensor(found), torch.tensor(expected)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("base", "method", "heads", "refusal"), CASES)
def test_each_adapter_has_its_own_logits_and_its_own_head(
    base: str, method: str, heads: int, refusal: str, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    said = two(base, method, hub, client, tmp_path)
    first, second = said["expected"]
    assert difference(second, first) > 1e-2
    switched = said["switched"]
    for found, expected in zip(switched["logits"], (first, second, first), strict=True):
        assert difference(found, expected) <= 1e-6
    assert switched["heads"] == heads and not any(switched["same heads"])
    # The classes' names are the model's, of which there is one: they stay the first adapter's.
    assert heads == 0 or switched["labels"] == LABELS
    # PEFT 0.21 swaps LoRA weights and no head: where there is one, it refuses and the model stays as it was.
    swapped = said["swapped"]
    assert refusal in swapped["error"] and bool(refusal) == bool(swapped["error"])
    assert difference(swapped["logits"], first if refusal else second) <= 1e-6


def test_an_adapter_with_another_number_of_classes_needs_a_model_of_its_own(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    said = two("bert", "lora", hub, client, tmp_path, others=["cat", "dog", "eel"])
    assert "size mismatch for base_model.model.classifier" in said


BY_NAME = """
from transformers import pipeline
from tests.hub.trips import base_of, logits, trained

pushing.check_in_fresh_process = lambda *args, **kwargs: 0.0
trainer = trained("chat-moving", "lora", "moving")
expected = logits(trainer.model, trainer.processing_class)

def off():
    model, tokenizer = load("user/moving")
    by_name = pipeline("text-generation", "user/moving").model
    return [float((logits(one, tokenizer) - expected).abs().max()) for one in (model, by_name)]

answer = [off()]
HfApi().upload_file(path_or_fileobj={weights!r}, path_in_repo="model.safetensors", repo_id="user/chat-moving")
answer.append(off())
"""


def test_by_its_name_alone_transformers_takes_the_base_as_it_is_today(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """So the card says; once transformers reads the adapter's `revision`, it may stop to."""
    hub.add_repo("user/chat-moving", base_of("chat-moving", tmp_path / "base"))
    tiny_causal_llama(seed=5).save_pretrained(tmp_path / "moved")
    before, after = client.run(BY_NAME.format(weights=str(tmp_path / "moved" / "model.safetensors")))
    assert max(before) <= 1e-6
    assert after[0] <= 1e-6 and after[1] > 0.1
