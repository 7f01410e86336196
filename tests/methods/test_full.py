"""Full weights: what moves, in which view of it, and by what; against autograd and dense formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForSequenceClassification,
)

from onestep_peft import OneStepTrainer
from onestep_peft.methods import full
from tests.architectures.models import CONFIGS
from tests.conftest import (
    PAD,
    SEP,
    VOCABULARY,
    assert_same_bits,
    bits,
    relative_difference,
    tiny_bert,
    tokenised,
    toy_rows,
    trainer_for,
    unmoved,
    word_tokenizer,
)
from tests.tasks.small import counting_texts, tiny_causal_llama, tiny_gpt2

ROWS = toy_rows(60, seed=1)
DAMPING = 0.1
FIXED: dict[str, Any] = {"method": "full", "step_size": 0.05, "guard": False, "fit_head": False, "damping": DAMPING}


def by_name(model: PreTrainedModel) -> dict[str, Any]:
    return {layer.name: layer for layer in full.layers(model)}


def rows_and_gradients(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tokens of all rows, and autograd's gradient of their mean loss, on one big batch in float64."""
    tokens = word_tokenizer()([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in ROWS])
    model = model.double().eval()
    loss = nn.functional.cross_entropy(model(**tokens).logits, labels)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return dict(tokens), {name: g for name, g in zip(names, found, strict=True) if g is not None}


def change(trainer: OneStepTrainer) -> dict[str, Tensor]:
    """What a run does to each parameter, in float64."""
    before = {name: parameter.detach().double().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name: parameter.detach().double() - before[name] for name, parameter in trainer.model.named_parameters()}


# What moves


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_moves_once_but_positions_types_and_what_no_rule_knows(name: str) -> None:
    model = AutoModelForSequenceClassification.from_config(CONFIGS[name])
    layers = full.layers(model)
    moved = [layer.parameter() for layer in layers]
    assert len({id(parameter) for parameter in moved}) == len(moved)
    for layer in layers:
        assert layer.as_matrix(layer.parameter()).shape == layer.shape
    stays = ("position_embeddings", "token_type_embeddings", "relative_attention_bias", "rel_embeddings", "wpe")
    assert all(any(part in path for part in stays) for path in unmoved(model, layers))


def test_a_tied_output_layer_is_moved_as_an_output_layer() -> None:
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    layers = by_name(model)
    assert "transformer.wte.weight" not in layers
    head = layers["lm_head.weight"]
    assert (head.part, head.input_factor, head.output_factor) == ("embeddings", "dense", "trace")


def test_an_output_layer_of_its_own_and_the_embedding_both_move() -> None:
    layers = by_name(tiny_causal_llama())
    assert layers["lm_head.weight"].part == layers["model.embed_tokens.weight"].part == "embeddings"
    assert layers["model.embed_tokens.weight"].input_factor == "diagonal"
    assert layers["model.norm.weight"].part == "vectors"


def test_one_table_behind_several_modules_is_observed_in_all_of_them() -> None:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, pad_token_id=PAD,
        eos_token_id=SEP, decoder_start_token_id=PAD,
    )  # fmt: skip
    model = T5ForSequenceClassification(config)
    (table,) = [layer for layer in full.layers(model) if layer.input_factor == "diagonal"]
    users = {id(module) for module in model.modules() if getattr(module, "weight", None) is table.parameter()}
    assert {id(table.module), *map(id, table.shared_with)} == users
    assert len(users) > 1


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1" in name)
    before = bits(model)
    trainer = trainer_for(tmp_path, ROWS, model=model, direction="kfac", **FIXED)
    trainer.train()
    assert_same_bits(model, before, only=lambda name: "layer.1" not in name)
    assert not torch.equal(model.state_dict()["bert.encoder.layer.1.output.dense.weight"],
                           before["bert.encoder.layer.1.output.dense.weight"])  # fmt: skip


def test_a_model_that_is_all_frozen_is_refused(tmp_path: Path) -> None:
    model = tiny_bert().requires_grad_(False)
    with pytest.raises(ValueError, match="Every parameter of the model is frozen.*requires_grad_"):
        trainer_for(tmp_path, ROWS, model=model, method="full")


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    class Linear8bitLt(nn.Linear):  # bitsandbytes' class, known by its name
        pass

    model = tiny_bert()
    model.bert.encoder.layer[0].output.dense = Linear8bitLt(64, 32)
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense are quantised.*method=\"lora\""):
        trainer_for(tmp_path, ROWS, model=model, method="full")


# By what


def test_the_plain_step_is_torchs_sgd_on_one_big_batch(tmp_path: Path) -> None:
    found = change(
        trainer_for(tmp_path, ROWS, direction="sgd", step_size=0.5, method="full", per_device_train_batch_size=7)
    )
    model = tiny_bert()
    _, gradients = rows_and_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    optimizer.step()
    assert len(gradients) > 30
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.detach() - before[name], atol=1e-6), name


def test_a_bias_and_a_gain_move_by_their_diagonal_fisher(tmp_path: Path) -> None:
    name = "bert.encoder.layer.1.output"
    deltas: dict[str, Tensor] = {}
    model = tiny_bert().double().eval()
    # In float64: δ at the outputs of a linear layer and of its normalisation, for every token of every row.
    modules = {own: model.get_submodule(f"{name}.{own.partition('.')[0]}") for own in ("dense.bias", "LayerNorm.bias")}
    for own, module in modules.items():
        module.register_full_backward_hook(lambda _m, _i, out, own=own: deltas.update({own: out[0].detach()}))
    tokens = word_tokenizer()([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in ROWS])
    nn.functional.cross_entropy(model(**tokens).logits, labels, reduction="sum").backward()
    found = change(trainer_for(tmp_path, ROWS, direction="kfac", **FIXED, per_device_train_batch_size=7))
    for own in modules:
        fisher = deltas[own].square().sum((0, 1)) / len(ROWS)
        gradient = model.get_parameter(f"{name}.{own}").grad / len(ROWS)
        # The input of both is 1, whose damped covariance is 1 + λ.
        expected = -0.05 * gradient / (fisher + DAMPING * fisher.mean()) / (1 + DAMPING)
        assert relative_difference(found[f"{name}.{own}"], expected) < 1e-4, own


def test_an_embedding_moves_by_counts_and_a_dense_factor(tmp_path: Path) -> None:
    model = tiny_bert()
    tokens, gradients = rows_and_gradients(tiny_bert())
    table = "bert.embeddings.word_embeddings"
    deltas: list[Tensor] = []
    oracle = model.double().eval()
    oracle.get_submodule(table).register_full_backward_hook(lambda _m, _i, out: deltas.append(out[0].detach()))
    labels = torch.tensor([row["label"] for row in ROWS])
    nn.functional.cross_entropy(oracle(**tokens).logits, labels, reduction="sum").backward()
    delta = deltas[0].flatten(0, 1)
    live = tokens["attention_mask"].flatten().bool()
    counts = torch.bincount(tokens["input_ids"].flatten()[live], minlength=VOCABULARY).double() / live.sum()
    cov = delta.T @ delta / len(ROWS)
    cov += DAMPING * cov.trace() / len(cov) * torch.eye(len(cov), dtype=torch.float64)
    counts += DAMPING * counts.mean()
    expected = -0.05 * torch.linalg.solve(cov, (gradients[f"{table}.weight"] / counts[:, None]).T).T
    found = change(trainer_for(tmp_path, ROWS, direction="kfac", **FIXED))
    assert relative_difference(found[f"{table}.weight"], expected) < 1e-3


def test_conv1d_takes_the_update_of_the_same_linear_layer(tmp_path: Path) -> None:
    # Transposed back, GPT-2's first projection moves as K-FAC's dense formula says.
    rows = counting_texts(40, 1)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[SEP]"
    name = "transformer.h.0.mlp.c_fc"
    trainer = trainer_for(
        tmp_path, rows, model=tiny_gpt2(), processing_class=tokenizer, direction="kfac", **{**FIXED, "fit_head": "auto"}
    )
    seen: list[tuple[Tensor, Tensor]] = []
    oracle = tiny_gpt2().double().eval()

    def watch(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda g, x=args[0]: seen.append((x.detach(), g.detach())))

    oracle.get_submodule(name).register_forward_hook(watch)
    total, items = torch.zeros((), dtype=torch.float64), 0.0
    for row in trainer.train_dataset:  # one row at a time: no padding
        ids = torch.tensor([row["input_ids"]])
        logits = oracle(input_ids=ids).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        items += ids.shape[1] - 1
    total.backward()
    x = torch.cat([a[0] for a, _ in seen])
    delta = torch.cat([d[0] for _, d in seen])
    live = delta.abs().amax(1) > 0
    x, delta = x[live], delta[live]
    a, s = x.T @ x / len(x), delta.T @ delta / items
    a, s = (m + DAMPING * m.trace() / len(m) * torch.eye(len(m), dtype=torch.float64) for m in (a, s))
    gradient = oracle.get_parameter(f"{name}.weight").grad / items  # (d_in, d_out)
    expected = -0.05 * torch.linalg.solve(a, torch.linalg.solve(s, gradient.T).T)
    assert relative_difference(change(trainer)[f"{name}.weight"], expected) < 1e-3


@pytest.mark.parametrize(("direction", "step_size"), [("kfac", 1e-3), ("muon", 1e-3), ("sgd", 1.0), ("sign", 1e-3)])
def test_bf16_weights_move_by_an_update_that_is_summed_and_applied_in_fp32(
    direction: str, step_size: float, tmp_path: Path
) -> None:
    options = {**FIXED, "step_size": step_size, "direction": direction}
    narrow = change(trainer_for(tmp_path / "narrow", ROWS, model=tiny_bert().to(torch.bfloat16), **options))
    wide = tiny_bert().to(torch.bfloat16).float()  # the same numbers
    wide_change = change(trainer_for(tmp_path / "wide", ROWS, model=wide, **options, bf16=True))
    assert all(parameter.dtype == torch.float32 for parameter in wide.parameters())
    ours = torch.cat([narrow[name].flatten() for name in narrow])
    theirs = torch.cat([wide_change[name].flatten() for name in narrow])
    # Rounded once, to half a unit of the last of eight bits; and forwards in bf16 are not alike.
    assert float(nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.8


def test_two_steps_each_lower_the_held_out_loss(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, toy_rows(300, 1), method="full", max_steps=2, search_dataset=toy_rows(100, 2))
    trainer.train()
    steps = trainer.report.steps
    assert len(steps) == 2
    assert steps[1]["loss_before"] == pytest.approx(steps[0]["loss_after"], rel=1e-4)
    assert all(step["loss_after"] < step["loss_before"] for step in steps if step["accepted"])


def test_parts_take_step_sizes_of_their_own_where_held_out_rows_gain(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, toy_rows(300, 1), method="full", search_dataset=toy_rows(100, 2))
    trainer.train()
    (step,) = trainer.report.steps
    assert [part["part"] for part in step["parts"]] == ["vectors", "embeddings"]
    best = min(loss for one in step["candidates"] for _, loss in one["points"])
    for part in step["parts"]:
        assert part["points"][0] == [0.0, pytest.approx(best, rel=1e-6)]  # each begins where the others stand
        best = min(loss for _, loss in part["points"])
    assert step["head_refitted"] or step["loss_after"] == pytest.approx(best)


def test_an_adapter_with_full_weights_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    with pytest.raises(ValueError, match="LoraConfig"):
        trainer_for(tmp_path, ROWS, method="full", peft_config=LoraConfig(r=4))


def test_tokenised_rows_serve_as_well(tmp_path: Path) -> None:
    raw = change(trainer_for(tmp_path / "raw", ROWS, direction="kfac", **FIXED))
    ready = change(trainer_for(tmp_path / "ready", tokenised(ROWS), direction="kfac", **FIXED))
    assert all(torch.equal(raw[name], ready[name]) for name in raw)
