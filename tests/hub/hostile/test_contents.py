"""Folders that are whole by their own checksums, and tampered with: refused before a weight of the base is read."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onestep_peft import load
from onestep_peft.merging import merge
from tests.architectures.models import CONFIGS, save_base
from tests.conftest import tiny_bert
from tests.hub.conftest import resaved
from tests.hub.hostile.tampering import (
    ADAPTER,
    CONFIG,
    QUERY,
    RECORD,
    REPORT,
    Change,
    edited,
    refusal,
    report_with,
    reweighed,
)

# The report


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": 2}, "has version 2"),
        ({"labels": "ant"}, "`labels` is str"),
        ({"labels": [1, 2]}, "more than names"),
        ({"labels": None}, "`labels` is NoneType"),
        ({"files": ["a"]}, "`files` is list"),
        ({"files": {"a": 5}}, "more than checksums"),
        ({"outputs": -1}, "`outputs` is -1"),
        ({"outputs": True}, "`outputs` is bool"),
        ({"base_model": {"a": 1}}, "`base_model` is dict"),
        ({"base_revision": 5}, "`base_revision` is int"),
        ({"method": "ia3"}, "the method 'ia3'"),
        ({"task": "robotics"}, "`task='robotics'`"),
        ({"problem_type": "guessing"}, "`problem_type='guessing'`"),
    ],
)
def test_a_report_of_other_kinds_is_refused(fields: dict[str, Any], said: str, hostile: Callable[..., Path]) -> None:
    assert said in refusal(report_with(hostile(), **fields))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe{}", "no text in UTF-8"),
        (b"[" * 100_000, "not a report"),
        (b'{"version": 1, "base_model": "' + b"x" * (17 << 20) + b'"}', "17,825,824 bytes"),
        (b"5", "not a report"),
    ],
    ids=["no text", "deep", "large", "a number"],
)
def test_a_report_that_is_no_report_is_refused(content: bytes, said: str, hostile: Callable[..., Path]) -> None:
    folder = hostile()
    (folder / REPORT).write_bytes(content)
    assert said in refusal(folder)


@pytest.mark.parametrize("fields", [{"labels": [f"class {i}" for i in range(200_000)]}, {"labels": [], "outputs": 3}])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_more_classes_than_the_weights_have_are_refused(
    fields: dict[str, Any], method: str, hostile: Callable[..., Path]
) -> None:
    said = refusal(hostile(method=method, **fields))
    assert "classifier.weight" in said and "2 × 32" in said


# The adapter's configuration


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_type": "IA3"}, "`peft_type='IA3'`, but onestep.json stands for 'LORA'"),
        ({"peft_type": None}, "stands for 'LORA'"),
        ({"task_type": "CAUSAL_LM"}, "stands for 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "will not do"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config={'a': 1}"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["a"]}, "target_parameters"),
        ({"lora_alpha": float("inf")}, "`lora_alpha=inf`"),
        ({"lora_alpha": float("nan")}, "`lora_alpha=nan`"),
        ({"alpha_pattern": {"query": float("inf")}}, "alpha_pattern['query']"),
        ({"lora_alpha": "8"}, "will not do"),
        ({"r": 1 << 40}, "'base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight'"),
        ({"r": "8"}, "does not fit"),
        ({"r": -1}, "does not fit"),
        ({"rank_pattern": {"query": 1 << 40}}, "lora_A.weight"),
        ({"target_modules": ["query"]}, "has no place for"),
        ({"target_modules": ["query", "key", "value"]}, "lacks"),
        ({"target_modules": "(query"}, "does not fit"),
        ({"target_modules": ["nothing"]}, "does not fit"),
        ({"target_modules": 5}, "does not fit"),
        ({"modules_to_save": ["classifier", "pooler"]}, "lacks"),
        ({"base_model_name_or_path": "somebody/else"}, "names the base 'somebody/else'"),
        ({"revision": "0" * 40}, "names the base"),
        ({"from_the_future": {"a": 1}}, "from_the_future"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_adapters_configuration_that_says_more_or_else_is_refused(
    options: dict[str, Any], said: str, hostile: Callable[..., Path]
) -> None:
    assert said in refusal(hostile(edited(CONFIG, **options)))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_virtual_tokens": 1 << 40}, "'prompt_embeddings'"),
        ({"token_dim": 64}, "virtual tokens have 64 numbers each, and the base's 32"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"peft_type": "PREFIX_TUNING"}, "stands for 'PROMPT_TUNING'"),
    ],
)
def test_a_prompts_configuration_is_looked_at_too(
    options: dict[str, Any], said: str, hostile: Callable[..., Path]
) -> None:
    assert said in refusal(hostile(edited(CONFIG, **options), "prompt_tuning"))


def test_a_prompt_reads_no_tokenizer_that_it_names(folders: Path, tmp_path: Path) -> None:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "somebody/else"}
    folder = resaved(folders / "prompt_tuning", tmp_path / "named", edited(CONFIG, **text))
    load(folder, base_model=str(folders / "base"))


def test_a_configuration_that_is_no_object_is_refused(hostile: Callable[..., Path]) -> None:
    for content, said in (("[]", "holds a list"), ("{", "is no JSON"), ("[" * 100_000, "is no JSON")):
        folder = hostile(lambda copy, content=content: (copy / CONFIG).write_text(content) and None)
        assert said in refusal(folder)
        shutil.rmtree(folder)


# Weights


def spoil(tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors[QUERY][1, 2] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, hostile: Callable[..., Path]) -> None:
    assert f"NaN or infinity in {QUERY!r}" in refusal(hostile(reweighed(lambda found: spoil(found, value))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.update({QUERY: torch.zeros(4, 33)}), "is 4 × 33, and its place is 4 × 32"),
        (lambda found: found.update({QUERY: torch.zeros(4096, 4096)}), "is 4096 × 4096, and its place is 4 × 32"),
        (lambda found: found.update({QUERY: torch.zeros(())}), "is a number, and its place is 4 × 32"),
        (lambda found: found.pop(QUERY), f"{ADAPTER} lacks {QUERY!r}"),
        (
            lambda found: found.update({"base_model.model.other": torch.zeros(2)}),
            "no place for 'base_model.model.other'",
        ),
        (dict.clear, "lacks"),
    ],
    ids=["shape", "large", "scalar", "missing", "more", "none"],
)
def test_weights_that_do_not_fit_the_base_are_refused(
    change: Callable[..., Any], said: str, hostile: Callable[..., Path]
) -> None:
    assert said in refusal(hostile(reweighed(change)))


def announcing(header: dict[str, Any] | bytes, length: int | None = None) -> Change:
    """A file of weights that announces what it does not hold."""

    def change(folder: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / ADAPTER).write_bytes((length or len(text)).to_bytes(8, "little") + text)

    return change


HUGE = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 4 << 40]}


@pytest.mark.parametrize(
    "change",
    [
        announcing({QUERY: HUGE}),
        announcing({QUERY: {**HUGE, "data_offsets": [0, 16]}}),
        announcing({QUERY: {**HUGE, "dtype": "F31"}}),
        announcing(b"{}", 1 << 60),
        announcing(b"not json"),
        lambda folder: (folder / ADAPTER).write_bytes(b""),
        lambda folder: (folder / ADAPTER).write_bytes(pickle.dumps({"weight": 1})),
    ],
    ids=["terabytes", "offsets", "dtype", "header", "no json", "empty", "a pickle"],
)
def test_a_file_that_announces_what_it_does_not_hold_is_refused(change: Change, hostile: Callable[..., Path]) -> None:
    assert "no whole file of safetensors" in refusal(hostile(change))


def whole(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return reweighed(change, "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited("config.json", hidden_size=1 << 30), "describes a BertForSequenceClassification whose"),
        (edited("config.json", num_hidden_layers=200), "numbers, and the weights are"),
        (edited("config.json", hidden_size="32"), "no model that can be loaded"),
        (edited("config.json", model_type="nothing"), "no model that can be loaded"),
        (edited("config.json", model_type="distilbert"), "The weights lack|numbers, and the weights are|describes a"),
        (whole(lambda found: found.pop("classifier.weight")), "numbers, and the weights are"),
        (
            whole(lambda found: found.update({"other": found.pop("classifier.weight")})),
            "The weights lack 'classifier.weight'",
        ),
        (whole(lambda found: found["classifier.bias"].fill_(float("nan"))), "NaN or infinity in 'classifier.bias'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "numbers, and the weights are 0"),
    ],
    ids=["wide", "deep", "text", "unknown", "another", "fewer", "renamed", "nan", "none"],
)
def test_a_whole_model_that_is_not_what_it_says_is_refused(
    change: Change, said: str, hostile: Callable[..., Path]
) -> None:
    found = refusal(hostile(change, "full"))
    assert any(part in found for part in said.split("|")), found


def test_a_record_that_is_none_is_refused_in_words(hostile: Callable[..., Path], folders: Path, tmp_path: Path) -> None:
    def other_words(tensors: dict[str, torch.Tensor]) -> None:
        tensors["input_ids"][0, 0] = 1 << 40

    def other_names(tensors: dict[str, torch.Tensor]) -> None:
        tensors["words"] = tensors.pop("input_ids")

    for change, said in (
        (reweighed(other_words, RECORD, made_on="cpu float32"), "no words of this model"),
        (reweighed(other_names, RECORD, made_on="cpu float32"), "holds no inputs"),
        (reweighed(lambda tensors: None, RECORD), "no record"),
        (lambda copy: (copy / RECORD).write_bytes(b""), "no record"),
    ):
        folder = hostile(change)
        with pytest.raises(ValueError, match=said):
            merge(folder, tmp_path / "merged", base_model=str(folders / "base"))
        shutil.rmtree(folder)


# The base


def test_a_base_of_another_kind_or_size_is_refused_by_name(hostile: Callable[..., Path], tmp_path: Path) -> None:
    other = save_base(tmp_path / "llama", CONFIGS["llama"])
    for base in (other, tmp_path / "larger"):
        if base != other:
            shutil.copytree(tmp_path / "base", base)
            edited("config.json", hidden_size=64)(base)
        for weights in base.glob("*.safetensors"):
            weights.unlink()
        said = refusal(hostile(), base_model=str(base))
        assert "does not fit the base, a " in said and "base_model=" in said
        shutil.rmtree(tmp_path / "hostile")


def test_a_base_whose_head_has_other_classes_is_refused_in_words(folders: Path, tmp_path: Path) -> None:
    tiny_bert(num_labels=3).save_pretrained(tmp_path / "three")
    assert "another number of classes" in refusal(folders / "lora", base_model=str(tmp_path / "three"))


def test_a_base_that_is_an_adapter_is_refused(hostile: Callable[..., Path], folders: Path) -> None:
    folder = hostile()
    shutil.copy(folders / "lora" / CONFIG, folder.parent / "base" / CONFIG)
    assert "is an adapter itself" in refusal(folder)


def test_a_folder_that_is_named_like_the_base_is_not_taken_for_it(
    hostile: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = {"base_model": "user/base", "base_revision": "0" * 40}
    known = edited(CONFIG, base_model_name_or_path="user/base", revision="0" * 40)
    folder = hostile(known, **pinned)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "user" / "base")
    assert "a folder of that name would be taken for it" in refusal(folder)
