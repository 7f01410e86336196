"""The whole step on small torch modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from onestep_peft.step.candidates import Candidate, ParameterRay
from onestep_peft.step.layers import Layer, LowRank
from onestep_peft.step.line_search import LOOKS
from onestep_peft.step.optimizer import OneStepOptimizer
from onestep_peft.step.outcome import StepOutcome, StepSettings
from onestep_peft.step.statistics import observed
from tests.conftest import same_bits

ROWS, D, CLASSES = 60, 6, 3


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, D, generator=draw)
    return x, (x[:, :CLASSES] + 0.3 * torch.randn(ROWS, CLASSES, generator=draw)).argmax(1)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def settings(**changes: object) -> StepSettings:
    plain = {
        "directions": ("sgd",), "step_size": None, "damping": 0.1, "rank": None, "guard": True, "guard_confidence": 0.95
    }  # fmt: skip
    return StepSettings(**{**plain, **changes})  # type: ignore[arg-type]


def row_losses(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    return call


def dense_layer(name: str, module: nn.Linear) -> Layer:
    """A layer whose update goes straight into its weight."""
    start = module.weight.detach().clone()
    written: list[LowRank] = []

    def write(update: LowRank) -> float:
        written[:] = [update]
        with torch.no_grad():
            module.weight.copy_(start + update.dense())
        return 0.0

    rank = min(module.weight.shape)
    return Layer(
        name, module, tuple(module.weight.shape), float(start.norm()), rank, lambda: (written or [None])[0], write
    )


def one_pass(optimizer: OneStepOptimizer, model: nn.Module, x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> None:
    optimizer.zero_grad()
    optimizer.begin_pass()
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
        optimizer.count(size)
        start += size
    assert optimizer.finish_pass() == start


def test_a_fixed_sgd_step_is_theta_minus_eta_gradient() -> None:
    model, oracle = net(), net()
    x, y = data()
    optimizer = OneStepOptimizer(model.parameters(), settings(step_size=0.1, guard=False))
    one_pass(optimizer, model, x, y, (25, 25, 10))
    optimizer.step()
    reference = torch.optim.SGD(oracle.parameters(), lr=0.1)
    nn.functional.cross_entropy(oracle(x), y).backward()
    reference.step()
    for moved, expected in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(moved, expected, atol=1e-7)
    (outcome,) = optimizer.outcomes
    assert (outcome.direction, outcome.step_size, outcome.accepted) == ("sgd", 0.1, True)


def test_an_sgd_step_is_exactly_start_minus_eta_times_grad() -> None:
    model = net()
    x, y = data()
    optimizer = OneStepOptimizer(model.parameters(), settings(step_size=0.1, guard=False))
    one_pass(optimizer, model, x, y, (ROWS,))
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    optimizer.step()
    assert all(same_bits(p.detach(), e) for p, e in zip(model.parameters(), expected, strict=True))


def test_finish_pass_divides_once_by_the_number_of_items() -> None:
    model = net()
    x, y = data()
    layers = [dense_layer("first", model[0])]
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(model.parameters(), settings(step_size=0.1), layers=layers, statistics=statistics)
        one_pass(optimizer, model, x, y, (7, 53))
    oracle = net()
    nn.functional.cross_entropy(oracle(x), y).backward()
    for found, expected in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, atol=1e-7)
    assert torch.allclose(statistics["first"].gradient, oracle[0].weight.grad, atol=1e-7)


def test_a_pass_without_items_says_so() -> None:
    optimizer = OneStepOptimizer(net().parameters(), settings(step_size=0.1))
    optimizer.begin_pass()
    with pytest.raises(ValueError, match="no labelled item.*label column"):
        optimizer.finish_pass()


def test_a_pass_that_was_cut_short_leaves_nothing_behind() -> None:
    x, y = data()
    gradients = []
    for cut_short in (False, True):
        model = net()
        layers = [dense_layer("first", model[0])]
        with observed(layers) as statistics:
            optimizer = OneStepOptimizer(
                model.parameters(), settings(step_size=0.1), layers=layers, statistics=statistics
            )
            if cut_short:
                optimizer.begin_pass()
                nn.functional.cross_entropy(model(x[:9]), y[:9], reduction="sum").backward()
                optimizer.count(9)
            one_pass(optimizer, model, x, y, (ROWS,))
        gradients.append(statistics["first"].gradient)
    assert torch.equal(*gradients)


def searched(**changes: object) -> tuple[nn.Module, OneStepOptimizer]:
    """A step of a net with held-out rows like its training rows, or with their labels moved on by one."""
    spoilt = changes.pop("spoilt", False)
    model = net()
    held_x, held_y = data(seed=5)
    if spoilt:
        held_y = (held_y + 1) % CLASSES
    layers = [dense_layer("first", model[0]), dense_layer("second", model[2])]
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(),
            settings(**changes),
            layers=layers,
            statistics=statistics,
            held_out_losses=row_losses(model, held_x, held_y),
        )
        one_pass(optimizer, model, *data(), (ROWS,))
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("directions", [("sgd",), ("kfac",), ("kfac_muon",), ("kfac", "sgd", "kfac_muon")])
def test_a_searched_step_ends_on_the_best_point_of_the_best_candidate(directions: tuple[str, ...]) -> None:
    model, optimizer = searched(directions=directions)
    (outcome,) = optimizer.outcomes
    assert outcome.accepted
    assert [name for name, _ in outcome.candidates] == list(directions)
    losses = {(name, point[0]): point[1] for name, result in outcome.candidates for point in result.points}
    assert outcome.loss_after == min(losses.values()) == losses[outcome.direction, outcome.step_size]
    assert outcome.loss_after < 0.9 * outcome.loss_before
    # What the model does now is what the search saw.
    assert float(row_losses(model, *data(seed=5))().mean()) == pytest.approx(outcome.loss_after, rel=1e-6)


def test_kfac_moves_every_layer_against_its_dense_direction() -> None:
    model, optimizer = searched(directions=("kfac",), step_size=0.2, guard=False)
    start = net()
    for name, index in (("first", 0), ("second", 2)):
        record = optimizer.statistics[name]
        a, s = (
            m.double() + 0.1 * m.double().trace() / len(m) * torch.eye(len(m), dtype=torch.float64)
            for m in (record.input_covariance, record.output_grad_covariance)
        )
        direction = torch.linalg.solve(s, record.gradient.double()) @ torch.linalg.inv(a)
        moved = (model[index].weight - start[index].weight).detach().double()
        assert torch.allclose(moved, -0.2 * direction, rtol=1e-4, atol=1e-6)
        assert same_bits(model[index].bias.detach(), start[index].bias.detach())


@pytest.mark.parametrize("directions", [("sgd",), ("kfac",), ("sgd", "kfac_muon")])
@pytest.mark.parametrize("step_size", [None, 0.5])
def test_a_refusal_gives_every_parameter_its_bits_back(directions: tuple[str, ...], step_size: float | None) -> None:
    model, optimizer = searched(directions=directions, step_size=step_size, spoilt=True)
    assert not optimizer.outcomes[0].accepted
    for moved, start in zip(model.parameters(), net().parameters(), strict=True):
        assert same_bits(moved.detach(), start.detach())


@pytest.mark.parametrize("directions", [("sgd",), ("kfac",)])
def test_a_gain_that_is_luck_is_refused_by_the_guard_and_undone(directions: tuple[str, ...]) -> None:
    # Losses of pure noise, a little worse than before: the best point of the search looks better, other rows deny it.
    model = net()
    draw = torch.Generator().manual_seed(3)
    calls = 0

    def noise() -> Tensor:
        nonlocal calls
        calls += 1
        return torch.ones(12) if calls == 1 else 1.01 + 0.1 * torch.randn(12, generator=draw)

    layers = [dense_layer("first", model[0]), dense_layer("second", model[2])]
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), settings(directions=directions), layers=layers, statistics=statistics,
            held_out_losses=noise,
        )  # fmt: skip
        one_pass(optimizer, model, *data(), (ROWS,))
    optimizer.step()
    (outcome,) = optimizer.outcomes
    assert outcome.step_size > 0 and outcome.loss_after < outcome.loss_before
    assert not outcome.accepted and "does not lower the held-out loss" in outcome.reason
    for moved, start in zip(model.parameters(), net().parameters(), strict=True):
        assert same_bits(moved.detach(), start.detach())


def test_without_a_guard_a_fixed_step_that_hurts_is_taken() -> None:
    model, optimizer = searched(step_size=0.5, guard=False, spoilt=True)
    (outcome,) = optimizer.outcomes
    assert outcome.accepted and outcome.loss_after > outcome.loss_before
    assert not same_bits(model[0].weight.detach(), net()[0].weight.detach())


def test_the_guard_refuses_a_step_that_ends_in_nan() -> None:
    model = net()

    def broken() -> Tensor:
        moved = not same_bits(model[0].weight.detach(), net()[0].weight.detach())
        return torch.full((8,), math.nan if moved else 1.0)

    optimizer = OneStepOptimizer(model.parameters(), settings(step_size=0.1), held_out_losses=broken)
    one_pass(optimizer, model, *data(), (ROWS,))
    optimizer.step()
    assert not optimizer.outcomes[0].accepted
    assert same_bits(model[0].weight.detach(), net()[0].weight.detach())


@pytest.mark.parametrize("directions", [("sgd",), ("kfac",)])
def test_an_error_in_the_search_leaves_every_parameter_its_bits(directions: tuple[str, ...]) -> None:
    model = net()
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")
        return row_losses(model, *data(seed=5))()

    layers = [dense_layer("first", model[0])]
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), settings(directions=directions), layers=layers, statistics=statistics,
            held_out_losses=failing,
        )  # fmt: skip
        one_pass(optimizer, model, *data(), (ROWS,))
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for moved, start in zip(model.parameters(), net().parameters(), strict=True):
        assert same_bits(moved.detach(), start.detach())


def test_bf16_parameters_move_by_an_update_rounded_once() -> None:
    model = net().to(torch.bfloat16)
    x, y = data()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = OneStepOptimizer(model.parameters(), settings(step_size=0.1, guard=False))
    one_pass(optimizer, model, x.bfloat16(), y, (ROWS,))
    gradients = [p.grad.float() for p in model.parameters()]
    optimizer.step()
    for parameter, before, gradient in zip(model.parameters(), start, gradients, strict=True):
        assert same_bits(parameter.detach(), (before.float() - 0.1 * gradient).bfloat16())


def test_a_search_without_held_out_rows_says_what_is_missing() -> None:
    model = net()
    optimizer = OneStepOptimizer(model.parameters(), settings())
    one_pass(optimizer, model, *data(), (ROWS,))
    with pytest.raises(ValueError, match="held-out rows"):
        optimizer.step()


def test_no_direction_says_why() -> None:
    model = net()
    nn.init.zeros_(model[2].weight)  # a head of zeros: no gradient comes through it
    layers = [dense_layer("first", model[0])]
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), settings(directions=("kfac",), step_size=0.1), layers=layers, statistics=statistics
        )
        one_pass(optimizer, model, *data(), (ROWS,))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    (outcome,) = optimizer.outcomes
    assert not outcome.accepted and outcome.step_size == 0.0
    assert "gradient is zero or rounding" in outcome.reason and "head" in outcome.reason
    assert all(same_bits(now.detach(), then) for now, then in zip(model.parameters(), before, strict=True))


def test_a_second_step_adds_to_the_first() -> None:
    model = net()
    layers = [dense_layer("first", model[0])]
    held = row_losses(model, *data(seed=5))
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), settings(directions=("kfac",)), layers=layers, statistics=statistics,
            held_out_losses=held,
        )  # fmt: skip
        for _ in range(2):
            one_pass(optimizer, model, *data(), (ROWS,))
            optimizer.step()
    first, second = optimizer.outcomes
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-6)
    assert second.accepted and second.loss_after < first.loss_after


def test_of_fixed_steps_one_that_ends_in_nan_is_not_chosen() -> None:
    x, y = data()
    model = net()
    layers = [dense_layer("0", model[0])]
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), settings(directions=("sgd", "sign"), step_size=1e-3, guard=False), layers=layers,
            statistics=statistics, held_out_losses=lambda: next(losses),
        )  # fmt: skip
        one_pass(optimizer, model, x, y, (ROWS,))
        losses = iter([torch.ones(4), torch.full((4,), float("nan")), torch.full((4,), 0.5)])
        optimizer.step()
    (outcome,) = optimizer.outcomes
    assert (outcome.direction, outcome.accepted) == ("sign", True)


def test_parts_whose_weights_are_all_zero_are_searched_too() -> None:
    zero, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    rays = {
        part: [ParameterRay(parameter, parameter.detach().clone(), torch.ones_like(parameter), lambda tensor: tensor)]
        for part, parameter in (("weights", zero), ("embeddings", other))
    }
    candidate = Candidate("sgd", rays)
    assert all(part.start > 0 for part in candidate.parts.values())


def evaluations(outcome: StepOutcome) -> dict[str, int]:
    """How often the held-out rows were asked, by candidate; the first point, at zero, is known."""
    return {name: len(result.points) - 1 for name, result in outcome.candidates}


def test_a_candidate_that_is_far_behind_is_given_up_after_two_looks_and_the_step_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directions = ("kfac", "kfac_muon")
    model, optimizer = searched(directions=directions)
    monkeypatch.setattr("onestep_peft.step.guard.surely_worse", lambda one, other: False)
    patient, whole = searched(directions=directions)
    (given_up,), (all_of_it,) = optimizer.outcomes, whole.outcomes
    assert evaluations(given_up)["kfac_muon"] == LOOKS < evaluations(all_of_it)["kfac_muon"]
    assert evaluations(given_up)["kfac"] == evaluations(all_of_it)["kfac"] > LOOKS
    assert (given_up.direction, given_up.step_size) == (all_of_it.direction, all_of_it.step_size)
    assert given_up.direction == "kfac" and given_up.accepted and all_of_it.accepted
    for one, other in zip(model.parameters(), patient.parameters(), strict=True):
        assert same_bits(one.detach(), other.detach())


def test_the_first_candidate_and_one_that_may_win_are_searched_to_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = searched(directions=("sign", "kfac"))
    monkeypatch.setattr("onestep_peft.step.guard.surely_worse", lambda one, other: False)
    _, whole = searched(directions=("sign", "kfac"))
    assert evaluations(optimizer.outcomes[0]) == evaluations(whole.outcomes[0])
    assert optimizer.outcomes[0].direction == "kfac"


def test_a_candidate_is_compared_with_standing_still_where_the_first_gained_nothing() -> None:
    _, optimizer = searched(directions=("kfac", "sgd"), spoilt=True)
    (outcome,) = optimizer.outcomes
    assert not outcome.accepted and evaluations(outcome)["sgd"] < evaluations(outcome)["kfac"]


@pytest.mark.parametrize(("name", "share"), [("kfac", 0.1), ("kfac:2", 0.1), ("kfac_schatten", 0.05), ("sgd", 0.05)])
def test_a_search_starts_at_a_share_of_the_weights_norm(name: str, share: float) -> None:
    weight = nn.Parameter(torch.full((3, 4), 2.0))
    direction = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ray = ParameterRay(weight, weight.detach().clone(), direction, lambda tensor: tensor)
    candidate = Candidate(name, {"weights": [ray]})
    candidate.apply(candidate.first.start)
    moved = (weight.detach() - 2.0).norm()
    assert float(moved) == pytest.approx(share * math.sqrt(12 * 4), rel=1e-5)
