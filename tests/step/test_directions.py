"""Directions against dense float64 constructions of the same formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onestep_peft.step.directions import (
    DIRECTIONS,
    SINGULAR_CUTOFF,
    WHITENED,
    as_it_is,
    damped_root,
    kfac,
    kfac_muon,
    kfac_schatten,
    lora_one,
    muon,
    rank_of,
    rule_of,
    sign,
    whiten,
)
from onestep_peft.step.layers import LowRank
from onestep_peft.step.statistics import LayerStatistics
from tests.conftest import relative_difference

DAMPING = 0.1


def statistics_of(gradient: Tensor, input_covariance: Tensor, output_grad_covariance: Tensor) -> LayerStatistics:
    record = LayerStatistics(tuple(gradient.shape), torch.device("cpu"))
    record.gradient = gradient.float()
    record.input_covariance = input_covariance.float()
    record.output_grad_covariance = output_grad_covariance.float()
    return record


def random_statistics(d_out: int, d_in: int, seed: int) -> LayerStatistics:
    """A random gradient, and covariances whose eigenvalues spread over three decades."""
    draw = torch.Generator().manual_seed(seed)

    def covariance(d: int) -> Tensor:
        basis, _ = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
        return basis * torch.logspace(-2, 1, d, dtype=torch.float64) @ basis.T

    gradient = torch.randn(d_out, d_in, generator=draw, dtype=torch.float64)
    return statistics_of(gradient, covariance(d_in), covariance(d_out))


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    matrix = covariance.double()
    return matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=torch.float64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric matrix to a power, by its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def symmetric_whitening(record: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """S^-1/2, A^-1/2 and S^-1/2 G A^-1/2, with symmetric roots where the code under test takes Cholesky factors."""
    s = power(damped(record.output_grad_covariance), -0.5)
    a = power(damped(record.input_covariance), -0.5)
    return s, a, s @ record.gradient.double() @ a


def dense(direction: LowRank | Tensor) -> Tensor:
    return direction.dense() if isinstance(direction, LowRank) else direction


def assert_close(direction: LowRank | Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((dense(direction).double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_kfac_matches_the_dense_kronecker_solve(shape: tuple[int, int]) -> None:
    record = random_statistics(*shape, seed=1)
    # Row-major vec(S X A) = (S ⊗ A) vec(X).
    system = torch.kron(damped(record.output_grad_covariance), damped(record.input_covariance))
    expected = torch.linalg.solve(system, record.gradient.double().flatten()).view(shape)
    assert_close(kfac(whiten(record, DAMPING), None), expected)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("rank", [1, 3])
def test_truncated_kfac_is_the_best_of_its_rank_in_kfacs_metric(shape: tuple[int, int], rank: int) -> None:
    record = random_statistics(*shape, seed=2)
    direction = kfac(whiten(record, DAMPING), rank)
    s, a, white = symmetric_whitening(record)
    u, sigma, vt = torch.linalg.svd(white, full_matrices=False)
    # Eckart and Young: in whitened coordinates the best is the truncated SVD, at the distance of the tail.
    assert direction.rank == rank
    assert_close(direction, s @ (u[:, :rank] * sigma[:rank] @ vt[:rank]) @ a)
    back = torch.linalg.solve(s, direction.dense().double()) @ torch.linalg.inv(a)
    assert float((back - white).norm()) == pytest.approx(float(sigma[rank:].norm()), rel=1e-5)


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize(("rule", "exponent"), [(kfac_muon, 0.0), (kfac_schatten, 0.5)])
def test_kfac_muon_and_schatten_match_symmetric_square_roots(rule: Callable, exponent: float, rank: int) -> None:
    record = random_statistics(9, 6, seed=3)
    s, a, white = symmetric_whitening(record)
    u, sigma, vt = torch.linalg.svd(white, full_matrices=False)
    expected = s @ (u[:, :rank] * sigma[:rank] ** exponent) @ vt[:rank] @ a
    expected = expected / expected.square().mean().sqrt()
    direction = rule(whiten(record, DAMPING), rank)
    assert_close(direction, expected)
    assert float(direction.dense().square().mean().sqrt()) == pytest.approx(1.0, rel=1e-5)


def test_kfac_schatten_gains_the_most_of_all_directions_of_schatten_3_norm_1() -> None:
    # Hölder: max ⟨G, D⟩ over ‖D‖₃ ≤ 1 is the Schatten norm of G dual to 3, with exponent 3/2.
    draw = torch.Generator().manual_seed(4)
    gradient = torch.randn(8, 5, generator=draw)
    direction = kfac_schatten(whiten(statistics_of(gradient, torch.eye(5), torch.eye(8)), 0.0), None).dense().double()
    norm = float(torch.linalg.svdvals(direction).pow(3).sum() ** (1 / 3))
    dual = float(torch.linalg.svdvals(gradient.double()).pow(1.5).sum() ** (2 / 3))
    assert float((gradient.double() * direction).sum()) / norm == pytest.approx(dual, rel=1e-5)


def test_kfac_muon_in_white_coordinates_is_the_polar_factor_of_the_gradient() -> None:
    draw = torch.Generator().manual_seed(4)
    gradient = torch.randn(8, 5, generator=draw)
    direction = kfac_muon(whiten(statistics_of(gradient, torch.eye(5), torch.eye(8)), 0.0), None).dense().double()
    # Columns orthogonal and of one length: all singular values are equal, √(entries/rank) by the scale to rms 1.
    length = math.sqrt(8 * 5 / 5)
    assert torch.allclose(direction.T @ direction, length**2 * torch.eye(5, dtype=torch.float64), atol=1e-4)
    # No matrix of spectral norm 1 has a larger inner product with G than its polar factor: the nuclear norm.
    inner = float((gradient.double() * direction).sum()) / length
    assert inner == pytest.approx(float(torch.linalg.svdvals(gradient.double()).sum()), rel=1e-5)


@pytest.mark.parametrize("rule", [kfac, kfac_schatten, kfac_muon])
@pytest.mark.parametrize("rank", [1, 4, None])
def test_every_direction_descends(rule: Callable, rank: int | None) -> None:
    record = random_statistics(6, 8, seed=5)
    direction = rule(whiten(record, DAMPING), rank)
    assert float((dense(direction) * record.gradient).sum()) > 0


def test_singular_values_in_the_rounding_are_cut() -> None:
    # Rank 2 but for a part that is below the cutoff and has no direction.
    draw = torch.Generator().manual_seed(6)
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64))
    sigma = torch.tensor([1.0, 0.2, 0.1 * SINGULAR_CUTOFF, 0.0, 0.0], dtype=torch.float64)
    record = statistics_of(torch.zeros(6, 5), torch.eye(5), torch.eye(6))
    record.gradient = u[:, :5] * sigma @ v.T  # float64: in fp32 the small part would drown
    white = whiten(record, 0.0)
    polar = kfac_muon(white, None).dense().double()
    expected = u[:, :2] @ v[:, :2].T
    assert torch.allclose(polar / polar.norm(), expected / expected.norm(), atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 11), (11, 4)])
def test_singular_pairs_match_torchs_svd(shape: tuple[int, int]) -> None:
    record = random_statistics(*shape, seed=7)
    white = whiten(record, DAMPING)
    _, _, dense = symmetric_whitening(record)
    u, sigma, vt = white.svd()
    assert torch.allclose(u * sigma @ vt, white.white, rtol=1e-9, atol=1e-12)
    assert torch.allclose(sigma, torch.linalg.svdvals(dense), rtol=1e-6)
    assert torch.allclose(u.T @ u, torch.eye(4, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(vt @ vt.T, torch.eye(4, dtype=torch.float64), atol=1e-7)
    for cut, whole in zip(white.svd(2), (u[:, :2], sigma[:2], vt[:2]), strict=True):
        assert torch.allclose(cut, whole, rtol=1e-12, atol=1e-14)


def test_damped_root_is_a_root_of_the_damped_covariance() -> None:
    covariance = random_statistics(3, 6, seed=8).input_covariance
    kept = covariance.clone()
    root = damped_root(covariance, 0.3)
    wide = kept.double()
    assert torch.equal(damped_root(wide, 0.3), root)
    assert torch.equal(covariance, kept) and torch.equal(wide, kept.double())
    assert root.dtype == torch.float64
    assert torch.allclose(root @ root.T, damped(covariance, 0.3), atol=1e-12)


def test_damped_root_raises_the_damping_of_an_indefinite_matrix() -> None:
    # As rounding leaves it: an eigenvalue a little below zero. At damping 0 there is no root; a larger one is found.
    covariance = torch.diag(torch.tensor([1.0, 1.0, -1e-7]))
    root = damped_root(covariance, 0.0)
    added = (root @ root.T).diagonal() - covariance.double().diagonal()
    assert float(added.min()) > 1e-7
    assert float(added.max()) < 1e-5
    assert torch.allclose(added, added[0].expand(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damped_root_of_what_is_not_finite_says_so(value: float) -> None:
    covariance = torch.eye(3)
    covariance[1, 1] = value
    with pytest.raises(ValueError, match=r"covariance \(3 x 3\).*not finite.*damping"):
        damped_root(covariance, 0.1)


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_one_is_the_nearest_matrix_of_its_rank_to_the_gradient(rank: int) -> None:
    record = random_statistics(7, 5, seed=9)
    u, sigma, vt = torch.linalg.svd(record.gradient.double(), full_matrices=False)
    assert_close(lora_one(as_it_is(record), rank), u[:, :rank] * sigma[:rank] @ vt[:rank])


def test_lora_one_at_full_rank_is_the_gradient() -> None:
    record = random_statistics(7, 5, seed=9)
    assert_close(lora_one(as_it_is(record), None), record.gradient.double())


@pytest.mark.parametrize("rank", [2, None])
def test_muon_is_the_polar_factor_of_the_gradient(rank: int | None) -> None:
    record = random_statistics(12, 6, seed=10)
    u, _, vt = torch.linalg.svd(record.gradient.double(), full_matrices=False)
    polar = u[:, :rank] @ vt[:rank]
    assert_close(muon(as_it_is(record), rank), polar / polar.square().mean().sqrt())


def test_muon_points_where_torchs_own_muon_steps() -> None:
    gradient = torch.randn(24, 12, generator=torch.Generator().manual_seed(11))
    weight = torch.nn.Parameter(torch.zeros(24, 12))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    ours = dense(muon(as_it_is(statistics_of(gradient, torch.eye(12), torch.eye(24))), None))
    # torch's five Newton-Schulz iterations leave singular values between about 0.7 and 1.2, in bf16.
    assert float(torch.nn.functional.cosine_similarity(-weight.flatten(), ours.flatten(), dim=0)) > 0.95


def test_sign_is_torchs_first_step_of_adam() -> None:
    gradient = torch.tensor([3.0, -1e-3, 1e-8, 0.0])
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = gradient.clone()
    torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0).step()
    assert torch.allclose(sign(gradient), -weight.detach(), atol=1e-6)


def test_diagonal_and_dense_factors_agree_where_the_covariances_are_diagonal() -> None:
    draw = torch.Generator().manual_seed(12)
    a, s = torch.rand(5, generator=draw) + 0.1, torch.rand(4, generator=draw) + 0.1
    gradient = torch.randn(4, 5, generator=draw)
    full = whiten(statistics_of(gradient, torch.diag(a), torch.diag(s)), DAMPING)
    thin = whiten(statistics_of(gradient, a, s), DAMPING)
    for rule in (kfac, kfac_muon, kfac_schatten):
        for rank in (2, None):
            assert_close(rule(thin, rank), dense(rule(full, rank)).double())


def test_a_direction_may_name_its_rank() -> None:
    assert (rule_of("kfac:8"), rank_of("kfac:8")) == ("kfac", 8)
    assert (rule_of("kfac"), rank_of("kfac")) == ("kfac", None)


@pytest.mark.parametrize("rule", sorted(WHITENED))
@pytest.mark.parametrize("rank", [3, None])
def test_blocks_on_the_diagonal_give_what_the_whole_matrix_gives(rule: str, rank: int | None) -> None:
    record = random_statistics(6, 12, seed=1)
    blocks = record.input_covariance.unflatten(0, (3, 4)).unflatten(2, (3, 4))[[0, 1, 2], :, [0, 1, 2]]
    outer = record.output_grad_covariance.unflatten(0, (2, 3)).unflatten(2, (2, 3))[[0, 1], :, [0, 1]]
    found, expected = (
        DIRECTIONS[rule](whiten(statistics_of(record.gradient, a, s), 0.1), rank)
        for a, s in ((blocks, outer), (torch.block_diag(*blocks), torch.block_diag(*outer)))
    )
    found, expected = (one.dense() if isinstance(one, LowRank) else one for one in (found, expected))
    assert relative_difference(found, expected) < 1e-5
