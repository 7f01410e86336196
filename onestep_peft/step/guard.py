"""Whether a step may stay: paired losses of held-out rows before and after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """The guard's answer.

    Args:
        accepted: Whether the step stays.
        reason: Why, in a sentence for the report.
        gain: Mean fall of the rows' losses, in nats.
        probability: Share of the resamples in which the mean loss falls, at most 1 − 2⁻ʳᵒʷˢ.
    """

    accepted: bool
    reason: str
    gain: float
    probability: float


def cross_fitted(trials: Sequence[Tensor], folds: int, *, deals: int = 100, seed: int = 0) -> Tensor:
    """Losses of rows at the trial that the *other* rows would have chosen, `(rows,)`.

    Rows that chose a step say too well of it. Here no row judges its own choice, and yet every row both chooses and
    judges, without one more forward: the search has already measured each row at each trial. Where trials are almost
    as good as each other, one deal of the rows into folds may by chance have them choose badly: a row's loss is the
    mean over many deals.

    Args:
        trials: Per trial the losses `(rows,)`; the one before the step among them. One with a loss that is not finite
            is never chosen.
        folds: Rows are dealt into so many.
        deals: How often.
        seed: Of the deals.
    """
    losses = torch.stack([trial.double().cpu() for trial in trials])  # (trials, rows)
    losses[~losses.isfinite().all(1)] = torch.inf  # no trial to choose, for any row
    rows = losses.shape[1]
    folds = min(folds, rows)
    if folds < 2:
        return losses[losses.mean(1).argmin()]
    generator = torch.Generator().manual_seed(seed)
    judged = torch.zeros(rows, dtype=losses.dtype)
    for _ in range(deals):
        fold_of_row = torch.randperm(rows, generator=generator) % folds
        for fold in range(folds):
            held = fold_of_row == fold
            chosen = losses[:, ~held].mean(1).argmin()
            judged[held] += losses[chosen, held]
    return judged / deals


def judge(before: Tensor, after: Tensor, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Verdict:
    """Compares the losses of the same rows before and after a step, one-sided.

    Rows are resampled with replacement (a paired bootstrap). A step that does not lower the mean loss is refused;
    one that does is accepted, and where fewer than `confidence` of the resamples agree the reason says that the
    evidence is weak: on few rows a test that had to be passed would refuse most good steps.

    Args:
        before: `(rows,)`, losses without the step.
        after: `(rows,)`, losses with it.
    """
    rows = before.numel()
    bad = int((~torch.isfinite(after)).sum())
    if bad:
        return Verdict(
            False, f"refused: {bad} of {rows} held-out rows have a loss that is not finite", float("nan"), 0.0
        )
    gains = before.double().cpu() - after.double().cpu()
    gain = float(gains.mean())
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(rows, (resamples, rows), generator=generator)
    # Rows that all gain would make every resample agree, were they only two: no more is known than a sign test says.
    probability = min(float((gains[picks].mean(1) > 0).double().mean()), 1 - 0.5**rows)
    seen = f"{gain:+.4f} nats a row on {rows} held-out rows, a gain in {probability:.1%} of resamples"
    if gain <= 0:
        return Verdict(False, f"refused: the step does not lower the held-out loss ({seen})", gain, probability)
    if probability < confidence:
        return Verdict(True, f"accepted, though the evidence is weak ({seen})", gain, probability)
    return Verdict(True, f"accepted ({seen})", gain, probability)


def surely_worse(one: Tensor, other: Tensor) -> bool:
    """Whether the mean of the first rows' losses is above the second's by more than two standard errors, paired.

    Args:
        one: `(rows,)`.
        other: `(rows,)`, of the same rows.
    """
    excess = one.double() - other.double()
    error = float(excess.std(correction=0)) / math.sqrt(len(excess))
    return not float(excess.mean()) <= 2 * error


def falls_behind(trials: Sequence[Tensor]) -> Callable[[], bool]:
    """Whether what is added to these trials from now on is surely worse than the best of those that are there."""
    found, known = best_trial(trials), len(trials)
    return lambda: surely_worse(best_trial(trials[known:]), found)


def best_trial(trials: Sequence[Tensor]) -> Tensor:
    """The losses of the trial with the lowest mean."""
    return min(trials, key=lambda losses: float(losses.mean().nan_to_num(math.inf)))
