"""Plain records that a method hands to the step: which layers move, and how an update is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRank:
    """A matrix kept as a product, `left @ right`.

    Args:
        left: `(d_out, r)`.
        right: `(r, d_in)`.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The product, `(d_out, d_in)`."""
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm of the product, without forming it: ‖LR‖² = ⟨LᵀL, RRᵀ⟩."""
        squared = ((self.left.T @ self.left) * (self.right @ self.right.T)).sum()
        return float(squared.clamp_min(0).sqrt())

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)

    def plus(self, other: LowRank) -> LowRank:
        """The sum, with the ranks added: nothing is lost yet."""
        return LowRank(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right], 0))

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """The nearest matrix of at most `rank`, and the share of the squared norm that it loses.

        QR of both factors and an SVD of the small core, so the cost does not depend on `d_out · d_in`.
        """
        if self.rank <= rank:
            return self, 0.0
        q_left, r_left = torch.linalg.qr(self.left.double())
        q_right, r_right = torch.linalg.qr(self.right.double().T)
        u, sigma, vt = torch.linalg.svd(r_left @ r_right.T)
        energy = sigma.square()
        lost = float(energy[rank:].sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny))
        left = (q_left @ u[:, :rank]) * sigma[:rank]
        return LowRank(left.to(self.left.dtype), (vt[:rank] @ q_right.T).to(self.right.dtype)), lost


@dataclass(frozen=True)
class Layer:
    """A linear layer y = W x that an update can be written to.

    Args:
        name: Its name in the model.
        module: The module whose input is x and whose output is y.
        shape: `(d_out, d_in)` of W.
        weight_norm: Frobenius norm of W as it stands: it sets the scale at which a step is tried first.
        rank: The largest rank of an update that can be written.
        read: Returns what has been written so far as a product, or None where nothing has.
        write: Makes the layer's whole update this product; returns the share of its energy that did not fit.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    weight_norm: float
    rank: int
    read: Callable[[], LowRank | None]
    write: Callable[[LowRank], float]
