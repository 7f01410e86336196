"""Small steps of updates that are products: down the natural gradient, on the manifold of matrices of their rank.

The gradient is projected onto the tangent space where the update stands, and the sum is cut to the rank again, both in
K-FAC's metric. Source: Vandereycken, "Low-rank matrix completion by Riemannian optimization", SIAM Journal on
Optimization 23, 2013 (the manifold, its tangent space and the way back to it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onestep_peft.step.directions import solve, solve_transposed, times_transposed
from onestep_peft.step.layers import LowRank

# On a GPU layers that are alike move together, as many as have so many numbers in their gradients and roots: for
# small ones it would wait. On the CPU each moves alone.
TOGETHER = 64_000_000


@dataclass(frozen=True)
class ProductStep:
    """What one step of one layer goes by; all in one precision: fp32 will do, the roots are damped.

    Args:
        update: W = L R, of the rank that it is to keep.
        gradient: G, `(d_out, d_in)`.
        output_root: L_S, as in `WhitenedGradient`.
        input_root: L_A.
        length: Frobenius norm of the step in white coordinates, `()`.
    """

    update: LowRank
    gradient: Tensor
    output_root: Tensor
    input_root: Tensor
    length: Tensor


def along_the_products(steps: Sequence[ProductStep]) -> list[LowRank]:
    """The updates after a step down the natural gradient each, on the manifold of matrices of their rank.

    With M = L_Sᵀ W L_A (the same in white coordinates), Γ = L_S⁻¹ G L_A⁻ᵀ, P and Q the projectors on M's column and row
    space, and T = PΓ + ΓQ − PΓQ: M ← M − length · T / ‖T‖, cut to M's rank. G is the only `(d_out, d_in)` matrix.
    """
    room = TOGETHER if any(step.gradient.device.type != "cpu" for step in steps) else 0
    found: dict[int, LowRank] = {}
    for places in _alike(steps, room):
        found |= zip(places, _together([steps[place] for place in places]), strict=True)
    return [found[place] for place in range(len(steps))]


def rate_of(length: Tensor, norm: Tensor) -> Tensor:
    """By what a direction of this norm is multiplied to be so long; 0 for one that is zero."""
    return torch.where(norm > 0, length / norm, 0.0)


def _alike(steps: Sequence[ProductStep], room: int) -> Iterator[list[int]]:
    """The places of steps that can be made together: of one shape, and of so many numbers at most, unless it is one."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, step in enumerate(steps):
        roots = step.output_root, step.input_root
        key = (step.gradient.device, *(tensor.shape for tensor in (step.update.left, step.update.right, *roots)))
        numbers = step.gradient.numel() + sum(root.numel() for root in roots)
        group = groups.setdefault(key, [])
        group.append(place)
        if (len(group) + 1) * numbers > room:
            yield groups.pop(key)
    yield from groups.values()


def _together(steps: Sequence[ProductStep]) -> list[LowRank]:
    """The same for steps of one shape: all tensors have a dimension more, the first."""
    output_root = _all([step.output_root for step in steps])
    input_root = _all([step.input_root for step in steps])
    left, right = _all([step.update.left for step in steps]), _all([step.update.right for step in steps]).mT
    gradient, length, rank = _all([step.gradient for step in steps]), _all([s.length for s in steps]), left.shape[2]
    u, sigma, v, ranks = _spectrum(times_transposed(output_root, left), times_transposed(input_root, right))
    across = solve(output_root, gradient @ solve_transposed(input_root, v))  # ΓV, (n, d_out, k)
    down = solve(input_root, gradient.mT @ solve_transposed(output_root, u))  # ΓᵀU, (n, d_in, k)
    beside = across - u @ (u.mT @ across)
    norm = (down.square().sum((1, 2)) + beside.square().sum((1, 2))).sqrt()
    rate = rate_of(length, norm).to(norm)[:, None, None]
    u, sigma, v, least = _spectrum(
        torch.cat([u, -rate * beside], 2), torch.cat([v * sigma[:, None] - rate * down, v], 2)
    )
    left = solve_transposed(output_root, (u * sigma[:, None])[..., :rank])
    right = solve_transposed(input_root, v[..., :rank])
    kept = torch.minimum(ranks, least).tolist()
    return [LowRank(one[:, :k], other[:, :k].T) for one, other, k in zip(left, right, kept, strict=True)]


def _spectrum(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U `(n, a, k)`, σ `(n, k)`, falling, and V `(n, b, k)` of left rightᵀ = U diag(σ) Vᵀ, from `(n, a, k)` and
    `(n, b, k)`; and the ranks, `(n,)`, on the CPU: what lies behind them is zero.

    By way of the Gram matrices: what is decomposed is `(k, k)`, and the CPU is done with it before a GPU has begun.
    """
    wide = left.double(), right.double()
    grams = torch.stack([one.mT @ one for one in wide], 1).cpu()
    lengths = grams.diagonal(dim1=2, dim2=3).sqrt()  # columns of one length: squares would drown the short ones
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    energy, vectors = torch.linalg.eigh(grams * scale[..., None] * scale[..., None, :])
    real, root = energy > torch.finfo(energy.dtype).eps * energy.shape[-1], energy.clamp_min(0).sqrt()
    down = root[..., None] * vectors.mT * lengths[..., None, :]  # left = (left · up) · down, the first part orthonormal
    up = scale[..., None] * vectors * torch.where(real, 1 / root, 0.0)[..., None, :]
    a, sigma, bt = torch.linalg.svd(down[:, 0] @ down[:, 1].mT)
    keep = sigma > torch.finfo(torch.float32).eps * max(left.shape[1], right.shape[1]) * sigma[:, :1]
    sides = [up[:, i] @ (side * keep[:, None]) for i, side in enumerate((a, bt.mT))]
    u, v = ((one @ side.to(one.device)).to(left.dtype) for one, side in zip(wide, sides, strict=True))
    return u, (sigma * keep).to(left), v, keep.sum(1)


def _all(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
