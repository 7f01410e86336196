"""What a head's fit minimises, as a function of the head; and how the minimiser follows the features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onestep_peft.tasks import Task

#: Weight `(outputs, d)` and offset `(outputs,)`, for standardised features.
Solution = tuple[Tensor, Tensor]
# What is left of a linear system, by its right side, at which it counts as solved; and the most steps to there.
SOLVED, STEPS_MAX = 1e-6, 300
# A feature that varies by less than this share of what half of them do is as good as constant: a step that moves it is
# divided by next to nothing, and would outweigh all others.
FLAT = 1e-3


class Problem:
    """The mean loss of some items and a ridge penalty, as a function of a head; in standardised features and float64.

    Args:
        x: `(items, d)`.
        labels: `(items,)`, or `(items, outputs)`; all of them known.
        task: Gives each item's loss.
        bias: Whether the head has a bias.
    """

    def __init__(self, x: Tensor, labels: Tensor, task: Task, bias: bool) -> None:
        self._labels, self._task, self._bias = labels, task, bias
        self._mean, self._scale = self._standard(x.double())
        self._z = (x.double() - self._mean) / self._scale

    def _standard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By feature what is taken off, and what the rest is divided by."""
        mean = x.mean(0) if self._bias else torch.zeros_like(x[0])
        return mean, (x - mean).square().mean(0).clamp_min(1e-12).sqrt()

    def zero(self, outputs: int) -> Solution:
        """The head that says nothing."""
        return self._z.new_zeros(outputs, self._z.shape[1]), self._z.new_zeros(outputs)

    def standardised(self, weight: Tensor, bias: Tensor | None) -> Solution:
        """A layer's weight and bias as a solution."""
        weight = weight.double()
        offset = weight @ self._mean + bias if bias is not None else weight.new_zeros(len(weight))
        return weight * self._scale, offset

    def installed(self, solution: Solution) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for features as they are."""
        weight, offset = solution
        weight = weight / self._scale
        return weight, offset - weight @ self._mean if self._bias else None

    def loss(self, solution: Solution, x: Tensor, labels: Tensor) -> float:
        """Mean loss of other items."""
        return float(self._losses(solution, (x.double() - self._mean) / self._scale, labels).mean())

    def _losses(self, solution: Solution, z: Tensor, labels: Tensor) -> Tensor:
        weight, offset = solution
        return self._task.row_losses(z @ weight.T + offset, labels)

    def _objective(self, solution: Solution, z: Tensor, penalty: float) -> Tensor:
        return self._losses(solution, z, self._labels).mean() + penalty / 2 * solution[0].square().sum()

    def _free(self, solution: Solution) -> list[Tensor]:
        """What of a solution may vary."""
        return list(solution) if self._bias else [solution[0]]

    def minimised(self, start: Solution, penalty: float, tolerance: float) -> Solution:
        """By L-BFGS from a start, until no entry of the gradient is above the tolerance."""
        weight, offset = start[0].clone().requires_grad_(), start[1].clone().requires_grad_(self._bias)
        solver = torch.optim.LBFGS(
            self._free((weight, offset)),
            max_iter=300,
            history_size=20,
            tolerance_grad=tolerance,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = self._objective((weight, offset), self._z, penalty)
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        return weight.detach(), offset.detach()

    def pull(self, solution: Solution, penalty: float, x: Tensor, labels: Tensor) -> Tensor:
        """How the summed loss of other items, at the head that these ones give, changes with these ones' features.

        The minimiser w of L(w; x) moves with x so that ∇L(w; x) stays zero. With H v = ∂ℓ/∂w, H the Hessian of L, the
        derivative of ℓ(w(x); x) is that of ℓ − ⟨∇L, v⟩ at a fixed w and v. Sources: Bertinetto et al.,
        "Meta-learning with differentiable closed-form solvers", ICLR 2019; Lorraine, Vicol & Duvenaud, "Optimizing
        millions of hyperparameters by implicit differentiation", AISTATS 2020.

        Args:
            solution: The minimiser at this penalty.
            x: `(others, d)`.
            labels: `(others,)`, or `(others, outputs)`.

        Returns:
            `(items, d)`; zero for features that are all but constant.
        """
        here = (self._z * self._scale + self._mean).requires_grad_()
        weight, offset = solution[0].clone().requires_grad_(), solution[1].clone().requires_grad_(self._bias)
        free = self._free((weight, offset))
        with torch.enable_grad():
            mean, scale = self._standard(here)
            objective = self._objective((weight, offset), (here - mean) / scale, penalty)
            gradient = torch.autograd.grad(objective, free, create_graph=True)
            loss = self._losses((weight, offset), (x.double() - mean) / scale, labels).sum()
            slopes = torch.autograd.grad(loss, free, retain_graph=True)
            v = _solved(gradient, free, slopes)
            whole = loss - sum((one * by).sum() for one, by in zip(gradient, v, strict=True))
            (pulled,) = torch.autograd.grad(whole, here)
        return pulled * (self._scale > FLAT * self._scale.median())


def _solved(gradient: Sequence[Tensor], free: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """v with H v = right, H the derivative of the gradient, by conjugate gradients."""

    def times_hessian(v: Tensor) -> Tensor:
        parts = [part.view_as(one) for part, one in zip(v.split(sizes), free, strict=True)]
        return _flat(torch.autograd.grad(gradient, free, parts, retain_graph=True))

    sizes = [one.numel() for one in right]
    residual = _flat(right)
    v, direction, square = torch.zeros_like(residual), residual, residual.square().sum()
    enough = SOLVED**2 * square
    for _ in range(STEPS_MAX):
        if not square > enough:
            break
        image = times_hessian(direction)
        step = square / (direction @ image)
        v, residual = v + step * direction, residual - step * image
        before, square = square, residual.square().sum()
        direction = residual + square / before * direction
    return [part.view_as(one) for part, one in zip(v.split(sizes), free, strict=True)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
