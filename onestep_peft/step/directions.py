"""Rules that turn a layer's statistics into a direction of descent.

Every rule returns D with ⟨G, D⟩ ≥ 0; the update is ΔW = −η D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onestep_peft.step.layers import LowRank


class Moments(Protocol):
    """What a pass knows of a matrix: its mean gradient `(m, n)`, and how the gradients of the rows vary on both sides.

    A layer's are those of δ and x, whose products its gradients are. Any multiple of them does: damping is relative.
    """

    gradient: Tensor

    @property
    def output_grad_covariance(self) -> Tensor: ...

    @property
    def input_covariance(self) -> Tensor: ...


# Below this share of the largest singular value a singular pair is too close to fp32's rounding in the gradient: a
# polar factor would lift it to the rank of a signal, and it would differ from one batch size to the next.
SINGULAR_CUTOFF = 1e-2
# At half the cutoff a pair has 1/257 of its weight, at twice the cutoff all but that.
STEEPNESS = 8
# What float64 resolves of singular values through a Gram matrix.
RESOLUTION = 1e-8
ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class WhitenedGradient:
    """The gradient in the coordinates in which both covariances are the identity.

    With S = L_S L_Sᵀ and A = L_A L_Aᵀ (Cholesky, damped), L_S⁻¹ G L_A⁻ᵀ = U Σ Vᵀ. Any square root gives the same
    directions: L = S^½ Q with Q orthogonal, and Q cancels on the way back. So no eigendecomposition is needed.

    Args:
        output_root: L_S, `(d_out, d_out)`, lower triangular; `(blocks, d, d)`, d = d_out / blocks, for blocks on the
            diagonal; `(d_out,)` for a diagonal; None for the identity.
        input_root: L_A in the same way, of d_in.
        white: L_S⁻¹ G L_A⁻ᵀ, `(d_out, d_in)`, float64.
    """

    output_root: Tensor | None
    input_root: Tensor | None
    white: Tensor

    @classmethod
    def of(cls, gradient: Tensor, output_root: Tensor | None, input_root: Tensor | None) -> WhitenedGradient:
        """Of a gradient as it is, `(d_out, d_in)`."""
        half = solve(output_root, gradient.double())
        return cls(output_root, input_root, solve(input_root, half.T).T)

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Singular vectors of the shorter side, `(min(d_out, d_in), k)`, and σ `(k,)`, falling."""
        return _leading_spectrum(self._wide)

    @property
    def _wide(self) -> Tensor:
        """The matrix, or its transpose, with the shorter side first."""
        return self.white if self.white.shape[0] <= self.white.shape[1] else self.white.T

    def svd(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U `(d_out, k)`, σ `(k,)`, falling, and Vᵀ `(k, d_in)`, of the first `rank` singular pairs.

        The longer side's vectors follow from the shorter side's: ΣVᵀ = UᵀM is exact however small σ is.
        """
        vectors, sigma = (part[..., :rank] for part in self._spectrum)
        others = (vectors.T @ self._wide) / sigma[:, None]  # (k, longer side)
        return (vectors, sigma, others) if self._wide is self.white else (others.T, sigma, vectors.T)

    @property
    def sigma(self) -> Tensor:
        return self._spectrum[1]

    def back(self, sigma: Tensor, rank: int | None) -> LowRank:
        """L_S⁻ᵀ U diag(sigma) Vᵀ L_A⁻¹, cut to the first `rank` singular pairs, in fp32."""
        u, _, vt = self.svd(rank)
        left = solve_transposed(self.output_root, u * sigma[:rank])
        right = solve_transposed(self.input_root, vt.T).T
        return LowRank(left.float(), right.float())

    def whole(self) -> Tensor:
        """L_S⁻ᵀ L_S⁻¹ G L_A⁻ᵀ L_A⁻¹, `(d_out, d_in)`, in fp32."""
        return solve_transposed(self.input_root, solve_transposed(self.output_root, self.white).T).T.float()


# A root is a diagonal, `(d,)`, a whole triangular matrix, `(d, d)`, or blocks of one on the diagonal, `(blocks, d, d)`.
# It may have leading dimensions, as many as what it is applied to, `(..., d, k)`.


def _kind(root: Tensor, right: Tensor) -> int:
    """1 for a diagonal, 2 for a whole matrix, 3 for blocks."""
    return root.dim() - (right.dim() - 2)


def solve(root: Tensor | None, right: Tensor) -> Tensor:
    """L⁻¹ right."""
    if root is None:
        return right
    return right / root[..., None] if _kind(root, right) == 1 else _solve_blocks(root, right, upper=False)


def solve_transposed(root: Tensor | None, right: Tensor) -> Tensor:
    """L⁻ᵀ right."""
    if root is None or _kind(root, right) == 1:
        return solve(root, right)
    return _solve_blocks(root.mT, right, upper=True)


def _solve_blocks(triangular: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    if _kind(triangular, right) == 2:
        return torch.linalg.solve_triangular(triangular, right, upper=upper)
    by_block = right.unflatten(-2, triangular.shape[-3:-1])
    return torch.linalg.solve_triangular(triangular, by_block, upper=upper).flatten(-3, -2)


def times_transposed(root: Tensor | None, right: Tensor) -> Tensor:
    """Lᵀ right."""
    if root is None:
        return right
    kind = _kind(root, right)
    if kind == 1:
        return right * root[..., None]
    return (root.mT @ right.unflatten(-2, root.shape[-3:-1])).flatten(-3, -2) if kind == 3 else root.mT @ right


def damped_root(covariance: Tensor, damping: float, size: int = 1) -> Tensor:
    """Cholesky factor of `covariance + damping · (its mean eigenvalue) · I`, in float64, of the covariance's shape.

    Where rounding leaves the matrix indefinite the damping is raised tenfold, at most six times. Blocks on the
    diagonal, `(blocks, d, d)`, are damped alike. A diagonal, `(d,)`, has the root of its entries; so has a trace, `()`,
    that stands for a multiple of the identity.

    Args:
        size: d, where only the trace is known.
    """
    matrix = covariance.to(torch.float64, copy=True)
    if matrix.dim() == 0:
        matrix = (matrix / size).expand(size)
    if matrix.dim() == 1:
        return (matrix + damping * matrix.mean()).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean_eigenvalue = diagonal.mean()
    added = torch.zeros_like(mean_eigenvalue)
    for _ in range(6):
        # In place: another d x d matrix or two would take longer to fill than a third of the factorisation.
        diagonal.add_(damping * mean_eigenvalue - added)
        added = damping * mean_eigenvalue
        root, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.any() and bool(mean_eigenvalue.isfinite()):
            return root
        damping = max(damping * 10, 1e-8)
    raise ValueError(
        f"A layer's covariance ({' x '.join(map(str, matrix.shape))}) has no Cholesky factor even with damping "
        f"{damping:g}: its entries are not finite, or the rows give no gradient. Check the rows, or raise `damping`."
    )


def _leading_spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U `(m, k)` and σ `(k,)` of a float64 matrix `(m, n)`, m ≤ n, cut at `RESOLUTION`.

    Through the Gram matrix of its rows, several times faster than an SVD of the matrix itself.
    """
    eigenvalues, vectors = torch.linalg.eigh(matrix @ matrix.T)
    sigma = eigenvalues.flip(0).clamp_min(0).sqrt()
    keep = sigma > RESOLUTION * sigma[0]
    return vectors.flip(1)[:, keep], sigma[keep]


def whiten(statistics: Moments, damping: float) -> WhitenedGradient:
    """Whitens a gradient, each covariance damped by `damping` times its mean eigenvalue."""
    d_out, d_in = statistics.gradient.shape
    output_root = damped_root(statistics.output_grad_covariance, damping, d_out)
    input_root = damped_root(statistics.input_covariance, damping, d_in)
    return WhitenedGradient.of(statistics.gradient, output_root, input_root)


def as_it_is(statistics: Moments) -> WhitenedGradient:
    """A gradient in its own coordinates, for rules that need no covariances."""
    return WhitenedGradient(None, None, statistics.gradient.double())


def kfac(white: WhitenedGradient, rank: int | None) -> LowRank | Tensor:
    """The natural gradient under K-FAC's approximation, (S+λI)⁻¹ G (A+λI)⁻¹.

    At a lower rank it is the nearest such matrix in K-FAC's own metric: the leading singular values are kept, less
    those in the rounding, which taking the whitening back would blow up. At full rank it is exact.
    Source: Martens & Grosse, ICML 2015.
    """
    return white.whole() if rank is None else white.back(white.sigma * _signal(white.sigma), rank)


def lora_one(gradient: WhitenedGradient, rank: int | None) -> LowRank | Tensor:
    """The gradient, or the nearest matrix of this rank to it.

    Source: Zhang, Liu & Chen, "LoRA-One: One-step full gradient could suffice for fine-tuning large language models,
    provably and efficiently", ICML 2025.
    """
    return kfac(gradient, rank)  # K-FAC's rule where both covariances are the identity


def muon(gradient: WhitenedGradient, rank: int | None) -> LowRank:
    """The polar factor U Vᵀ of the gradient, cut to this rank, scaled to a root mean square of 1.

    From singular vectors, where Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, take
    a few Newton-Schulz iterations: for one step, what is exact is cheap enough.
    """
    return kfac_muon(gradient, rank)


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
    """1 for singular values above the cutoff, 0 below; in between steep, but without a jump.

    A singular pair at the cutoff itself must not come and go with the rounding of its singular value.
    """
    return 1 / (1 + (SINGULAR_CUTOFF * sigma[0] / sigma).pow(STEEPNESS))


def _unit_rms(direction: LowRank) -> LowRank:
    entries = direction.left.shape[0] * direction.right.shape[1]
    return direction.scaled(math.sqrt(entries) / direction.norm())


#: Rules for matrices (layers, and prompts), by name.
DIRECTIONS: dict[str, Callable[[WhitenedGradient, int | None], LowRank | Tensor]] = {
    "kfac": kfac,
    "kfac_muon": kfac_muon,
    "kfac_schatten": kfac_schatten,
    "muon": muon,
    "lora_one": lora_one,
}
#: Those that need a layer's covariances.
WHITENED = frozenset({"kfac", "kfac_muon", "kfac_schatten"})


def sgd(gradient: Tensor) -> Tensor:
    """The gradient."""
    return gradient


def sign(gradient: Tensor) -> Tensor:
    """The first step of Adam: g / (|g| + ε), the sign of all that is not tiny.

    Source: Kingma & Ba, "Adam: A method for stochastic optimization", ICLR 2015, with torch's ε = 1e-8.
    """
    return gradient / (gradient.abs() + ADAM_EPSILON)


#: Rules for trainable parameters as they are, whatever layer they belong to, by name.
PARAMETER_DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sgd": sgd, "sign": sign}
#: The rule for a prompt; see `step.natural`.
NATURAL = "natural"


def rule_of(direction: str) -> str:
    """The rule's name in a direction's: "kfac:8" is the rule "kfac" at rank 8."""
    return direction.partition(":")[0]


def rank_of(direction: str) -> int | None:
    """The rank that a direction's name asks for, None where it asks for none."""
    rank = direction.partition(":")[2]
    return int(rank) if rank else None
