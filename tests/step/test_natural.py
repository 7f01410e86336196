"""Directions of a prompt, against dense inverses of its Fisher matrix and of its Kronecker factors in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from onestep_peft.step.directions import kfac, whiten
from onestep_peft.step.natural import RowGradients

SHAPE = (2, 5)  # ten parameters
DAMPING = 0.3


def draws(rows: int, seed: int = 1) -> Tensor:
    """Gradients of so many rows at two virtual tokens and two words behind them, `(rows, 4, 5)`."""
    return torch.randn(rows, 4, SHAPE[1], generator=torch.Generator().manual_seed(seed)) + 0.3


def filled(delta: Tensor, sizes: list[int]) -> RowGradients:
    record = RowGradients(SHAPE, torch.device("cpu"))
    for part in delta.split(sizes):
        record.add(part, part)
    return record


def dense(delta: Tensor, items: float) -> Tensor:
    """(F + μI)⁻¹ g, with F and g written out."""
    rows = delta[:, : SHAPE[0]].double().flatten(1)
    fisher = sum(torch.outer(row, row) for row in rows) / items
    shift = DAMPING * float(torch.as_tensor(fisher).trace()) / rows.shape[1]
    system = torch.as_tensor(fisher) + shift * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(system, rows.sum(0) / items).view(SHAPE)


# Fewer rows than parameters are kept as they are; more become a Gram matrix on the way.
@pytest.mark.parametrize("sizes", [[6], [3, 3], [40], [4, 4, 4, 4, 4], [9, 2, 29]])
def test_it_matches_the_dense_solve(sizes: list[int]) -> None:
    delta = draws(sum(sizes))
    record = filled(delta, sizes)
    record.finish(sum(sizes) + 2.0)  # items need not be rows
    expected = dense(delta, sum(sizes) + 2.0)
    assert float((record.natural(DAMPING).double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("sizes", [[6], [4, 4, 4, 4, 4], [9, 2, 29]])
def test_kfac_matches_the_dense_solve_with_factors_written_out(sizes: list[int]) -> None:
    delta, items = draws(sum(sizes)), sum(sizes) + 2.0
    record = filled(delta, sizes)
    record.finish(items)
    rows = delta[:, : SHAPE[0]].double()
    along_tokens = torch.stack([row @ row.T for row in rows]).sum(0) / items
    along_width = torch.stack([row.T @ row for row in rows]).sum(0)
    along_width /= along_width.trace()
    # Their product and the Fisher matrix have one trace.
    assert float(along_tokens.trace()) == pytest.approx(float(rows.square().sum()) / items)
    damped = [one + DAMPING * one.trace() / len(one) * torch.eye(len(one)) for one in (along_tokens, along_width)]
    system = torch.kron(*damped)
    expected = torch.linalg.solve(system, rows.sum(0).flatten() / items).view(SHAPE)
    found = torch.as_tensor(kfac(whiten(record, DAMPING), None))
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-5


def test_the_gradient_is_the_mean_over_the_items() -> None:
    delta = draws(7)
    record = filled(delta, [4, 3])
    record.finish(7)
    assert torch.allclose(record.gradient, delta[:, :2].mean(0), atol=1e-6)


@pytest.mark.parametrize("rows", [6, 40])
def test_kept_rows_and_their_gram_matrix_give_the_same(rows: int) -> None:
    delta = draws(rows)
    kept, folded = filled(delta, [rows]), filled(delta, [rows])
    folded.fold()
    for record in (kept, folded):
        record.finish(rows)
    assert torch.allclose(kept.natural(DAMPING), folded.natural(DAMPING), rtol=1e-4)


@pytest.mark.parametrize("first", [4, 30])
def test_loaded_sums_go_on_where_they_were(first: int) -> None:
    delta = draws(44)
    whole = filled(delta, [first, 44 - first])
    half = filled(delta[:first], [first])
    again = RowGradients(SHAPE, torch.device("cpu"))
    again.add(draws(3, seed=9), draws(3, seed=9))  # what was there before gives way
    again.load({name: total.clone() for name, total in half.sums().items()})
    again.add(delta[first:], delta[first:])
    for record in (whole, again):
        record.finish(44)
    assert torch.equal(again.gradient, whole.gradient)
    assert torch.equal(again.natural(DAMPING), whole.natural(DAMPING))


def test_reset_empties_the_sums() -> None:
    record = filled(draws(40), [40])
    record.reset()
    delta = draws(6, seed=2)
    record.add(delta, delta)
    record.finish(6)
    expected = dense(delta, 6)
    assert float((record.natural(DAMPING).double() - expected).norm() / expected.norm()) < 1e-5


def test_rows_that_cancel_leave_noise() -> None:
    delta = draws(8)
    record = filled(torch.cat([delta, -delta]), [16])
    record.finish(16)
    assert record.is_noise()
    record = filled(delta, [8])
    record.finish(8)
    assert not record.is_noise()


def test_rows_that_are_not_finite_say_so() -> None:
    delta = draws(6)
    delta[2, 0, 0] = math.nan
    record = filled(delta, [6])
    record.finish(6)
    with pytest.raises(ValueError, match="not finite.*damping"):
        record.natural(DAMPING)
