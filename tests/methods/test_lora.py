"""LoRA: what is written is what was asked for, and the base is never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from onestep_peft import OneStepTrainer
from onestep_peft.head import fresh_modules
from onestep_peft.methods import lora
from onestep_peft.step.candidates import Candidate, ProductRay
from onestep_peft.step.layers import LowRank
from onestep_peft.step.statistics import observed
from tests.architectures.models import CONFIGS as ARCHITECTURES
from tests.conftest import (
    SEP,
    SMALL,
    assert_same_bits,
    bits,
    relative_difference,
    tiny_bert,
    toy_rows,
    trainer_for,
    updates,
    word_tokenizer,
)

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"query": 3, "layer.1.output.dense": -2}},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"query": 2, "intermediate.dense": 9}},
    "rank above the layer's": {"r": 48, "lora_alpha": 8},
}


def wrapped(**options: Any) -> PeftModel:
    return lora.wrap(tiny_bert(), LoraConfig(**options), ["classifier"], None, "SEQ_CLS")


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_scaling_b_a_is_the_direction_times_the_step_size(options: dict[str, Any]) -> None:
    model = wrapped(**options)
    layers = lora.layers(model)
    assert len(layers) == 13
    draw = torch.Generator().manual_seed(0)
    directions = {}
    for layer in layers:
        (d_out, d_in), rank = layer.shape, min(layer.rank, 3)
        directions[layer.name] = LowRank(
            torch.randn(d_out, rank, generator=draw), torch.randn(rank, d_in, generator=draw)
        )
    candidate = Candidate("kfac", {"weights": [ProductRay(layer, directions[layer.name]) for layer in layers]})
    for step_size in (0.3, 1e-6, 0.07):  # a search writes many times
        assert candidate.apply(step_size) < 1e-9
        for name, update in updates(model).items():
            assert relative_difference(update, -step_size * directions[name].dense().double()) < 1e-6
    candidate.apply(0.0)
    assert all(float(update.abs().max()) == 0 for update in updates(model).values())


def test_a_smaller_update_leaves_nothing_of_a_larger_one_before_it() -> None:
    model = wrapped(r=4, lora_alpha=8)
    layer = lora.layers(model)[0]
    draw = torch.Generator().manual_seed(0)
    larger = LowRank(torch.randn(32, 4, generator=draw), torch.randn(4, 32, generator=draw))
    smaller = LowRank(torch.randn(32, 2, generator=draw), torch.randn(2, 32, generator=draw))
    layer.write(larger)
    layer.write(smaller)
    assert relative_difference(updates(model)[layer.name], smaller.dense()) < 1e-6


def test_ranks_follow_the_pattern() -> None:
    ranks = {
        layer.name.removeprefix("base_model.model."): layer.rank
        for layer in lora.layers(wrapped(**CONFIGS["rank_pattern"]))
    }
    assert ranks["bert.encoder.layer.0.attention.self.query"] == 2
    assert ranks["bert.encoder.layer.1.intermediate.dense"] == 9
    assert ranks["bert.encoder.layer.1.attention.self.key"] == 4


def test_what_is_written_is_what_the_model_computes() -> None:
    # The layer's output with the adapter, against the base's weight with the update added to it.
    model = wrapped(r=4, lora_alpha=8, use_rslora=True).eval()
    layer = next(layer for layer in lora.layers(model) if layer.name.endswith("query"))
    draw = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(32, 3, generator=draw), torch.randn(3, 32, generator=draw))
    layer.write(update)
    x = torch.randn(5, 32, generator=draw)
    weight, bias = layer.module.base_layer.weight, layer.module.base_layer.bias
    assert torch.allclose(layer.module(x), x @ (weight + update.dense()).T + bias, atol=1e-4)


def test_conv1d_layers_take_an_update_as_w_not_transposed() -> None:
    torch.manual_seed(0)
    base = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, num_labels=2)
    )
    model = lora.wrap(base, LoraConfig(r=3, lora_alpha=6), ["score"], None, "SEQ_CLS").eval()
    (layer,) = [layer for layer in lora.layers(model) if layer.name.endswith("c_fc")]
    assert layer.shape == (128, 32)
    draw = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(128, 3, generator=draw), torch.randn(3, 32, generator=draw))
    x = torch.randn(5, 32, generator=draw)
    before = layer.module(x)
    layer.write(update)
    assert torch.allclose(layer.module(x) - before, x @ update.dense().T, atol=1e-4)


def test_an_update_beyond_the_adapters_rank_is_cut_to_the_nearest() -> None:
    model = wrapped(r=2, lora_alpha=8)
    layer = lora.layers(model)[0]
    draw = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(32, 5, generator=draw), torch.randn(5, 32, generator=draw))
    lost = layer.write(update)
    u, sigma, vt = torch.linalg.svd(update.dense().double())
    assert relative_difference(updates(model)[layer.name], u[:, :2] * sigma[:2] @ vt[:2]) < 1e-6
    assert lost == pytest.approx(float(sigma[2:].square().sum() / sigma.square().sum()), rel=1e-5)


def test_read_gives_back_what_was_written_and_nothing_at_first() -> None:
    model = wrapped(r=4, lora_alpha=8)
    layer = lora.layers(model)[0]
    assert layer.read() is None
    draw = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(32, 2, generator=draw), torch.randn(2, 32, generator=draw))
    layer.write(update)
    found = layer.read()
    assert found is not None
    layer.write(update.scaled(5.0))  # what was read is a copy, not a view
    assert relative_difference(found.dense(), update.dense()) < 1e-6


@pytest.mark.parametrize("options", list(CONFIGS.values())[:3], ids=list(CONFIGS)[:3])
@pytest.mark.parametrize("direction", ["kfac_muon", "sgd"])
def test_a_whole_run_leaves_the_base_its_bytes(options: dict[str, Any], direction: str, tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path / "out",
        toy_rows(100, 1),
        direction=direction,
        step_size=0.01,
        guard=False,
        peft_config=LoraConfig(**options),
    )
    before = bits(trainer.model)
    trainer.train()
    assert trainer.report.steps[0]["accepted"]
    moved = [
        name for name in before if "lora_" in name and not torch.equal(before[name], trainer.model.state_dict()[name])
    ]
    assert moved
    assert_same_bits(trainer.model, before, lambda name: "lora_" not in name and "modules_to_save" not in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"`use_dora=True`.*Leave `use_dora` out"),
        ({"lora_bias": True}, r"`lora_bias=True`.*Leave `lora_bias` out"),
        ({"init_lora_weights": "pissa"}, r"`init_lora_weights='pissa'` changes the base weights.*Leave it out"),
        ({"init_lora_weights": "pissa_niter_4"}, r"`init_lora_weights='pissa_niter_4'`.*Leave it out"),
        ({"init_lora_weights": "olora"}, r"`init_lora_weights='olora'`.*Leave it out"),
        ({"init_lora_weights": "eva"}, r"`init_lora_weights='eva'`.*Leave it out"),
        ({"bias": "all"}, r"`bias='all'`.*Use bias=\"none\""),
        ({"bias": "lora_only"}, r"`bias='lora_only'`.*Use bias=\"none\""),
        ({"lora_alpha": 0}, r"`lora_alpha=0`.*by zero.*Try 8"),
        ({"alpha_pattern": {"query": 0}}, r"`alpha_pattern\['query'\]=0`.*Try 8"),
        ({"target_modules": ["qeury"]}, r"`target_modules=.*'qeury'.*match no layer of Bert.*'query'.*Leave"),
        ({"target_modules": r".*\.nothing"}, r"`target_modules='.*nothing'` match no layer.*Leave"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_one_step_cannot_write_is_refused_at_once(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, toy_rows(40, 1), peft_config=LoraConfig(**{"r": 8, **options}))


def test_an_embedding_as_a_target_is_refused_before_any_parameter_moves(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["word_embeddings", "query"])
    with pytest.raises(ValueError, match=r"word_embeddings, a Embedding.*linear layers only.*`target_modules`"):
        trainer_for(tmp_path, toy_rows(40, 1), peft_config=config, search_fraction=0.3).train()


def test_another_adapter_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PrefixTuningConfig.*LoraConfig or a PromptTuningConfig"):
        trainer_for(tmp_path, toy_rows(40, 1), peft_config=PrefixTuningConfig(num_virtual_tokens=4))


def test_a_peft_model_and_a_peft_config_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has an adapter already.*Leave it out"):
        trainer_for(tmp_path, toy_rows(40, 1), model=wrapped(r=4), peft_config=LoraConfig(r=4))


def test_the_users_config_is_not_changed(tmp_path: Path) -> None:
    config = LoraConfig(r=4)
    before = config.to_dict()
    trainer_for(tmp_path, toy_rows(40, 1), peft_config=config)
    assert config.to_dict() == before


def test_the_default_targets_are_every_linear_layer_but_the_head() -> None:
    model = tiny_bert()
    names = lora.linear_names(model, ["classifier"])
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert set(linears) - set(names) == {"classifier"}
    assert len(names) == 13


def test_a_step_on_a_trained_adapter_adds_to_it(tmp_path: Path) -> None:
    # Rank 8 holds both the old update (rank 2) and the new one (rank 4): the difference is the step alone.
    rows = toy_rows(200, 1)
    found = []
    for old in (0.0, 1e-4):
        model = wrapped(r=8, lora_alpha=8)
        draw = torch.Generator().manual_seed(0)
        for layer in lora.layers(model):
            d_out, d_in = layer.shape
            one = LowRank(torch.randn(d_out, 2, generator=draw), torch.randn(2, d_in, generator=draw))
            layer.write(one.scaled(old))
        before = updates(model)
        fixed = {"direction": "kfac", "rank": 4, "step_size": 0.05, "guard": False, "fit_head": False}
        trainer = trainer_for(tmp_path / str(old), rows, model=model, **fixed)
        trainer.train()
        after = updates(trainer.model)
        found.append({name: after[name] - before[name] for name in after})
        assert all(float(before[name].norm()) > 0 for name in before) == (old > 0)
    # The old update is small, so the gradient hardly differs.
    for name in found[0]:
        assert relative_difference(found[1][name], found[0][name]) < 0.02


def test_an_adapter_by_another_name_is_moved_too(tmp_path: Path) -> None:
    base = tiny_bert()
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = PeftModel(base, config, adapter_name="mine")
    trainer = trainer_for(tmp_path, toy_rows(200, 1), model=model, direction="kfac", step_size=0.05, guard=False)
    trainer.train()
    factors = {name: p for name, p in trainer.model.named_parameters() if "lora_B.mine" in name}
    assert factors and all(bool(p.any()) for p in factors.values())


def test_a_base_saved_and_loaded_gets_its_head_saved_whole(tmp_path: Path) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    trainer = trainer_for(tmp_path / "out", toy_rows(60, 1, classes=3), model=model, processing_class=word_tokenizer())
    assert "classifier" in trainer.model.peft_config["default"].modules_to_save
    assert trainer.model.peft_config["default"].task_type == "SEQ_CLS"


def test_an_adapter_for_another_task_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["query"], task_type="CAUSAL_LM")
    for model, given in ((tiny_bert(), config), (PeftModel(tiny_bert(), config), None)):
        with pytest.raises(ValueError, match=r"`task_type=CAUSAL_LM`.*SEQ_CLS.*Leave `task_type` out"):
            trainer_for(tmp_path, toy_rows(60, 1), model=model, peft_config=given)


# An adapter that is zero is set aside in the pass


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_adapter_set_aside_leaves_outputs_and_statistics_as_they_are(kind: str) -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(ARCHITECTURES[kind])
    model = lora.wrap(base, LoraConfig(r=4, lora_alpha=8), fresh_modules(base), None, "SEQ_CLS").eval()
    assert lora.is_idle(model)
    ids = torch.randint(5, 100, (6, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = SEP  # T5 reads a row from its last token of that kind
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def passed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with observed(lora.layers(model)) as statistics:
            logits = model(input_ids=ids).logits
            logits.square().sum().backward()
        return logits.detach(), {
            f"{name}/{key}": total for name, record in statistics.items() for key, total in record.sums().items()
        }

    logits, expected = passed()
    model.zero_grad()
    with lora.set_aside(model):
        again, found = passed()
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
        with torch.no_grad():
            assert not model(input_ids=ids).logits.requires_grad
    assert torch.equal(again, logits)
    assert found.keys() == expected.keys() and len(found) >= 5 * 8
    scale = max(float(total.norm()) for name, total in expected.items() if name.endswith("/gradient"))
    assert scale > 0
    for name, total in found.items():
        floor = 1e-6 * scale if name.endswith("/gradient") else 1e-10
        assert float((total - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()) + floor, name
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" in name)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    model(input_ids=ids).logits.sum().backward()
    assert any(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)


def test_gradients_go_no_further_back_than_the_first_adapted_layer() -> None:
    model = wrapped(
        r=4, lora_alpha=8, target_modules=["query", "key", "value", "dense"], layers_to_transform=[1]
    ).eval()
    seen: list[bool] = []
    layers = model.get_base_model().bert.encoder.layer
    for layer in layers:
        layer.register_forward_hook(lambda _module, _args, output: seen.append(output[0].requires_grad))
    with lora.set_aside(model), observed(lora.layers(model)) as statistics:
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    assert seen == [False, True]
    assert all(bool(record.gradient.any()) for name, record in statistics.items() if "key" not in name)


def test_an_adapter_beside_another_one_is_not_set_aside() -> None:
    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert lora.is_idle(model)
    model.add_adapter(
        "other", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    assert lora.is_idle(model)
    model.base_model.set_adapter(["default", "other"])
    assert not lora.is_idle(model)


def test_an_adapter_set_aside_comes_back_after_an_error() -> None:
    model = wrapped(r=4, lora_alpha=8).eval()
    lora.layers(model)[0].write(LowRank(torch.ones(32, 1), torch.ones(1, 32)))
    assert not lora.is_idle(model)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    aside = lora.set_aside(model)
    for _ in range(2):  # every micro-batch opens it
        with pytest.raises(RuntimeError, match="in between"), aside:
            assert not torch.equal(model(input_ids=ids).logits, before)
            raise RuntimeError("in between")
        assert torch.equal(model(input_ids=ids).logits, before)


def test_an_adapter_comes_back_where_setting_it_aside_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(r=4, lora_alpha=8).eval()
    lora.layers(model)[0].write(LowRank(torch.ones(32, 1), torch.ones(1, 32)))
    ids = torch.tensor([[5, 6, 7]])
    before, wanted = model(input_ids=ids).logits, [parameter.requires_grad for parameter in model.parameters()]
    enable, calls = LoraLinear.enable_adapters, []

    def interrupted(module: LoraLinear, enabled: bool) -> None:
        calls.append(enabled)
        if len(calls) == 3:
            raise KeyboardInterrupt
        enable(module, enabled)

    monkeypatch.setattr(LoraLinear, "enable_adapters", interrupted)
    with pytest.raises(KeyboardInterrupt), lora.set_aside(model):
        pass
    assert calls[:4] == [False, False, False, True]
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_makes_the_same_step_as_one_that_never_sets_the_adapter_aside(
    checkpointed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = toy_rows(60, seed=1)
    found: list[OneStepTrainer] = []
    for folder in ("aside", "never"):
        torch.manual_seed(7)
        trainer = trainer_for(
            tmp_path / folder, rows, model=tiny_bert(), search_dataset=toy_rows(40, seed=2), max_steps=2,
            activation_checkpointing=checkpointed, guard=False,
        )  # fmt: skip
        assert trainer.adapter_rests
        if folder == "never":
            monkeypatch.setattr(OneStepTrainer, "adapter_rests", False)
        trainer.train()
        assert not trainer.adapter_rests  # by now it has moved
        found.append(trainer)
    one, other = found
    assert len(one.report.steps) == 2
    for name, update in updates(one.model).items():
        assert relative_difference(update, updates(other.model)[name]) < 1e-3, name
    norms = [[log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log] for trainer in found]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0][0] > 0


def test_the_logged_norm_is_that_of_the_gradient_of_the_adapted_weights(tmp_path: Path) -> None:
    rows = toy_rows(40, seed=1)
    trainer = trainer_for(tmp_path, rows, model=tiny_bert(), search_dataset=toy_rows(40, seed=2), fit_head=False)
    model = trainer.model.eval()
    weights = [module.base_layer.weight for module in model.modules() if hasattr(module, "lora_A")]
    for weight in weights:
        weight.requires_grad_()
    for row in trainer.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([row["labels"]])).backward()
    norm = sum(float((weight.grad / len(rows)).square().sum()) for weight in weights) ** 0.5
    for weight in weights:
        weight.requires_grad_(False)
    model.zero_grad()
    trainer.train()
    (logged,) = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert logged == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"direction": "sgd"}, {"direction": ["kfac", "sign"]}, {"init": False}, {"method": "full"}]
)
def test_an_adapter_whose_gradient_or_output_counts_is_not_set_aside(options: dict[str, Any], tmp_path: Path) -> None:
    init, rows = options.pop("init", True), toy_rows(60, seed=1)
    peft_config = None if "method" in options else LoraConfig(r=4, init_lora_weights=init)
    trainer = trainer_for(tmp_path, rows, model=tiny_bert(), peft_config=peft_config, **options)
    assert not trainer.adapter_rests
