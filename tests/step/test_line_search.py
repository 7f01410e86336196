"""The search for a step size on functions whose minimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from onestep_peft.step.line_search import EVALUATIONS, FACTOR, LOOKS, SearchResult, affordable, search_step_size

STARTS = (1e-3, 0.02, 0.3, 0.9, 1.1, 3.0, 20.0, 300.0)


def counted(loss: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    asked: list[float] = []

    def call(step_size: float) -> float:
        asked.append(step_size)
        return loss(step_size)

    return call, asked


def bowl(step_size: float) -> float:
    """Its minimum is 1, at 1; it is 2 at zero."""
    return 1 + (step_size - 1) ** 2


@pytest.mark.parametrize("start", STARTS)
def test_finds_the_minimum_from_starts_far_off(start: float) -> None:
    loss, asked = counted(bowl)
    result = search_step_size(loss, start, loss_at_zero=bowl(0.0), budget=30)
    step_size, found = result.best
    assert step_size == pytest.approx(1.0, rel=0.15)
    # The loss it could have had is 1, at zero it was 2: 98 % of the way.
    assert found < 1.02
    assert len(asked) <= 30


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("budget", [1, 2, 3, 12])
def test_keeps_to_its_budget_and_is_never_worse_than_zero(start: float, budget: int) -> None:
    loss, asked = counted(bowl)
    result = search_step_size(loss, start, loss_at_zero=bowl(0.0), budget=budget)
    assert 1 <= len(asked) <= budget
    assert asked[0] == start
    assert [point[0] for point in result.points] == [0.0, *asked]
    assert result.best[1] <= bowl(0.0)


def test_the_default_budget_reaches_a_minimum_two_decades_away() -> None:
    result = search_step_size(bowl, 0.01, loss_at_zero=bowl(0.0))
    assert result.best[1] < 1.1
    result = search_step_size(bowl, 100.0, loss_at_zero=bowl(0.0))
    assert result.best[1] < 1.1


def test_stands_still_where_every_step_hurts() -> None:
    result = search_step_size(lambda step_size: 1 + step_size, 1.0, loss_at_zero=1.0)
    assert result.best == (0.0, 1.0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_steps_back_from_losses_that_are_not_finite(bad: float) -> None:
    def cliff(step_size: float) -> float:
        return bad if step_size > 2 else bowl(step_size)

    result = search_step_size(cliff, 50.0, loss_at_zero=bowl(0.0))
    assert result.best[1] < 1.05
    assert result.best[0] < 2


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_all_losses_not_finite_is_standing_still(bad: float) -> None:
    assert search_step_size(lambda _: bad, 1.0, loss_at_zero=0.5).best == (0.0, 0.5)


def test_between_two_others_the_last_point_is_the_vertex_of_the_parabola_in_the_logarithm() -> None:
    # In log(step size) this is a parabola with its minimum at e^0.7; its first points and zero are concave.
    loss, asked = counted(lambda step_size: (math.log(step_size) - 0.7) ** 2)
    result = search_step_size(loss, 1.0, loss_at_zero=1.2)
    assert asked[:-1] == pytest.approx([1.0, FACTOR, FACTOR**2])
    assert asked[-1] == pytest.approx(math.exp(0.7), rel=1e-9)
    assert result.best[0] == pytest.approx(math.exp(0.7), rel=1e-9)


@pytest.mark.parametrize("start", [0.5, 0.55, 0.7])
def test_of_a_parabola_three_points_below_its_minimum_are_enough(start: float) -> None:
    loss, asked = counted(bowl)
    result = search_step_size(loss, start, loss_at_zero=2.0)
    assert asked[:2] == pytest.approx([start, start * FACTOR])
    assert len(asked) == 3
    assert result.best == pytest.approx((1.0, 1.0), rel=1e-9)


@pytest.mark.parametrize("start", [1.05, 1.3, 1.55])
def test_the_smallest_point_is_not_the_end(start: float) -> None:
    # Near zero a loss can fall much more steeply than a parabola.
    loss, asked = counted(lambda step_size: bowl(step_size) if step_size > 0.5 else 50.0)
    result = search_step_size(loss, start, loss_at_zero=50.0)
    assert asked[:3] == pytest.approx([start, start * FACTOR, start / FACTOR])
    assert result.best[0] == pytest.approx(1.0, rel=0.15)


def test_a_minimum_next_to_a_known_point_is_not_looked_at() -> None:
    loss, asked = counted(bowl)
    assert search_step_size(loss, 0.95, loss_at_zero=2.0).best[0] == 0.95
    assert asked == pytest.approx([0.95, 0.95 * FACTOR, 0.95 / FACTOR])


def test_a_search_goes_on_where_a_parabola_has_no_minimum() -> None:
    # Concave up to 4: the first two points and zero say nothing of where it ends.
    loss, asked = counted(lambda step_size: 2 - step_size**2 / 16 if step_size < 4 else 1 + (step_size - 4) ** 2)
    result = search_step_size(loss, 0.5, loss_at_zero=2.0)
    assert result.best[0] == pytest.approx(4.0, rel=0.2)


def test_a_tie_goes_to_the_smaller_step() -> None:
    result = SearchResult([(0.0, 1.0), (0.5, 0.7), (0.25, 0.7), (1.0, math.nan), (2.0, math.inf)])
    assert result.best == (0.25, 0.7)


def test_a_flat_loss_is_standing_still() -> None:
    assert search_step_size(lambda _: 1.0, 1.0, loss_at_zero=1.0).best == (0.0, 1.0)


def test_affordable_counts_whole_searches_and_always_allows_one() -> None:
    assert affordable(10 * EVALUATIONS * 50, pass_rows=1, held_rows=50) == 10
    assert affordable(10 * EVALUATIONS * 50 - 1, pass_rows=1, held_rows=50) == 9
    assert affordable(1, pass_rows=1, held_rows=50) == 1
    assert affordable(None, pass_rows=400, held_rows=512) == 3  # 20,000 forwards
    assert affordable(None, pass_rows=100_000, held_rows=5_000) == 10  # twice the pass
    assert affordable(None, pass_rows=10, held_rows=0) >= 1


@pytest.mark.parametrize("start", STARTS)
def test_a_search_takes_no_more_evaluations_than_are_counted_for_it(start: float) -> None:
    for minimum in (1e-6, 1.0, 1e6):
        call, asked = counted(lambda step_size, minimum=minimum: bowl(step_size / minimum))
        search_step_size(call, start, loss_at_zero=2.0)
        assert len(asked) <= EVALUATIONS


@pytest.mark.parametrize("start", STARTS)
def test_a_hopeless_search_ends_after_its_second_evaluation(start: float) -> None:
    loss, asked = counted(bowl)
    seen: list[int] = []

    def hopeless() -> bool:
        seen.append(len(asked))
        return True

    result = search_step_size(loss, start, loss_at_zero=bowl(0.0), hopeless=hopeless)
    assert (len(asked), seen) == (LOOKS, [LOOKS])
    assert [point[0] for point in result.points] == [0.0, *asked]


@pytest.mark.parametrize("start", STARTS)
def test_a_search_that_becomes_hopeless_ends_there_and_one_that_does_not_is_as_it_was(start: float) -> None:
    whole = search_step_size(bowl, start, loss_at_zero=bowl(0.0), budget=30)
    assert search_step_size(bowl, start, loss_at_zero=bowl(0.0), budget=30, hopeless=lambda: False) == whole
    for end in range(1, len(whole.points) - 1):
        loss, asked = counted(bowl)
        found = search_step_size(
            loss, start, loss_at_zero=bowl(0.0), budget=30, hopeless=lambda asked=asked, end=end: len(asked) >= end
        )
        assert found.points == whole.points[: len(found.points)]
        # The last point, of the parabola, is not asked for.
        assert len(asked) in (max(end, LOOKS), len(whole.points) - 1)
