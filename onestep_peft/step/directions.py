"""Rules that turn a layer's statistics into a direction of descent.

Every rule returns D with ⟨G, D⟩ ≥ 0; the update is ΔW = −η D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onestep_peft.step.layers import LowRank
from onestep_peft.step.statistics import LayerStatistics

# Below this share of the largest singular value a singular pair is too close to fp32's rounding in the gradient: a
# polar factor would lift it to the rank of a signal, and it would differ from one batch size to the next.
SINGULAR_CUTOFF = 1e-2
# What float64 resolves of singular values through a Gram matrix.
RESOLUTION = 1e-8


@dataclass(frozen=True)
class WhitenedGradient:
    """The gradient in the coordinates in which both covariances are the identity.

    With S = L_S L_Sᵀ and A = L_A L_Aᵀ (Cholesky, damped), L_S⁻¹ G L_A⁻ᵀ = U Σ Vᵀ. Any square root gives the same
    directions: L = S^½ Q with Q orthogonal, and Q cancels on the way back. So no eigendecomposition is needed.

    Args:
        output_root: L_S, `(d_out, d_out)`, lower triangular.
        input_root: L_A, `(d_in, d_in)`, lower triangular.
        u: `(d_out, k)`.
        sigma: `(k,)`, falling.
        vt: `(k, d_in)`.
    """

    output_root: Tensor
    input_root: Tensor
    u: Tensor
    sigma: Tensor
    vt: Tensor

    def back(self, sigma: Tensor, rank: int | None) -> LowRank:
        """L_S⁻ᵀ U diag(sigma) Vᵀ L_A⁻¹, cut to the first `rank` singular pairs, in fp32."""
        left = torch.linalg.solve_triangular(self.output_root.T, self.u[:, :rank] * sigma[:rank], upper=True)
        right = torch.linalg.solve_triangular(self.input_root, self.vt[:rank], upper=False, left=False)
        return LowRank(left.float(), right.float())


def damped_root(covariance: Tensor, damping: float) -> Tensor:
    """Cholesky factor of `covariance + damping · (its mean eigenvalue) · I`, in float64, `(d, d)`.

    Where rounding leaves the matrix indefinite the damping is raised tenfold, at most six times.
    """
    matrix = covariance.double()
    d = matrix.shape[0]
    mean_eigenvalue = matrix.trace() / d
    identity = torch.eye(d, dtype=matrix.dtype, device=matrix.device)
    for _ in range(6):
        root, failed = torch.linalg.cholesky_ex(matrix + damping * mean_eigenvalue * identity)
        if not failed:
            return root
        damping = max(damping * 10, 1e-8)
    raise ValueError(
        f"A layer's covariance ({d} x {d}) has no Cholesky factor even with damping {damping:g}: its entries are "
        "not finite, or the rows give no gradient. Check the rows, or raise `damping`."
    )


def _leading_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `(m, k)`, σ `(k,)`, Vᵀ `(k, n)` of a float64 matrix, cut at `RESOLUTION`.

    Through the smaller Gram matrix, several times faster than an SVD of the matrix itself. ΣVᵀ = UᵀM is exact
    however small σ is.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, sigma, ut = _leading_svd(matrix.T)
        return ut.T, sigma, v.T
    eigenvalues, vectors = torch.linalg.eigh(matrix @ matrix.T)
    sigma = eigenvalues.flip(0).clamp_min(0).sqrt()
    keep = sigma > RESOLUTION * sigma[0]
    u = vectors.flip(1)[:, keep]
    sigma = sigma[keep]
    return u, sigma, (u.T @ matrix) / sigma[:, None]


def whiten(statistics: LayerStatistics, damping: float) -> WhitenedGradient:
    """Whitens a layer's gradient, each covariance damped by `damping` times its mean eigenvalue."""
    output_root = damped_root(statistics.output_grad_covariance, damping)
    input_root = damped_root(statistics.input_covariance, damping)
    half = torch.linalg.solve_triangular(output_root, statistics.gradient.double(), upper=False)
    white = torch.linalg.solve_triangular(input_root, half.T, upper=False).T  # (d_out, d_in)
    return WhitenedGradient(output_root, input_root, *_leading_svd(white))


def kfac(white: WhitenedGradient, rank: int | None) -> LowRank:
    """The natural gradient under K-FAC's approximation, (S+λI)⁻¹ G (A+λI)⁻¹.

    At a lower rank it is the nearest such matrix in K-FAC's own metric: the leading singular values are kept, less
    those in the rounding, which taking the whitening back would blow up. At full rank it is exact.
    Source: Martens & Grosse, ICML 2015.
    """
    return white.back(white.sigma if rank is None else white.sigma * _signal(white.sigma), rank)


def kfac_schatten(white: WhitenedGradient, rank: int | None) -> LowRank:
    """Between `kfac` and `kfac_muon`: S^-½ U Σ^½ Vᵀ A^-½, scaled to a root mean square of 1.

    The steepest descent under the Schatten-3 norm in K-FAC's coordinates: there ⟨G, D⟩ is largest for singular values
    σ^½, as it is for σ under the Frobenius norm (`kfac`) and for 1 under the spectral norm (`kfac_muon`).
    """
    return _unit_rms(white.back(white.sigma.sqrt() * _signal(white.sigma), rank))


def kfac_muon(white: WhitenedGradient, rank: int | None) -> LowRank:
    """The polar factor of the whitened gradient, taken back: S^-½ U Vᵀ A^-½, scaled to a root mean square of 1.

    Of all updates of spectral norm at most 1 in K-FAC's coordinates (and of this rank) it gains the most to first
    order. The root mean square makes the layers weigh alike. Sources: Martens & Grosse, ICML 2015; Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    return _unit_rms(white.back(_signal(white.sigma), rank))


def _signal(sigma: Tensor) -> Tensor:
    """1 for singular values above the cutoff, 0 below."""
    return (sigma > SINGULAR_CUTOFF * sigma[0]).to(sigma.dtype)


def _unit_rms(direction: LowRank) -> LowRank:
    entries = direction.left.shape[0] * direction.right.shape[1]
    return direction.scaled(math.sqrt(entries) / direction.norm())


#: Rules that need the covariances of a layer, by name. `sgd` needs none: it moves the parameters themselves.
DIRECTIONS: dict[str, Callable[[WhitenedGradient, int | None], LowRank]] = {
    "kfac": kfac,
    "kfac_muon": kfac_muon,
    "kfac_schatten": kfac_schatten,
}
