"""Products kept as factors, against the dense matrices."""

from __future__ import annotations

import pytest
import torch

from onestep_peft.step.layers import LowRank


def random_product(d_out: int, d_in: int, rank: int, seed: int) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, rank, generator=draw), torch.randn(rank, d_in, generator=draw))


def test_norm_is_the_frobenius_norm_of_the_product() -> None:
    product = random_product(9, 7, 3, seed=0)
    assert product.norm() == pytest.approx(float(torch.linalg.matrix_norm(product.dense())), rel=1e-6)


def test_norm_of_a_product_that_cancels_is_zero() -> None:
    product = random_product(9, 7, 3, seed=0)
    assert product.plus(product.scaled(-1.0)).norm() == pytest.approx(0.0, abs=1e-2)


def test_plus_and_scaled_are_the_matrices_sum_and_multiple() -> None:
    one, other = random_product(6, 8, 2, seed=1), random_product(6, 8, 3, seed=2)
    total = one.plus(other.scaled(-0.5))
    assert total.rank == 5
    assert torch.allclose(total.dense(), one.dense() - 0.5 * other.dense(), atol=1e-6)


@pytest.mark.parametrize("shape", [(10, 7), (7, 10), (3, 12), (12, 3)])
def test_truncated_matches_the_dense_svd(shape: tuple[int, int]) -> None:
    product = random_product(*shape, 6, seed=3)
    u, sigma, vt = torch.linalg.svd(product.dense().double(), full_matrices=False)
    fitted, lost = product.truncated(2)
    assert fitted.rank == 2
    assert torch.allclose(fitted.dense().double(), u[:, :2] * sigma[:2] @ vt[:2], atol=1e-5)
    assert lost == pytest.approx(float(sigma[2:].square().sum() / sigma.square().sum()), rel=1e-5)


def test_truncated_leaves_what_fits_as_it_is() -> None:
    product = random_product(5, 5, 3, seed=4)
    fitted, lost = product.truncated(3)
    assert fitted is product
    assert lost == 0.0


def test_truncating_nothing_loses_nothing() -> None:
    fitted, lost = LowRank(torch.zeros(4, 3), torch.zeros(3, 5)).truncated(2)
    assert lost == 0.0
    assert torch.equal(fitted.dense(), torch.zeros(4, 5))
