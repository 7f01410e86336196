"""The small steps of a walk: each against the same formulas written out densely in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from onestep_peft.step import products
from onestep_peft.step import walk as walk_module
from onestep_peft.step.directions import damped_root
from onestep_peft.step.layers import Layer, LowRank
from onestep_peft.step.optimizer import OneStepOptimizer
from onestep_peft.step.outcome import WALK, StepSettings
from onestep_peft.step.products import ProductStep, along_the_products
from onestep_peft.step.statistics import LayerStatistics, observed
from onestep_peft.step.walk import ASTRAY, ERRORS, Walk, metric_of
from tests.conftest import same_bits
from tests.step.test_optimizer import ROWS, data, net, one_pass, row_losses, settings

SLICES, PACE = 4, 0.2


def matrix(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, seed: int) -> Tensor:
    x = matrix(3 * d, d, seed=seed)
    return x.T @ x / len(x)


def along_the_product(
    update: LowRank, gradient: Tensor, output_root: Tensor | None, input_root: Tensor | None, *, length: float
) -> LowRank:
    """Without a root that of the identity, a diagonal of ones."""
    sides = zip(gradient.shape, (output_root, input_root), strict=True)
    roots = [torch.ones(d, dtype=torch.float64) if root is None else root for d, root in sides]
    step = ProductStep(update, gradient, *roots, torch.tensor(length, dtype=torch.float64))
    return along_the_products([step])[0]


ROOTS: dict[str, tuple[Callable[[], Tensor | None], Callable[[Tensor | None, int], Tensor]]] = {
    "dense": (lambda: damped_root(covariance(12, 3), 0.1), lambda root, d: root),
    "blocks": (
        lambda: damped_root(torch.stack([covariance(4, 4), covariance(4, 5), covariance(4, 6)]), 0.1),
        lambda root, d: torch.block_diag(*root),
    ),
    "diagonal": (lambda: matrix(12, seed=7).abs() + 0.1, lambda root, d: root.diag()),
    "identity": (lambda: None, lambda root, d: torch.eye(d, dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", ROOTS)
def test_a_step_on_the_product_is_the_projected_one_cut_to_its_rank(kind: str) -> None:
    """Against the dense formula: projectors on the update's spaces in white coordinates, an SVD, and back."""
    make, dense = ROOTS[kind]
    input_root, output_root = make(), damped_root(covariance(9, 8), 0.1)
    a, s, gradient, length = dense(input_root, 12), output_root, matrix(9, 12, seed=9), 0.5
    update = LowRank(matrix(9, 3, seed=10), matrix(3, 12, seed=11))
    found = along_the_product(update, gradient, output_root, input_root, length=length)

    white, gamma = s.T @ update.dense() @ a, torch.linalg.inv(s) @ gradient @ torch.linalg.inv(a).T
    u, _, vt = torch.linalg.svd(white)
    p, q = u[:, :3] @ u[:, :3].T, vt[:3].T @ vt[:3]
    tangent = p @ gamma + gamma @ q - p @ gamma @ q
    moved = white - length * tangent / tangent.norm()
    u, sigma, vt = torch.linalg.svd(moved)
    expected = torch.linalg.inv(s).T @ (u[:, :3] * sigma[:3]) @ vt[:3] @ torch.linalg.inv(a)
    assert found.rank == 3
    assert torch.allclose(found.dense(), expected, rtol=1e-9, atol=1e-11)


def test_rows_of_the_adapter_that_the_update_does_not_use_have_no_say() -> None:
    """B is zero there, so A's rows, drawn at random, span nothing."""
    left, right, gradient = matrix(9, 2, seed=1), matrix(2, 12, seed=2), matrix(9, 12, seed=3)
    padded = LowRank(torch.cat([left, torch.zeros(9, 4)], 1), torch.cat([right, matrix(4, 12, seed=4)], 0))
    one = along_the_product(LowRank(left, right), gradient, None, None, length=0.1)
    other = along_the_product(padded, gradient, None, None, length=0.1)
    assert torch.allclose(one.dense(), other.dense(), rtol=1e-9, atol=1e-11)


def test_at_full_rank_it_is_the_natural_gradient() -> None:
    update, gradient = LowRank(matrix(4, 4, seed=1), matrix(4, 6, seed=2)), matrix(4, 6, seed=3)
    root = damped_root(covariance(6, 5), 0.1)
    found = along_the_product(update, gradient, None, root, length=0.1)
    white = gradient @ torch.linalg.inv(root).T
    expected = update.dense() - 0.1 / white.norm() * gradient @ torch.linalg.inv(root @ root.T)
    assert torch.allclose(found.dense(), expected, rtol=1e-9, atol=1e-11)


def test_layers_that_move_together_move_as_they_do_alone() -> None:
    """Of one shape, though one has a smaller rank than its factors have room for, and another has none."""
    roots = [
        (damped_root(covariance(9, i), 0.1), damped_root(torch.stack([covariance(4, i)] * 3), 0.1)) for i in (1, 2, 3)
    ]
    updates = [LowRank(matrix(9, 3, seed=i), matrix(3, 12, seed=10 + i)) for i in (1, 2, 3)]
    updates[1].left[:, 2] = 0
    updates[2].left.zero_()
    steps = [
        ProductStep(update, matrix(9, 12, seed=20 + i), *roots[i], torch.tensor(0.1 * i + 0.1, dtype=torch.float64))
        for i, update in enumerate(updates)
    ]
    together = products._together(steps)
    assert [one.rank for one in together] == [3, 2, 0]
    for one, alone in zip(together, along_the_products(steps), strict=True):
        assert torch.allclose(one.dense(), alone.dense(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("room", "expected"),
    [(0, [[0], [1], [2], [3], [4]]), (2 * (9 * 12 + 9 * 9 + 12), [[0, 2], [3, 4], [1]]), (10**6, [[0, 2, 3, 4], [1]])],
)
def test_those_of_one_shape_move_together_as_far_as_there_is_room(room: int, expected: list[list[int]]) -> None:
    steps = []
    for width in (12, 10, 12, 12, 12):
        update, roots = LowRank(torch.ones(9, 3), torch.ones(3, width)), (torch.eye(9), torch.ones(width))
        steps.append(ProductStep(update, torch.ones(9, width), *roots, torch.tensor(1.0)))
    assert list(products._alike(steps, room)) == expected


def in_place(name: str, module: nn.Linear) -> Layer:
    """A layer whose update goes into its weight."""
    shape = (module.out_features, module.in_features)
    return Layer(name, module, shape, float(module.weight.norm()), None, parameter=lambda: module.weight)


def as_product(name: str, module: nn.Linear, rank: int) -> Layer:
    """A layer whose update is a product of this rank, which two parameters hold."""
    d_out, d_in = module.weight.shape
    start = module.weight.detach().clone()
    held: list[LowRank] = []
    module.weight.requires_grad_(False)

    def write(update: LowRank) -> float:
        held[:] = [update]
        with torch.no_grad():
            module.weight.copy_(start + update.dense())
        return 0.0

    return Layer(name, module, (d_out, d_in), float(start.norm()), rank, lambda: (held or [None])[0], write)


def same(now: list[Tensor], then: list[Tensor]) -> bool:
    return all(same_bits(one, other) for one, other in zip(now, then, strict=True))


def walked(
    model: nn.Sequential, layers: list[Layer], until: int = SLICES, **changes: object
) -> tuple[OneStepOptimizer, list[list[Tensor]]]:
    """A walk through so many slices; also all parameters after each of them."""
    seen = []
    chosen: StepSettings = settings(
        **{"directions": ("kfac",), "slices": SLICES, "pace": PACE, "rank": None, **changes}
    )
    with observed(layers) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), chosen, layers=layers, statistics=statistics,
            held_out_losses=row_losses(model, *data(seed=5)),
        )  # fmt: skip
        for number in range(until):
            x, y = data(seed=10 + number)
            with torch.no_grad():
                loss = float(nn.functional.cross_entropy(model(x), y))
            one_pass(optimizer, model, x, y, (ROWS,))
            optimizer.loss = loss
            optimizer.step()
            seen.append([parameter.detach().clone() for parameter in model.parameters()])
    return optimizer, seen


def metric() -> tuple[Tensor, Tensor]:
    """A and S of the first layer, damped: of the first slice, at the start."""
    x, y = data(seed=10)
    first = net().double()
    h = first[0](x.double()).detach().requires_grad_()
    nn.functional.cross_entropy(first[2](torch.tanh(h)), y, reduction="sum").backward()
    assert h.grad is not None
    live = h.grad.abs().amax(1) > 0
    factors = [x.double()[live].T @ x.double()[live] / live.sum(), h.grad.T @ h.grad / ROWS]
    a, s = (m + 0.1 * m.trace() / len(m) * torch.eye(len(m), dtype=torch.float64) for m in factors)
    return a, s


def length(moved: Tensor) -> float:
    """Of a move of the first layer, in K-FAC's metric."""
    a, s = metric()
    return math.sqrt(float((moved.double() * (s @ moved.double() @ a)).sum()))


def natural(model: nn.Sequential, seed: int) -> Tensor:
    """K-FAC's natural gradient of the first layer's weight, in the metric of the first slice."""
    a, s = metric()
    x, y = data(seed=seed)
    wide = model.double()
    gradient = torch.autograd.grad(nn.functional.cross_entropy(wide(x.double()), y), wide[0].weight)[0]
    return torch.linalg.solve(s, gradient) @ torch.linalg.inv(a)


def model_with(parameters: list[Tensor]) -> nn.Sequential:
    model = net()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), parameters, strict=True):
            parameter.copy_(value)
    return model


def test_small_steps_go_down_the_natural_gradient_at_a_falling_pace() -> None:
    """The first by PACE times the length of the step, in K-FAC's metric."""
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])])
    step, walk = optimizer.outcomes
    assert step.accepted and step.direction == "kfac" and (walk.direction, walk.step_size) == (WALK, PACE)
    whole = length(seen[0][0] - net()[0].weight.detach())
    for number in range(1, SLICES):
        before = model_with(seen[number - 1])
        left = 1 - (number - 1) / (SLICES - 1)
        down = natural(before, 10 + number)
        expected = before[0].weight.detach() - left * PACE * whole / length(down) * down
        assert torch.allclose(seen[number][0].double(), expected, rtol=1e-4, atol=1e-6)
        assert same(seen[number][1:], seen[number - 1][1:])


def test_an_update_of_rank_one_stays_one() -> None:
    model = net()
    start = model[0].weight.detach().clone()
    optimizer, seen = walked(model, [as_product("first", model[0], 1)])
    assert optimizer.outcomes[0].accepted
    for before, after in zip(seen[:-1], seen[1:], strict=True):
        assert not same_bits(before[0], after[0])
        sigma = torch.linalg.svdvals((after[0] - start).double())
        assert sigma[1] < 1e-5 * sigma[0]


def test_without_layers_the_parameters_follow_their_gradients() -> None:
    model = net()
    _, seen = walked(model, [], until=2, directions=("sgd",))
    before = model_with(seen[0])
    x, y = data(seed=11)
    gradients = torch.autograd.grad(nn.functional.cross_entropy(before(x), y), list(before.parameters()))
    for now, then, start, gradient in zip(seen[1], seen[0], net().parameters(), gradients, strict=True):
        rate = PACE * float((then - start.detach()).norm() / gradient.norm())
        assert torch.allclose(now, then - rate * gradient, rtol=1e-4, atol=1e-6)


def test_a_layer_that_the_step_left_alone_stays() -> None:
    model = net()
    layers = [in_place("first", model[0]), in_place("last", model[2])]
    nn.init.zeros_(model[2].weight)  # no gradient comes through it
    _, seen = walked(model, layers, until=3)
    assert same_bits(seen[0][0], net()[0].weight.detach())
    assert all(same_bits(one[0], seen[0][0]) for one in seen) and not same_bits(seen[1][2], seen[0][2])


def test_a_first_step_that_is_refused_ends_the_walk() -> None:
    model = net()
    worse = row_losses(model, *data(seed=5))
    with observed([in_place("first", model[0])]) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), settings(directions=("kfac",), slices=SLICES), layers=[in_place("first", model[0])],
            statistics=statistics, held_out_losses=lambda: -worse(),
        )  # fmt: skip
        one_pass(optimizer, model, *data(seed=10), (ROWS,))
        optimizer.step()
    assert not optimizer.walk.under_way and [one.accepted for one in optimizer.ended_steps()] == [False]


@pytest.mark.parametrize("guard", [True, False])
def test_a_walk_that_does_not_help_ends_where_it_began(guard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a pace far too large; unguarded it stays, as asked."""
    monkeypatch.setattr(walk_module, "ASTRAY", math.inf)
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], guard=guard, pace=-3.0)  # uphill
    walk = optimizer.outcomes[-1]
    assert walk.loss_after > walk.loss_before and walk.accepted is not guard
    assert walk.reason.startswith("refused" if guard else "accepted")
    assert same(seen[-1], seen[0]) is guard
    assert [one.direction for one in optimizer.ended_steps()] == ["kfac", WALK]


def at_loss(optimizer: OneStepOptimizer, model: nn.Sequential, loss: float) -> list[Tensor]:
    """The parameters after one more slice whose rows have lost so much, in units of what is too much."""
    walk = optimizer.walk
    losses, rows = walk.losses.double(), optimizer.settings.slice_rows
    limit = ASTRAY * float(losses.mean()) + ERRORS * float((losses - losses.mean()).square().mean() / rows) ** 0.5
    one_pass(optimizer, model, *data(seed=20), (ROWS,))
    walk.advance(optimizer.statistics, optimizer.gradients, left=0.5, loss=loss * limit)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("slice_rows", [4.0, 400.0, math.inf])
def test_slices_that_lose_far_more_twice_send_the_walk_back_at_half_the_pace(slice_rows: float) -> None:
    """Far more than by chance, too: few rows lose more now and then."""
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], until=2, slice_rows=slice_rows)
    pace = optimizer.walk.pace
    there = at_loss(optimizer, model, 0.99)
    assert not same(there, seen[1])
    assert same(at_loss(optimizer, model, 1.01), there) and optimizer.walk.pace == pace  # a slice without a step
    there = at_loss(optimizer, model, 0.99)
    assert same(at_loss(optimizer, model, 1.01), there) and optimizer.walk.pace == pace  # it was the first in a row
    assert same(at_loss(optimizer, model, 1.01), seen[0]) and optimizer.walk.pace == pace / 2


def test_a_walk_goes_back_no_further_than_to_where_a_slice_lost_what_held_out_rows_did() -> None:
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], until=2, slice_rows=math.inf)
    pace, limit = optimizer.walk.pace, 1 / ASTRAY
    well = at_loss(optimizer, model, 0.99 * limit)
    at_loss(optimizer, model, 0.99 * limit)  # the slice tells that the place before its step is well
    for _ in range(3):
        away = at_loss(optimizer, model, 1.01 * limit)
    at_loss(optimizer, model, 1.01)
    back = at_loss(optimizer, model, 1.01)
    assert same(back, well) and not same(back, away) and optimizer.walk.pace == pace / 2
    assert not same(at_loss(optimizer, model, 100.0), back)  # this place is not judged: it was well
    at_loss(optimizer, model, 1.01)
    assert same(at_loss(optimizer, model, 1.01), seen[0]) and optimizer.walk.pace == pace / 4


def test_a_loss_that_is_no_number_sends_the_walk_back_at_once() -> None:
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], until=3)
    pace = optimizer.walk.pace
    assert same(at_loss(optimizer, model, math.nan), seen[1]) and optimizer.walk.pace == pace / 2
    at_loss(optimizer, model, 0.99)
    assert same(at_loss(optimizer, model, math.nan), seen[0]) and optimizer.walk.pace == pace / 4


def test_where_a_walk_began_it_is_not_astray_however_hard_the_rows_are() -> None:
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], until=1)
    pace = optimizer.walk.pace
    assert not same(at_loss(optimizer, model, 100.0), seen[0])
    at_loss(optimizer, model, 100.0)
    assert same(at_loss(optimizer, model, 100.0), seen[0]) and optimizer.walk.pace == pace / 2
    assert not same(at_loss(optimizer, model, 100.0), seen[0]) and optimizer.walk.pace == pace / 2


def test_a_walk_kept_before_it_could_go_astray_goes_on() -> None:
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], until=2)
    kept = {name: one for name, one in optimizer.walk.tensors().items() if name not in ("astray", "moved", "warned")}
    optimizer.walk.load(kept)
    one_pass(optimizer, model, *data(seed=20), (ROWS,))
    optimizer.walk.advance(optimizer.statistics, optimizer.gradients, left=0.5, loss=100.0)
    assert not same([parameter.detach() for parameter in model.parameters()], seen[1])


def test_a_walk_goes_on_from_what_was_kept_of_it() -> None:
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], until=2)
    one_pass(optimizer, model, *data(seed=12), (ROWS,))
    other = Walk([in_place("first", model[0])], list(model.parameters()))
    assert not other.under_way
    other.load({name: tensor.clone() for name, tensor in optimizer.state_dict()["walk"].items()})
    assert other.under_way
    before = [parameter.detach().clone() for parameter in model.parameters()]
    results = []
    for walk in (optimizer.walk, other):
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.data.copy_(value)
        walk.advance(optimizer.statistics, optimizer.gradients, left=0.5, loss=0.1)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert not same_bits(results[0][0], before[0])
    assert same(*results)


def test_the_rank_of_directions_does_not_cut_what_is_there() -> None:
    model = net()
    start = model[0].weight.detach().clone()
    _, seen = walked(model, [as_product("first", model[0], 4)], directions=("kfac:4",), rank=1)
    for one in seen:
        sigma = torch.linalg.svdvals((one[0] - start).double())
        assert sigma[3] > 1e-3 * sigma[0] > 1e3 * sigma[4]


def test_tokens_that_the_first_rows_did_not_have_count_as_seen_once() -> None:
    """Else a later row's would move as if nothing were known to hold them."""
    record = LayerStatistics((3, 50), torch.device("cpu"), "diagonal")
    record.gradient, record.input_covariance = torch.ones(3, 50), torch.zeros(50)
    record.output_grad_covariance, record.tokens = torch.eye(3), torch.tensor(40.0)
    record.input_covariance[:2] = torch.tensor([0.75, 0.25])
    layer = Layer("words", nn.Embedding(50, 3), (3, 50), 1.0, None, input_factor="diagonal")
    known = metric_of(layer, record, 0.1, torch.ones(3, 50))
    floored = torch.full((50,), 1 / 40)
    floored[:2] = record.input_covariance[:2]
    assert torch.allclose(known["input/words"].square(), floored + 0.1 * floored.mean(), rtol=1e-5)


def test_an_error_at_its_beginning_leaves_no_walk_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say: with smaller batches the first step is made anew."""

    def failing(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    model = net()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(walk_module, "_moved", failing)
        walked(model, [in_place("first", model[0])], until=1)
    for now, then in zip(model.parameters(), net().parameters(), strict=True):
        assert same_bits(now.detach(), then.detach())
    optimizer, _ = walked(model, [in_place("first", model[0])], until=1)
    assert optimizer.outcomes[0].accepted


def test_a_layer_that_no_row_of_a_slice_reaches_stays() -> None:
    model = net()
    optimizer, seen = walked(model, [in_place("first", model[0])], until=2)
    optimizer.statistics["first"].gradient = torch.zeros(())
    optimizer.walk.advance(optimizer.statistics, optimizer.gradients, left=0.5, loss=0.1)
    assert same_bits(model[0].weight.detach(), seen[1][0])


def test_a_walk_through_another_number_of_slices_is_refused() -> None:
    optimizer, _ = walked(model := net(), [in_place("first", model[0])], until=2)
    optimizer.walk.check(SLICES)
    with pytest.raises(ValueError, match=r"`slices=4`, and the run has 7"):
        optimizer.walk.check(7)


@pytest.mark.parametrize("layers", [True, False])
def test_weights_of_16_bits_are_rounded_from_a_sum_in_fp32(layers: bool) -> None:
    """Steps that are each far below a weight's last bit add up to those of fp32 weights, rounded once."""
    model = net().to(torch.bfloat16)
    chosen = {"directions": ("kfac",) if layers else ("sgd",), "pace": 1e-3, "slices": 40}
    x, y = data(seed=10)
    layer = [in_place("first", model[0])] if layers else []
    with observed(layer) as statistics:
        optimizer = OneStepOptimizer(
            model.parameters(), settings(**chosen), layers=layer, statistics=statistics,
            held_out_losses=lambda: row_losses(model, data(seed=5)[0].bfloat16(), data(seed=5)[1])().float(),
        )  # fmt: skip
        with optimizer.gradients.collected():
            for number in range(30):
                one_pass(optimizer, model, x.bfloat16(), y, (ROWS,))
                optimizer.loss = 0.1
                optimizer.step()
                if number == 0:
                    start = model[0].weight.detach().clone()
                    assert optimizer.outcomes[0].accepted
                    length = float(optimizer.walk.tensors()["length/first" if layers else "length/0"])
    wide = optimizer.walk.tensors()["wide/0"]
    assert length > 0 and not same_bits(wide.bfloat16(), start)
    assert same_bits(model[0].weight.detach(), wide.bfloat16())
    optimizer.walk.go_back()
    assert same_bits(model[0].weight.detach(), start) and "wide/0" not in optimizer.walk.tensors()
