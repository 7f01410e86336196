"""The way from one head to another: its best point against a search of scipy's and a closed form."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from onestep_peft import head
from onestep_peft.between_heads import STRIDES, between, lowest
from onestep_peft.tasks import TEXT_REGRESSION
from tests.test_head import clusters


def two_heads(task_outputs: int, bias: bool) -> tuple[head.HeadFit, head.HeadFit]:
    draw = torch.Generator().manual_seed(5)
    found = [
        head.HeadFit(
            torch.randn(task_outputs, 5, generator=draw), torch.randn(task_outputs, generator=draw) if bias else None,
            0.1, None,
        )
        for _ in range(2)
    ]  # fmt: skip
    return found[0], found[1]


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_between_two_is_the_best_on_the_way_by_a_search_of_scipys(bias: bool) -> None:
    near, far = two_heads(3, bias)
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    labels = (x @ torch.lerp(near.weight, far.weight, 0.4).T).argmax(1)

    def loss(share: float) -> float:
        logits = x.double() @ torch.lerp(near.weight.double(), far.weight.double(), share).T
        if near.bias is not None and far.bias is not None:
            logits += torch.lerp(near.bias.double(), far.bias.double(), share)
        return float(nn.functional.cross_entropy(logits, labels))

    best = minimize_scalar(loss, bounds=(0, 1), method="bounded")
    assert 0.05 < best.x < 0.95
    found = between(near, far, x, labels)
    assert found.held_out_loss == pytest.approx(best.fun, rel=1e-2)
    assert found.held_out_loss < min(loss(0), loss(1))
    way = far.weight - near.weight
    share = float(((found.weight - near.weight) * way).sum() / way.square().sum())
    assert abs(share - best.x) < 0.03


def test_the_head_between_two_that_are_as_good_is_the_first() -> None:
    x, labels = clusters(50, seed=3)
    one, other = two_heads(3, bias=True)
    same = between(one, one, x, labels)
    assert torch.equal(same.weight, one.weight.double()) and torch.equal(same.bias, one.bias.double())
    ends = {loss: fit for fit in (one, other) for loss in [between(fit, fit, x, labels).held_out_loss]}
    assert between(one, other, x, labels).held_out_loss <= min(ends)


def test_numbers_are_met_where_the_formula_says() -> None:
    one, other = two_heads(1, bias=True)
    x, draw = clusters(80, seed=2)[0], torch.Generator().manual_seed(1)
    ahead = [(x @ fit.weight.T + fit.bias)[:, 0] for fit in (one, other)]
    numbers = torch.lerp(*ahead, 0.35) + 0.1 * torch.randn(80, generator=draw)
    expected = float((numbers - ahead[0]) @ (ahead[1] - ahead[0]) / (ahead[1] - ahead[0]).square().sum())
    found = between(one, other, x, numbers[:, None], TEXT_REGRESSION)
    share = float((found.bias - one.bias) / (other.bias - one.bias))
    assert abs(share - expected) <= 0.5 / STRIDES + 1e-6


def test_what_is_not_finite_is_never_the_lowest() -> None:
    assert lowest(torch.tensor([float("nan"), 1.0, 0.5, float("-nan")])) == 2
