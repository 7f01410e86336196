"""The guard on evidence that is plain, absent, broken or weak."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from onestep_peft.step.guard import cross_fitted, judge, surely_worse


def losses(rows: int, seed: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed))


def naive_cross_fit(trials: list[list[float]], fold_of_row: list[int]) -> list[float]:
    """Row by row: the mean over all rows of other folds chooses, the row's own loss is read off."""
    rows = len(trials[0])
    result = []
    for row in range(rows):
        others = [i for i in range(rows) if fold_of_row[i] != fold_of_row[row]]
        means = [sum(trial[i] for i in others) / len(others) for trial in trials]
        finite = [mean if math.isfinite(mean) else math.inf for mean in means]
        result.append(trials[finite.index(min(finite))][row])
    return result


@pytest.mark.parametrize(("rows", "folds"), [(12, 4), (13, 4), (5, 4), (3, 4), (2, 4), (40, 2)])
def test_cross_fitted_matches_a_naive_loop(rows: int, folds: int) -> None:
    trials = [losses(rows, seed) for seed in range(6)]
    found = cross_fitted(trials, folds, deals=7, seed=3)
    generator = torch.Generator().manual_seed(3)
    deals = [torch.randperm(rows, generator=generator).remainder(min(folds, rows)).tolist() for _ in range(7)]
    each = [naive_cross_fit([trial.double().tolist() for trial in trials], deal) for deal in deals]
    assert found.tolist() == pytest.approx([sum(column) / 7 for column in zip(*each, strict=True)])
    # More than one trial was chosen by some fold, and by the same row in another deal, else this would test little.
    if rows == 12:
        assert not any(torch.equal(found, trial.double()) for trial in trials)
        assert each[0] != each[1]


def test_the_order_of_rows_hardly_matters_where_trials_are_almost_alike() -> None:
    # Ten trials that are 0.01 better than none in the mean, and differ by chance: a single deal says -0.05 to 0.04.
    before = losses(300, 0)
    trials = [before, *(before - 0.01 + 0.2 * (losses(300, seed) - 0.5) for seed in range(1, 10))]

    def gain(order: Tensor, deals: int) -> float:
        mixed = [trial[order] for trial in trials]
        return float((mixed[0] - cross_fitted(mixed, 4, deals=deals)).mean())

    orders = [torch.randperm(300, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    once, often = ([gain(order, deals) for order in orders] for deals in (1, 100))
    assert max(often) - min(often) < (max(once) - min(once)) / 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cross_fitted_chooses_no_trial_that_is_not_finite(bad: float) -> None:
    good, broken = losses(12, 0), losses(12, 1) - 1
    broken[5] = bad  # one row, whose others would choose this trial
    assert torch.equal(cross_fitted([good, broken], 4), good.double())


def test_cross_fitting_takes_away_the_optimism_of_choosing() -> None:
    # 200 trials of pure noise: the best of them looks better than the mean by far, but not on rows it did not see.
    trials = [losses(40, seed) for seed in range(200)]
    best = min(float(trial.mean()) for trial in trials)
    everywhere = float(torch.stack(trials).mean())
    assert best < everywhere - 0.08
    assert float(cross_fitted(trials, 4).mean()) == pytest.approx(everywhere, abs=0.06)


def test_one_row_has_no_others_to_choose_for_it() -> None:
    assert cross_fitted([torch.tensor([2.0]), torch.tensor([1.0])], 4).tolist() == [1.0]


def test_a_plain_gain_is_accepted_and_a_plain_loss_refused() -> None:
    before = losses(50, 0)
    good, bad = judge(before, before - 0.1), judge(before, before + 0.1)
    assert good.accepted and good.probability == 1 - 0.5**50 and good.gain == pytest.approx(0.1, rel=1e-5)
    assert "weak" not in good.reason
    assert not bad.accepted and bad.probability == 0.0 and bad.gain == pytest.approx(-0.1, rel=1e-5)
    assert bad.reason.startswith("refused")


def test_no_change_is_refused() -> None:
    before = losses(50, 0)
    assert not judge(before, before.clone()).accepted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused(value: float) -> None:
    before = losses(50, 0)
    after = before - 0.1
    after[7] = value
    verdict = judge(before, after)
    assert not verdict.accepted
    assert "1 of 50" in verdict.reason and "not finite" in verdict.reason


def test_weak_evidence_is_accepted_and_called_weak() -> None:
    # Two rows of three gain, one loses almost as much: resamples disagree.
    before = torch.ones(9)
    after = torch.tensor([0.5, 0.5, 1.9] * 3)
    verdict = judge(before, after)
    assert verdict.accepted and verdict.gain > 0
    assert verdict.probability < 0.95
    assert "weak" in verdict.reason
    assert "weak" not in judge(before, after, confidence=0.5).reason


def test_probability_matches_a_bootstrap_by_numpy() -> None:
    before, after = losses(30, 1), losses(30, 2)
    gains = (before - after).double().numpy()
    draw = np.random.default_rng(0)
    expected = np.mean(gains[draw.integers(30, size=(20_000, 30))].mean(1) > 0)
    assert judge(before, after).probability == pytest.approx(expected, abs=0.03)


def test_the_pairing_of_rows_counts() -> None:
    # Every row gains a little, and the rows differ a lot: unpaired this would drown.
    before = torch.linspace(0, 10, 40)
    assert judge(before, before - 0.01).probability > 1 - 1e-9


def test_the_same_rows_get_the_same_verdict() -> None:
    before, after = losses(30, 1), losses(30, 2)
    assert judge(before, after) == judge(before, after)


def test_two_rows_that_gain_are_weak_evidence() -> None:
    # Every resample agrees, and yet a coin would do as well once in four times.
    verdict = judge(torch.ones(2), torch.zeros(2))
    assert verdict.accepted and verdict.probability == 0.75 and "weak" in verdict.reason


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shift", [-0.2, 0.0, 0.05, 0.1, 0.15, 0.4])
def test_surely_worse_is_a_paired_t_above_two(seed: int, shift: float) -> None:
    one, other = losses(30, seed) + shift, losses(30, seed + 100)
    # scipy divides by n - 1, a standard error of the mean by n.
    statistic = stats.ttest_rel(one.double().numpy(), other.double().numpy()).statistic * math.sqrt(30 / 29)
    assert surely_worse(one, other) == (statistic > 2)


def test_surely_worse_is_found_both_ways() -> None:
    found = {surely_worse(losses(30, seed) + 0.15, losses(30, seed + 100)) for seed in range(8)}
    assert found == {True, False}


def test_the_pairing_of_rows_counts_for_what_is_worse() -> None:
    before = torch.linspace(0, 10, 40)
    after = before + 0.01 + 0.001 * torch.arange(40) % 2
    assert surely_worse(after, before) and not surely_worse(before, after)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_surely_worse(value: float) -> None:
    broken = losses(12, 0)
    broken[3] = value
    assert surely_worse(broken, losses(12, 1))


def test_the_same_losses_are_not_worse() -> None:
    assert not surely_worse(losses(12, 0), losses(12, 0))
    assert not surely_worse(torch.ones(1), torch.ones(1))
