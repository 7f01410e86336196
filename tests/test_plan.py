"""The plan's numbers against the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from onestep_peft import OneStepTrainer
from onestep_peft.plan import Group, _kind
from onestep_peft.step.layers import Layer
from onestep_peft.step.line_search import EVALUATIONS
from onestep_peft.step.snapshot import Snapshot
from onestep_peft.step.statistics import Statistics
from tests.conftest import bits, config_for, tokenised, toy_rows, trainer_for, unmoved
from tests.tasks.test_run import KINDS, eos_tokenizer


def rows(number: int, seed: int) -> Dataset:
    return tokenised(toy_rows(number, seed))


def planned(folder: Path, **options: Any) -> OneStepTrainer:
    sets = {"search_dataset": rows(24, 2), "eval_dataset": rows(30, 3)}
    if options.get("method") in (None, "lora"):
        options.setdefault("peft_config", LoraConfig(r=4, lora_alpha=4))
    return trainer_for(folder, rows(50, 1), **{**sets, **options})


class Spy:
    """Counts the rows that go through a model, and keeps what the step holds."""

    def __init__(self, trainer: OneStepTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = self.backward_rows = 0
        self.statistics: dict[str, int] = {}
        self.gradients = self.snapshots = 0
        base: Any = trainer.bare_model
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        base.register_forward_pre_hook(self._count, with_kwargs=True)
        take, init = type(trainer).create_optimizer, Snapshot.__init__

        def create(owner: OneStepTrainer, *args: Any) -> torch.optim.Optimizer:
            optimizer: Any = take(owner, *args)
            step = optimizer.step

            def stepping(closure: Any = None) -> Any:
                self.statistics = {name: _size(one) for name, one in optimizer.statistics.items()}
                self.gradients = sum(total.nbytes for _, total in optimizer.gradients.all())
                return step(closure)

            optimizer.step = stepping
            return optimizer

        def snapshot(owner: Snapshot, parameters: Any) -> None:
            init(owner, parameters)
            copies = list(owner._copies.values())
            self.snapshots += sum(copy.nbytes for copy in copies) * (len(copies) > 2)  # the head's own is its refit's

        monkeypatch.setattr(type(trainer), "create_optimizer", create)
        monkeypatch.setattr(Snapshot, "__init__", snapshot)

    def _count(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        number = len(ids if ids is not None else inputs["inputs_embeds"])
        self.rows += number
        self.backward_rows += number * torch.is_grad_enabled()


def _size(statistics: Statistics) -> int:
    return sum(total.nbytes for total in statistics.sums().values())


METHODS: list[dict[str, Any]] = [
    {"method": "lora", "direction": "kfac"},
    {"method": "lora", "direction": "muon"},
    {"method": "full", "direction": "kfac"},
    {"method": "full", "direction": "sgd"},
    {"method": "prompt_tuning", "direction": "natural", "fit_head": False},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: f"{options['method']}-{options['direction']}")
def test_the_numbers_are_those_of_the_run(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The folds' heads need no forwards; on so few rows they have little to say, and the step has to be accepted.
    trainer = planned(tmp_path, step_size=1e-4, head_folds=1, **options)
    before = bits(trainer.model)
    plan = trainer.plan()
    assert all(torch.equal(before[name], value) for name, value in bits(trainer.model).items())
    spy = Spy(trainer, monkeypatch)
    trainer.train()
    assert {name: plan.rows[name] for name in trainer.report.rows} == trainer.report.rows
    assert plan.rows["evaluation"] == 30
    assert plan.memory["statistics"] == sum(spy.statistics.values())
    assert plan.memory["gradients"] >= spy.gradients > 0  # a head that is fitted apart has one too
    assert plan.memory["snapshot"] == spy.snapshots
    assert plan.memory["weights"] == sum(tensor.nbytes for tensor in _tensors(trainer.model))
    assert trainer.report.steps[0]["accepted"]
    # Forward and backward count three; the search has one fixed point; the rest is forwards.
    assert plan.forwards["pass"] == 3 * spy.backward_rows == 3 * 50
    assert sum(plan.forwards.values()) - plan.forwards["pass"] == spy.rows - spy.backward_rows


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: f"{options['method']}-{options['direction']}")
def test_every_parameter_is_counted_once_and_what_moves_is_what_is_said(
    options: dict[str, Any], tmp_path: Path
) -> None:
    trainer = planned(tmp_path, step_size=1e-2, guard=False, **options)
    plan = trainer.plan()
    model = trainer.model
    assert plan.moved + plan.fitted + sum(plan.unmoved.values()) + plan.frozen == sum(
        p.numel() for p in model.parameters()
    )
    assert sum(group.number for group in plan.groups if group.shape) == len(trainer.layers())
    before = bits(model)
    trainer.train()
    moved = {name for name, value in bits(model).items() if not torch.equal(before[name], value)}
    assert moved and moved.isdisjoint(plan.unmoved)
    assert sum(before[name].numel() for name in moved) <= plan.moved + plan.fitted


def test_full_weights_that_stay_are_named(tmp_path: Path) -> None:
    trainer = planned(tmp_path, method="full")
    plan, layers = trainer.plan(), [layer for layer in trainer.layers() if isinstance(layer, Layer)]
    fitted = {"classifier.weight", "classifier.bias"}
    assert set(plan.unmoved) == set(unmoved(trainer.model, layers)) - fitted
    assert "position_embeddings" in plan.text() and plan.fitted == 2 * 32 + 2


@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning"])
def test_the_search_stays_within_the_plan(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = planned(tmp_path, method=method)
    plan = trainer.plan()
    spy = Spy(trainer, monkeypatch)
    trainer.train()
    assert plan.forwards["pass"] + spy.rows - spy.backward_rows <= sum(plan.forwards.values())
    assert plan.directions == trainer._method.auto and plan.step_size is None and plan.left_out == ()


def test_what_the_budget_has_no_room_for_is_left_out(tmp_path: Path) -> None:
    plan = planned(tmp_path, method="full", search_budget=2 * 24 * EVALUATIONS).plan()
    assert plan.directions == ("kfac", "kfac_schatten:8")
    assert plan.left_out == ("kfac_muon", "kfac_schatten", "kfac_muon:8")
    assert "left out   kfac_muon, kfac_schatten, kfac_muon:8: beyond `search_budget`" in plan.text()


def test_ranks_are_the_directions_own(tmp_path: Path) -> None:
    sizes = {}
    for direction in ("kfac_muon", "kfac_muon:3", "kfac", "kfac:3"):
        plan = planned(tmp_path, method="full", direction=direction).plan()
        sizes[direction] = plan.memory["directions"]
        assert ("full rank" in plan.text()) == (":" not in direction)
        assert all(direction in group.directions for group in plan.groups)
        layers = planned(tmp_path, method="full", direction=direction).layers()
        whole = {"kfac_muon": lambda m, n: (m + n) * min(m, n), "kfac": lambda m, n: m * n}
        of = whole.get(direction, lambda m, n: (m + n) * min(m, n, 3))
        assert sizes[direction] == 4 * sum(of(*layer.shape) for layer in layers)
    assert sizes["kfac:3"] == sizes["kfac_muon:3"]


@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning"])
@pytest.mark.parametrize("name", ["tags", "topics", "score", "gpt2"])
def test_every_task_has_a_plan_that_a_run_keeps(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]
    torch.manual_seed(0)
    kind.base().save_pretrained(tmp_path / "base")
    eos_tokenizer(name).save_pretrained(tmp_path / "base")
    trainer = OneStepTrainer(
        model=str(tmp_path / "base"), args=config_for(tmp_path / "out", method=method, search_budget=1),
        train_dataset=kind.rows(50, 1), search_dataset=kind.rows(24, 2), eval_dataset=kind.rows(30, 3),
    )  # fmt: skip
    plan = trainer.plan()
    assert plan.rows == {"gradient": 50, "search": 24, "guard": 24, "evaluation": 30}
    assert len(plan.directions) == 1 and plan.left_out == trainer._method.auto[1:]
    spy = Spy(trainer, monkeypatch)
    trainer.train()
    assert plan.memory["statistics"] == sum(spy.statistics.values())
    assert plan.forwards["pass"] + spy.rows - spy.backward_rows <= sum(plan.forwards.values())


def test_the_text_says_it_all(tmp_path: Path) -> None:
    plan = planned(tmp_path).plan()
    assert Group("attention.self.query", (32, 32), 2, 512, plan.directions) in plan.groups
    text = plan.text()
    for part in (
        "50 gradient, 24 search, 24 guard, 30 evaluation",
        "2 × attention.self.query (32×32): kfac_schatten, kfac",
        "updates of rank ≤ 8; step size searched",
        f"parameters {plan.moved:,} move, {plan.frozen:,} are frozen",
        "not known beforehand",
        "pass 150, search ≤ ",
        "epochs of training, at most",
    ):
        assert part in text, text
    assert all(len(line) <= 160 for line in text.splitlines())


def test_nothing_is_written_and_a_run_after_it_is_the_same(tmp_path: Path) -> None:
    losses = []
    for look in (False, True):
        trainer = planned(tmp_path / str(look), direction="kfac")
        if look:
            trainer.plan()
            assert not list((tmp_path / "True").iterdir())
        trainer.train()
        losses.append(trainer.report.steps[0]["candidates"])
    assert losses[0] == losses[1]


def test_names_of_kinds() -> None:
    assert _kind("base_model.model.bert.encoder.layer.11.attention.self.query") == "attention.self.query"
    assert _kind("model.layers.3.mlp.experts.7.w1") == "mlp.experts.*.w1"
    assert _kind("bert.pooler.dense.weight") == "bert.pooler.dense.weight"
    assert _kind("layers.0") == "layers.*"
