"""Plain records that a method hands to the step: which layers move, and how an update is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

#: How a covariance is kept: whole, its diagonal, only its trace, or not at all since the variable is always 1.
Factor = Literal["dense", "diagonal", "trace", "one"]

#: What of a model goes as far as what: see `Candidate`.
Part = Literal["weights", "vectors", "embeddings"]
PARTS: tuple[Part, ...] = ("weights", "vectors", "embeddings")


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
    """A layer y = W x that a direction moves.

    A linear layer takes dense factors. An embedding is a linear layer whose inputs are unit vectors, so their
    covariance is a diagonal of frequencies. A bias is a layer whose only input is 1; so is the gain of a
    normalisation, whose inputs have been brought to a mean square of 1.

    An update is written either as a product (`read` and `write`, for LoRA) or into the weight itself (`parameter`).

    Args:
        name: Its name in the model.
        module: The module whose input is x and whose output is y.
        shape: `(d_out, d_in)` of W.
        weight_norm: Frobenius norm of W as it stands: it sets the scale at which a step is tried first.
        rank: The largest rank of an update that can be written; None where any can.
        read: Returns what has been written so far as a product, or None where nothing has.
        write: Makes the layer's whole update this product; returns the share of its energy that did not fit.
        input_factor: How E[x xᵀ] is kept.
        output_factor: How E[δ δᵀ] is kept.
        parameter: Returns the parameter that holds W. Asked for anew each time: sharding swaps parameters.
        as_matrix: The view of such a parameter (or of its gradient) that is W, `(d_out, d_in)`.
        shared_with: Further modules that apply the same W, and are observed with this one.
        part: With which layers it shares a step size.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    weight_norm: float
    rank: int | None
    read: Callable[[], LowRank | None] | None = None
    write: Callable[[LowRank], float] | None = None
    input_factor: Factor = "dense"
    output_factor: Factor = "dense"
    parameter: Callable[[], Tensor] | None = None
    as_matrix: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    shared_with: Sequence[nn.Module] = ()
    part: Part = "weights"


@dataclass(frozen=True)
class Prompt:
    """Virtual tokens before every row's own, `(n, d)`, all of them one vector to the step.

    Args:
        name: Its name in the model.
        module: The module that takes `inputs_embeds`, the virtual tokens first.
        shape: `(n, d)`.
        parameter: Returns the parameter, `(n, d)`.
        vocabulary: Returns the embeddings of real tokens, `(tokens, d)`; None for the parameter itself.
        rank: The largest rank of an update that can be written: any.
        part: With what it shares a step size.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    parameter: Callable[[], Tensor]
    vocabulary: Callable[[], Tensor] | None = None
    rank: int | None = None
    part: Part = "weights"
