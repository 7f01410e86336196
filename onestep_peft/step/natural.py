"""Gradients of a prompt, row by row: its Fisher matrix as it is, or as the product of two small ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from onestep_peft.step import processes

# Below this share of what the rows' gradients allow, their mean is rounding.
NOISE_FLOOR = 1e-6


class RowGradients:
    """Gradients of a prompt `(n, d)`, one a row, as autograd leaves them at the embedded prompt.

    With p = n · d parameters and as many rows, the Gram matrix `(p, p)` takes as much room as the rows themselves;
    with fewer rows the rows are kept, and their Gram matrix `(rows, rows)` does the same service (Woodbury). So rows
    are kept until there are p of them, and are then folded into the matrix.

    Attributes:
        gradient: After `finish`: the mean over the items, `(n, d)`.
        covers: Not used: what is known of the rows' gradients comes from all of them.
    """

    covers = True

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self._tokens, self._width = shape
        size = self._tokens * self._width
        self.gradient = torch.zeros(shape, device=device)
        self._rows = torch.zeros(0, size, device=device)
        self._gram: Tensor | None = None
        self._items = 0.0

    def sums(self) -> dict[str, Tensor]:
        """The sum of the rows' gradients, and what is known of their second moments."""
        kept = {"gram": self._gram} if self._gram is not None else {"rows": self._rows}
        return {"gradient": self.gradient, **kept}

    def reset(self) -> None:
        """Empties the sums for the next pass."""
        self.gradient.zero_()
        self._rows, self._gram = self._rows[:0].clone(), None

    @torch.no_grad()
    def add(self, x: Tensor, delta: Tensor) -> None:
        """Adds a micro-batch: δ `(rows, tokens, d)` at the embedded inputs, the virtual tokens first."""
        rows = delta[:, : self._tokens].float().flatten(1)  # (rows, p)
        self.gradient += rows.sum(0).view_as(self.gradient)
        if self._gram is not None:
            self._gram.addmm_(rows.T, rows)
            return
        self._rows = torch.cat([self._rows, rows])
        if len(self._rows) > self._rows.shape[1]:
            self.fold()

    def fold(self) -> None:
        """Turns kept rows into their Gram matrix, `(p, p)`."""
        if self._gram is None:
            self._gram = self._rows.T @ self._rows
            self._rows = self._rows[:0].clone()

    def load(self, sums: Mapping[str, Tensor]) -> None:
        """Takes over what `sums` returned."""
        self.gradient.copy_(sums["gradient"])
        self._gram = sums["gram"].to(self.gradient.device) if "gram" in sums else None
        if "rows" in sums:
            self._rows = sums["rows"].to(self.gradient.device)

    def reduce(self) -> None:
        """Adds up the sums of all processes. All of them keep rows, or all of them a Gram matrix."""
        processes.sum_over([self.gradient])
        folded = torch.tensor([float(self._gram is not None)], device=self.gradient.device)
        processes.sum_over([folded])
        if float(folded) == 0:
            self._rows = processes.gathered(self._rows)
            return
        self.fold()
        assert self._gram is not None
        processes.sum_over([self._gram])

    def finish(self, items: float, covered: float | None = None) -> None:
        """Turns the sums into means over `items` rows (or labelled tokens)."""
        self.gradient /= items
        self._items = items

    def is_noise(self) -> bool:
        """Whether the mean is so far below the rows' gradients that only rounding is left in it."""
        total = self._gram.trace() if self._gram is not None else self._rows.square().sum()
        return not bool(self.gradient.norm() > NOISE_FLOOR * (total / max(self._items, 1.0)).sqrt())

    @property
    def output_grad_covariance(self) -> Tensor:
        """How the rows' gradients vary along the virtual tokens: (1/N) Σ g_i g_iᵀ, `(n, n)`."""
        return self._along("ntd,nsd->ts", "tdsd->ts") / self._items

    @property
    def input_covariance(self) -> Tensor:
        """How they vary along the width: Σ g_iᵀ g_i, `(d, d)`, divided by its trace.

        The product of the two, for the Fisher matrix, has the same trace. Fewer rows than it has columns leave that
        matrix unknown in most directions; these two they do tell. Source: Gupta, Koren & Singer, "Shampoo:
        Preconditioned Stochastic Tensor Optimization", ICML 2018.
        """
        total = self._along("ntd,nte->de", "tdte->de")
        return total / total.trace()

    def _along(self, of_rows: str, of_gram: str) -> Tensor:
        """Sums products of the rows' entries, in either form in which they are kept."""
        if self._gram is not None:
            sides = self._tokens, self._width
            return torch.einsum(of_gram, self._gram.view(*sides, *sides))
        rows = self._rows.view(-1, self._tokens, self._width)
        return torch.einsum(of_rows, rows, rows)

    def natural(self, damping: float) -> Tensor:
        """(F + μI)⁻¹ g, `(n, d)`, with F = (1/N) Σ g_i g_iᵀ over the rows and μ = `damping` · (F's mean eigenvalue).

        Exact either way: with R the rows' gradients `(rows, p)`, Woodbury's identity gives
        (F + μI)⁻¹ g = (g − Rᵀ (NμI + RRᵀ)⁻¹ R g) / μ. Source: Amari, "Natural gradient works efficiently in
        learning", 1998; F is the empirical Fisher, from the data's own labels.

        Raises:
            ValueError: The rows' gradients are not finite.
        """
        g = self.gradient.double().flatten()
        if self._gram is not None:
            fisher = self._gram.double() / self._items
            return _solved(fisher, damping * fisher.trace() / len(g), g).view_as(self.gradient).float()
        rows = self._rows.double()
        mu = damping * rows.square().sum() / self._items / len(g)
        inner = _solved(rows @ rows.T, self._items * mu, rows @ g)
        return ((g - rows.T @ inner) / mu).view_as(self.gradient).float()


def _solved(matrix: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    """(matrix + shift · I)⁻¹ right, for a positive semi-definite matrix, in float64."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    root, failed = torch.linalg.cholesky_ex(matrix + shift * identity)
    if failed:
        raise ValueError(
            "The Fisher matrix of the prompt has no Cholesky factor: the rows' gradients are not finite, or `damping` "
            "is too small. Raise `damping`."
        )
    return torch.cholesky_solve(right[:, None], root)[:, 0]
