"""Each task from raw rows to a folder: the step is accepted, reported, and a fresh process gives the same logits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, AutoPeftModelForTokenClassification, LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel

from onestep_peft import OneStepTrainer, StepReport, head_trainer, load
from onestep_peft.hub import probe
from onestep_peft.hub.card import card
from onestep_peft.lengths import longest_input
from onestep_peft.prediction import predict
from onestep_peft.tasks import logits_for
from tests.conftest import SIGNAL_WORDS, WORDS, bits, config_for, tiny_bert, word_tokenizer
from tests.tasks.small import counting_texts, tagged_rows, tiny_causal_llama, tiny_gpt2, tiny_tagger
from tests.test_load import fresh_process


def topics(number: int, seed: int) -> list[dict[str, Any]]:
    """Texts about any of three topics; each has eight words of its own."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        about = [topic for topic in range(3) if draw.random() < 0.4]
        words = [f"w{draw.randrange(24, WORDS)}" for _ in range(5)]
        words += [f"w{topic * SIGNAL_WORDS + draw.randrange(SIGNAL_WORDS)}" for topic in about for _ in range(2)]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "labels": [["ant", "bee", "cow"][topic] for topic in about]})
    return rows


def scored(number: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose score is how many good words they have more than bad ones, in tens."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        numbers = [draw.randrange(48) for _ in range(8)]
        score = sum((n < 8) - (8 <= n < 16) for n in numbers)
        rows.append({"text": " ".join(f"w{n}" for n in numbers), "label": 10.0 * score + 0.5})
    return rows


@dataclass(frozen=True)
class Kind:
    """How a task is run here: its base, its rows, and what the report must say."""

    base: Callable[[], PreTrainedModel]
    rows: Callable[[int, int], list[dict[str, Any]]]
    task: str
    problem_type: str | None
    labels: list[str]
    better: str


KINDS = {
    "tags": Kind(
        lambda: tiny_tagger().bert, tagged_rows, "token-classification", None,
        ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"], "entity_f1",
    ),
    "topics": Kind(
        lambda: tiny_bert().bert, topics, "text-classification", "multi_label_classification",
        ["ant", "bee", "cow"], "f1",
    ),
    "score": Kind(lambda: tiny_bert().bert, scored, "text-classification", "regression", [], "pearson"),
    "llama": Kind(tiny_causal_llama, counting_texts, "text-generation", None, [], "perplexity"),
    "gpt2": Kind(tiny_gpt2, counting_texts, "text-generation", None, [], "perplexity"),
}  # fmt: skip
BATCH = {"tags": "tokens", "topics": "text", "score": "text", "llama": "text", "gpt2": "text"}


def eos_tokenizer(name: str) -> Any:
    tokenizer = word_tokenizer("left" if name == "llama" else "right")
    if name in ("llama", "gpt2"):
        tokenizer.eos_token = "[SEP]"
    return tokenizer


def run(folder: Path, name: str, **options: Any) -> OneStepTrainer:
    kind = KINDS[name]
    base = folder / "base"
    if not base.is_dir():
        kind.base().save_pretrained(base)
        eos_tokenizer(name).save_pretrained(base)
    peft_config = None if "method" in options else LoraConfig(r=4)
    if name == "topics":  # of a random encoder, what 200 rows say out of fold does not carry over to others
        options.setdefault("head_folds", 1)
    trainer = OneStepTrainer(
        model=base, args=config_for(folder / options.get("method", "lora"), **options),
        train_dataset=kind.rows(200, 1), search_dataset=kind.rows(60, 2), eval_dataset=kind.rows(60, 3),
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def sample(name: str) -> dict[str, torch.Tensor]:
    rows = KINDS[name].rows(5, 4)
    texts = [" ".join(row["tokens"]) if name == "tags" else row["text"] for row in rows]
    tokens = word_tokenizer()(texts, padding=True, return_tensors="pt")
    return {key: value for key, value in tokens.items() if key != "token_type_ids"}


def logits_of(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return (
            logits_for(model.eval(), sample(name))[sample(name)["attention_mask"].bool()]
            if (KINDS[name].task != "text-classification")
            else logits_for(model.eval(), sample(name))
        )


@pytest.fixture(scope="module", params=KINDS, ids=KINDS.keys())
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, OneStepTrainer, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run(folder, request.param), folder


RELOAD = """
import json, sys
from onestep_peft import load
from tests.tasks.test_run import logits_of

model, tokenizer = load({folder!r})
base = model.get_base_model() if hasattr(model, "get_base_model") else model
print(json.dumps({{
    "logits": logits_of(model, {name!r}).tolist(),
    "labels": [base.config.id2label[i] for i in range(base.config.num_labels)],
    "problem_type": getattr(base.config, "problem_type", None),
    "class": type(base).__name__,
    "side": tokenizer.padding_side,
}}))
"""


def reloaded(folder: Path, name: str) -> Any:
    return fresh_process(RELOAD.format(folder=str(folder), name=name))


def test_the_step_is_accepted_and_reported(done: tuple[str, OneStepTrainer, Path]) -> None:
    name, trainer, folder = done
    kind, report = KINDS[name], trainer.report
    assert report.steps[-1]["accepted"], report.summary()
    assert (report.task, report.problem_type, report.labels) == (kind.task, kind.problem_type, kind.labels)
    before, after = (report.metrics["head"] or report.metrics["base"]), report.metrics["after"]
    assert after["loss"] < before["loss"]
    if kind.better == "perplexity":
        assert after["perplexity"] < before["perplexity"]
    else:
        assert after[kind.better] > max(0.2, report.metrics["base"][kind.better])
        assert report.metrics["head"] is not None
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    expected = {"token-classification": "TOKEN_CLS", "text-generation": "CAUSAL_LM"}.get(kind.task, "SEQ_CLS")
    assert config["task_type"] == expected
    assert StepReport.from_json((folder / "lora" / "onestep.json").read_text()).class_recall == report.class_recall


def test_a_fresh_process_gives_the_same_logits(done: tuple[str, OneStepTrainer, Path]) -> None:
    name, trainer, folder = done
    found = reloaded(folder / "lora", name)
    difference = (torch.tensor(found["logits"]) - logits_of(trainer.model, name)).abs().max()
    assert float(difference) < 1e-5
    if KINDS[name].labels:
        assert found["labels"] == KINDS[name].labels
    if KINDS[name].problem_type:
        assert found["problem_type"] == KINDS[name].problem_type
    # Padding on the right is the trainer's own affair.
    assert found["side"] == eos_tokenizer(name).padding_side


@pytest.mark.parametrize("name", ["tags", "topics", "score", "llama", "gpt2"])
def test_whole_models_come_back_too(name: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, name, method="full", direction="sgd", step_size=0.01, guard=False)
    found = reloaded(tmp_path / "full", name)
    assert found["class"] == type(trainer.model).__name__
    assert float((torch.tensor(found["logits"]) - logits_of(trainer.model, name)).abs().max()) < 1e-5
    assert found["problem_type"] == KINDS[name].problem_type


@pytest.mark.parametrize("name", ["tags", "llama", "gpt2"])
def test_prompts_come_back_too(name: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, name, method="prompt_tuning")
    found = reloaded(tmp_path / "prompt_tuning", name)
    assert float((torch.tensor(found["logits"]) - logits_of(trainer.model, name)).abs().max()) < 1e-5
    step = trainer.report.steps[-1]
    assert step["accepted"] and step["loss_after"] < step["loss_before"], trainer.report.summary()
    # 20 of the model's 64 positions are the prompt's.
    assert longest_input(trainer.processing_class, trainer.tokenise.positions, trainer.tokenise.virtual_tokens) == 44


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reloaded_language_model_goes_on_with_a_text(name: str, method: str, tmp_path: Path) -> None:
    run(tmp_path, name, **({"method": method} if method != "lora" else {}))
    model, tokenizer = load(tmp_path / method)
    tokens = tokenizer("w3 w4 w5 w6", return_tensors="pt")
    ids, mask = tokens["input_ids"][:, :-1], tokens["attention_mask"][:, :-1]  # without the closing token
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    by_hand = ids
    with torch.no_grad():
        for _ in range(generated.shape[1] - ids.shape[1]):
            logits = model(input_ids=by_hand, attention_mask=torch.ones_like(by_hand)).logits
            by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], 1)
    assert generated.shape[1] > ids.shape[1]
    assert generated.tolist() == by_hand.tolist()


def test_predictions_are_a_tasks_own(done: tuple[str, OneStepTrainer, Path]) -> None:
    name, _, folder = done
    model, tokenizer = load(folder / "lora")
    records = list(predict(model, tokenizer, ["w1 w2 w50 w60", "w9 w70 w40"]))
    if name == "tags":
        first, second = (record["entities"] for record in records)
        assert (first[0]["entity_group"], first[0]["word"].split()[0]) == ("PER", "w1")
        assert (second[0]["entity_group"], second[0]["word"].split()[0]) == ("LOC", "w9")
        json.dumps(records)
    elif name == "topics":
        texts = [row["text"] for row in KINDS[name].rows(30, 5)]
        for text, record in zip(texts, predict(model, tokenizer, texts), strict=True):
            with torch.no_grad():
                (scores,) = model(**tokenizer(text, return_tensors="pt")).logits.sigmoid().tolist()
            there = {label: score for label, score in zip(KINDS[name].labels, scores, strict=True) if score > 0.5}
            assert dict(zip(record["labels"], record["scores"], strict=True)) == pytest.approx(there, rel=1e-4)
    elif name == "score":
        with torch.no_grad():
            expected = float(model(**tokenizer("w1 w2 w50 w60", return_tensors="pt")).logits)
        assert records[0]["value"] == pytest.approx(expected, rel=1e-4, abs=1e-3)  # of numbers in tens
        rows = KINDS[name].rows(60, 5)
        found = [record["value"] for record in predict(model, tokenizer, [row["text"] for row in rows])]
        assert np.corrcoef(found, [row["label"] for row in rows])[0, 1] > 0.6
    else:
        assert records[0]["generated_text"].startswith(" w")


def test_a_pipeline_counts_tokens_behind_a_prompt_from_the_rows_first(tmp_path: Path) -> None:
    run(tmp_path, "tags", method="prompt_tuning", direction="sgd")
    model, tokenizer = load(tmp_path / "prompt_tuning")
    tokens = tokenizer("w1 w2 w50", return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        assert model(**tokens).logits.shape[1] == tokens["input_ids"].shape[1]
        assert torch.equal(model(**tokens).logits, logits_for(model, tokens))


def test_recall_of_classes_is_reported_and_shown(done: tuple[str, OneStepTrainer, Path]) -> None:
    name, trainer, _ = done
    kind, report = KINDS[name], trainer.report
    if not kind.labels:
        assert report.class_recall == {} and report.class_counts == {}
        return
    rows = kind.rows(60, 3)
    column = "ner_tags" if name == "tags" else "labels"
    counts = {label: sum(row[column].count(label) for row in rows) for label in kind.labels}
    assert report.class_counts == counts
    assert set(report.class_recall) == {"base", "head", "after"}
    with torch.no_grad():
        found = dict.fromkeys(kind.labels, 0)
        for row in rows:
            text = " ".join(row["tokens"]) if name == "tags" else row["text"]
            tokens = word_tokenizer()(text, return_tensors="pt")
            (logits,) = trainer.model.eval()(**tokens).logits
            if name == "tags":
                for tag, scores in zip(row[column], logits[1:-1], strict=True):
                    found[tag] += kind.labels[int(scores.argmax())] == tag
            else:
                for label in row[column]:
                    found[label] += bool(logits[kind.labels.index(label)] > 0)
    assert report.class_recall["after"] == {label: pytest.approx(found[label] / counts[label]) for label in kind.labels}
    assert "recall of each class" in report.table()


def test_of_many_classes_the_worst_are_shown() -> None:
    recall = {f"c{i}": i / 100 for i in range(30)}
    report = StepReport(
        metrics={"base": {"loss": 1.0}, "head": None, "after": {"loss": 0.5}},
        class_recall={"base": recall, "after": {**recall, "c29": 0.0}}, class_counts=dict.fromkeys(recall, 7),
    )  # fmt: skip
    table = report.table()
    assert "recall of the 10 worst of 30 classes" in table
    shown = [line.split() for line in table.splitlines() if line.startswith("c")]
    assert shown[:2] == [["c0", "7", "0.0000", "0.0000"], ["c29", "7", "0.2900", "0.0000"]] and len(shown) == 10


@pytest.mark.parametrize("name", ["tags", "gpt2"])
def test_the_card_loads_it_with_the_tasks_own_class(name: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, name, direction="sgd", step_size=0.01, guard=False)
    text = card(trainer.report, "user/adapter")
    assert ModelCard(text).data.pipeline_tag == KINDS[name].task
    if name == "tags":
        assert 'AutoPeftModelForTokenClassification.from_pretrained("user/adapter", num_labels=5).eval()' in text
        assert "`B-LOC`" in text
        plain: Any = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "lora", num_labels=5)
    else:
        assert 'AutoPeftModelForCausalLM.from_pretrained("user/adapter").eval()' in text and "Classes" not in text
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert float((logits_of(plain, name) - logits_of(trainer.model, name)).abs().max()) < 1e-5


def test_a_language_models_record_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LOGITS_MAX", 6 * 100)
    run(tmp_path, "gpt2", direction="sgd", step_size=0.01, guard=False)
    logits = load_file(tmp_path / "lora" / probe.FILE)[probe.LOGITS]
    assert logits.shape == (3, 2, 100)  # rows, tokens, vocabulary
    found = probe.compare(tmp_path / "lora")
    assert found["difference"] <= found["tolerance"]


def test_models_that_are_made_anew_carry_the_tasks_names(tmp_path: Path) -> None:
    trainer = OneStepTrainer(
        model_init=lambda: tiny_bert(num_labels=3), args=config_for(tmp_path), train_dataset=topics(80, 1),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.task.problem_type == "multi_label_classification"
    config = trainer.model.get_base_model().config
    assert config.problem_type == "multi_label_classification" and config.id2label == {0: "ant", 1: "bee", 2: "cow"}


def test_a_task_that_the_model_is_not_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`task='text-generation'`, but BertForSequence.* is for text-classification"):
        OneStepTrainer(
            model=tiny_bert(), args=config_for(tmp_path), train_dataset=[{"text": "w1"}], task="text-generation",
            processing_class=word_tokenizer(),
        )  # fmt: skip


def test_rows_are_cut_at_max_length_and_a_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": tiny_gpt2(), "processing_class": eos_tokenizer("gpt2")}
    rows = [*({"text": "w1 w2 w3"} for _ in range(3)), {"text": " ".join(["w1"] * 30)}]
    trainer = OneStepTrainer(
        args=config_for(tmp_path, max_length=10, direction="sgd", step_size=0.1), train_dataset=rows, **options
    )
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 10
    assert len(trainer.pass_rows) > 4 and trainer.tokenise.numbers("train_dataset", trainer.pass_rows) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="`max_length=65`, but the model has 64 positions. Use at most 64"):
        OneStepTrainer(args=config_for(tmp_path, max_length=65), train_dataset=rows, **options)
    with pytest.raises(ValueError, match="`max_length=1` must be at least 2"):
        config_for(tmp_path, max_length=1)


def test_a_head_is_fitted_to_a_sample_of_many_tokens_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_trainer, "TOKENS_MAX", 100)
    rows = tagged_rows(80, 1)
    heads = []
    for i, some in enumerate([rows, random.Random(1).sample(rows, len(rows))]):
        trainer = OneStepTrainer(
            model=tiny_tagger(), args=config_for(tmp_path / str(i), direction="sgd", guard=False),
            train_dataset=some, search_dataset=tagged_rows(20, 2), processing_class=word_tokenizer(),
        )  # fmt: skip
        numbers = trainer._head_rows(lead=False)
        tokens = [len(some[trainer.pass_rows[i]]["tokens"]) for i in numbers]
        assert 100 <= sum(tokens) < 100 + 12
        trainer.held_out = None
        trainer.fit_head()
        heads.append(bits(trainer.model.get_base_model().classifier))
    for name, value in heads[0].items():
        assert torch.allclose(value, heads[1][name], atol=1e-4), name


def test_tokens_and_a_bases_name_are_enough_where_the_task_is_named(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    eos_tokenizer("gpt2").save_pretrained(tmp_path / "base")
    rows = Dataset.from_dict(
        {"input_ids": [word_tokenizer()(row["text"])["input_ids"] for row in counting_texts(9, 1)]}
    )
    options: dict[str, Any] = {
        "model": str(tmp_path / "base"), "train_dataset": rows,
        "args": config_for(tmp_path / "out", direction="sgd", step_size=0.1),
    }  # fmt: skip
    assert OneStepTrainer(task="text-generation", **options).task.name == "text-generation"
    with pytest.raises(ValueError, match="is a name, so its task and classes must come from rows with text"):
        OneStepTrainer(**options)
    with pytest.raises(ValueError, match="is a name, so its classes must come from rows with text"):
        OneStepTrainer(task="token-classification", **options)


def test_rows_that_no_label_column_goes_with_are_pointed_to_text_generation(tmp_path: Path) -> None:
    rows = [{"text": "w1", "id": i} for i in range(9)]
    with pytest.raises(ValueError, match='No label column.*`task="text-generation"`'):
        OneStepTrainer(model="unused", args=config_for(tmp_path), train_dataset=rows)
