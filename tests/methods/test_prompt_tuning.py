"""Prompt tuning: the prompt moves as the dense natural gradient says, the model stays, and bad prompts are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, PromptTuningInit
from torch import Tensor, nn

from onestep_peft import OneStepTrainer, preparation
from tests.conftest import (
    assert_same_bits,
    bits,
    relative_difference,
    tiny_bert,
    toy_rows,
    trainer_for,
    word_tokenizer,
)

ROWS = toy_rows(30, seed=1)
DAMPING = 0.2
PROMPT = "prompt_encoder.default.embedding.weight"


def trainer_with(folder: Path, tokens: int = 3, rows: Any = ROWS, **options: Any) -> OneStepTrainer:
    torch.manual_seed(7)  # the prompt is drawn
    config = PromptTuningConfig(num_virtual_tokens=tokens, prompt_tuning_init="SAMPLE_VOCAB")
    return trainer_for(folder, rows, model=tiny_bert(), peft_config=config, **options)


def prompt_of(trainer: OneStepTrainer) -> Tensor:
    return trainer.model.state_dict()[PROMPT].clone()


def row_gradients(prompt: Tensor) -> Tensor:
    """By autograd in float64, one row at a time: ∂ℓ_i/∂prompt, `(rows, n · d)`."""
    model = tiny_bert().double().eval()
    prompt = prompt.double().requires_grad_()
    found = []
    for row in ROWS:
        tokens = word_tokenizer()(row["text"], return_tensors="pt")
        embedded = torch.cat([prompt, model.bert.embeddings.word_embeddings(tokens["input_ids"])[0]])[None]
        logits = model(inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2])).logits
        loss = nn.functional.cross_entropy(logits, torch.tensor([row["label"]]))
        found.append(torch.autograd.grad(loss, prompt)[0].flatten())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("tokens", "batch"), [(3, 30), (3, 7), (1, 4)]
)  # fewer rows than numbers of the prompt; and more
def test_the_natural_gradient_is_the_dense_one_of_all_rows(tokens: int, batch: int, tmp_path: Path) -> None:
    trainer = trainer_with(
        tmp_path, tokens, direction="natural", step_size=0.3, guard=False, fit_head=False, damping=DAMPING,
        per_device_train_batch_size=batch,
    )  # fmt: skip
    start = prompt_of(trainer)
    trainer.train()
    rows = row_gradients(start)
    fisher, size = rows.T @ rows / len(rows), rows.shape[1]
    system = fisher + DAMPING * fisher.trace() / size * torch.eye(size, dtype=torch.float64)
    expected = -0.3 * torch.linalg.solve(system, rows.mean(0)).view_as(start)
    assert relative_difference(prompt_of(trainer).double() - start.double(), expected) < 1e-4


def test_kfac_is_the_natural_gradient_with_two_factors_for_the_fisher_matrix(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, direction="kfac", step_size=0.3, guard=False, fit_head=False, damping=DAMPING)
    start = prompt_of(trainer)
    trainer.train()
    rows = row_gradients(start).view(len(ROWS), *start.shape)
    along_tokens, along_width = torch.einsum("rid,rjd->ij", rows, rows), torch.einsum("rnd,rne->de", rows, rows)
    factors = along_tokens / len(rows), along_width / along_width.trace()
    damped = [one + DAMPING * one.trace() / len(one) * torch.eye(len(one)) for one in factors]
    expected = -0.3 * torch.linalg.solve(torch.kron(*damped), rows.mean(0).flatten()).view_as(start)
    assert relative_difference(prompt_of(trainer).double() - start.double(), expected) < 1e-4


def test_the_plain_step_is_the_gradient_at_the_prompt(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, direction="sgd", step_size=0.3, per_device_train_batch_size=7)
    start = prompt_of(trainer)
    trainer.train()
    expected = -0.3 * row_gradients(start).mean(0).view_as(start)
    assert relative_difference(prompt_of(trainer).double() - start.double(), expected) < 1e-4


def test_the_base_is_never_touched(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, rows=toy_rows(200, 1), fit_head=False)
    base = bits(trainer.model.get_base_model())
    trainer.train()
    assert_same_bits(trainer.model.get_base_model(), base, only=lambda name: "modules_to_save" not in name)


def test_a_refused_step_leaves_the_prompts_bits(tmp_path: Path) -> None:
    # Labels by chance: nothing can be learnt.
    rows = [{**row, "label": i % 2} for i, row in enumerate(toy_rows(120, 1))]
    trainer = trainer_with(tmp_path, rows=rows, direction="natural", step_size=1e4)
    start = prompt_of(trainer)
    trainer.train()
    assert not trainer.report.steps[0]["accepted"]
    assert torch.equal(prompt_of(trainer), start)


def test_the_prompt_starts_from_a_text(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    config = PromptTuningConfig(
        num_virtual_tokens=3, prompt_tuning_init=PromptTuningInit.TEXT, prompt_tuning_init_text="w1 w2 w3",
        tokenizer_name_or_path=str(base),
    )  # fmt: skip
    trainer = OneStepTrainer(
        model=str(base), args=trainer_for(tmp_path / "args", ROWS).args, train_dataset=ROWS, peft_config=config
    )
    words = tiny_bert().get_input_embeddings().weight
    ids = word_tokenizer()("w1 w2 w3", add_special_tokens=False)["input_ids"]
    found = prompt_of(trainer)
    assert all(any(torch.equal(row, words[i]) for i in [*ids, 2, 3]) for row in found)


def test_without_a_configuration_twenty_tokens_come_from_the_vocabulary(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, ROWS, method="prompt_tuning")
    found, words = prompt_of(trainer), tiny_bert().get_input_embeddings().weight
    assert len(found) == 20
    assert all(any(torch.equal(row, word) for word in words) for row in found)


def test_a_drawn_prompt_begins_with_the_token_that_rows_begin_with(tmp_path: Path) -> None:
    words, first = tiny_bert().get_input_embeddings().weight, word_tokenizer().cls_token_id
    assert word_tokenizer()("w1")["input_ids"][0] == first
    assert torch.equal(prompt_of(trainer_with(tmp_path / "drawn"))[0], words[first])
    config = PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="RANDOM")
    found = prompt_of(trainer_for(tmp_path / "random", ROWS, model=tiny_bert(), peft_config=config))
    assert not any(torch.equal(found[0], word) for word in words)  # what was asked for by name stays as it is


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PromptTuningConfig(num_virtual_tokens=64),
            "=64` leaves rows no room among .* 64 positions.*at most 62",
        ),
        (PromptTuningConfig(num_virtual_tokens=0), "must be at least 1"),
        (PromptTuningConfig(num_virtual_tokens=4, inference_mode=True), "freezes the prompt"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused(config: PromptTuningConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, toy_rows(60, 1), peft_config=config)


def test_a_direction_for_layers_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'lora_one'. does not go with the method prompt_tuning.*natural"):
        trainer_for(tmp_path, toy_rows(60, 1), method="prompt_tuning", direction="lora_one")


def test_a_refused_model_is_left_as_it_came(tmp_path: Path) -> None:
    from tests.conftest import tiny_llama

    model = tiny_llama()
    before = bits(model)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification cannot be tuned by prompts"):
        trainer_for(tmp_path, ROWS, model=model, method="prompt_tuning")
    assert_same_bits(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_step_starts_where_the_first_ended(tmp_path: Path) -> None:
    rows = [row for row in toy_rows(300, 1) if row["label"] == 0] + toy_rows(40, 2)
    trainer = trainer_with(tmp_path, rows=rows, fit_head=False, max_steps=2)
    trainer.train()
    steps = trainer.report.steps
    assert steps[0]["accepted"]
    assert len(steps) == 2
    assert steps[1]["loss_before"] == pytest.approx(steps[0]["loss_after"], rel=1e-4)


def test_the_first_token_is_one_that_rows_begin_with() -> None:
    rows = [
        {"input_ids": [0, 2, 7], "attention_mask": [0, 1, 1]},
        {"input_ids": [2, 9]},
    ]
    assert preparation.first_token(rows, 2) == 2
    assert preparation.first_token(rows, None) is None
    assert preparation.first_token([*rows, {"input_ids": [9, 2]}], 2) is None
