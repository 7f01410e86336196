"""How far to go: a few factors, one parabola, and the best point that was evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

FACTOR = 1.6
# The most evaluations of one search.
EVALUATIONS = 12
# And of the search for a further part of what moves, which starts from where the first part's ended.
PART_EVALUATIONS = EVALUATIONS // 2
# A parabola's minimum that is as near to a known point, in the logarithm, is not looked at: the loss is flat there.
NEAR = 0.1
# So many are made before a search can be given up.
LOOKS = 2
# Forwards of single rows that several searches may take in any case: seconds for a small model.
FORWARDS = 20_000
# A row of the pass, forward and backward, takes as long as so many forwards.
PASS_FORWARDS = 3


@dataclass
class SearchResult:
    """Every point the search looked at.

    Args:
        points: `(step size, loss)` in the order of evaluation; zero comes first.
    """

    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, float]:
        """The step size of the lowest finite loss, and that loss. A tie goes to the smaller step."""
        finite = [point for point in self.points if math.isfinite(point[1])]
        return min(finite, key=lambda point: (point[1], point[0]))


def affordable(budget: int | None, pass_rows: int, held_rows: int) -> int:
    """How many candidates may be searched for this many forwards of single rows; always one.

    Args:
        budget: In forwards; None for `FORWARDS` or twice the work of the pass, whichever is more.
        pass_rows: Rows of the pass.
        held_rows: Rows that every evaluation reads.
    """
    if budget is None:
        budget = max(FORWARDS, 2 * PASS_FORWARDS * pass_rows)
    return max(1, budget // (EVALUATIONS * max(held_rows, 1)))


def search_step_size(
    loss: Callable[[float], float],
    start: float,
    *,
    loss_at_zero: float,
    budget: int = EVALUATIONS,
    hopeless: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """Finds a step size that lowers `loss`.

    From `start` the step grows by a factor of 1.6 while the best point is the largest one, unless a parabola through
    the loss at zero and the two largest points has its minimum nearer, and shrinks while it is the smallest (by the
    factor's square while nothing has helped yet): near zero a loss can fall much more steeply than a parabola. The
    minimum of that parabola, or of one in the logarithm of the step size where the best point has neighbours on both
    sides, is the last point looked at. The end is the best point evaluated, zero included, so the result is never worse
    than standing still on the rows that `loss` reads.

    Args:
        loss: Mean loss of the search rows at a step size; may return infinity or NaN.
        start: First step size to try, > 0.
        loss_at_zero: The loss before the step.
        budget: The most evaluations of `loss`, ≥ 1.
        hopeless: Asked from the second evaluation on whether to go on is a waste.
    """
    result = SearchResult([(0.0, loss_at_zero)])

    def look(step_size: float) -> None:
        result.points.append((step_size, loss(step_size)))

    look(start)
    while len(result.points) <= budget:
        if len(result.points) > LOOKS and hopeless():
            return result
        next_one, last = _next(result)
        if next_one is not None:
            look(next_one)
        if last:
            return result
    return result


def _next(result: SearchResult) -> tuple[float | None, bool]:
    """Where to look next, if anywhere, and whether that is the end."""
    (_, at_zero), *points = result.points
    points, best = sorted(points), result.best[0]
    smallest, largest = points[0][0], points[-1][0]
    if best == 0.0:
        return smallest / FACTOR**2, False
    if len(points) == 1:
        return best * FACTOR, False
    if best == smallest:
        return best / FACTOR, False
    i = next(i for i, (step_size, _) in enumerate(points) if step_size == best)
    vertex = _vertex(points[i - 1 : i + 2] if best < largest else [(0.0, at_zero), *points[-2:]])
    if best == largest and not vertex <= best * FACTOR:
        return best * FACTOR, False
    known = not math.isfinite(vertex) or any(abs(math.log(vertex / step_size)) < NEAR for step_size, _ in points)
    return None if known else vertex, True


def _vertex(points: Sequence[tuple[float, float]]) -> float:
    """Where the parabola through three points has its minimum; infinity where it has none, NaN where one is not finite.

    In the logarithm of the step size, or, where the first point is zero, in the step size itself.
    """
    straight = points[0][0] == 0.0
    (x0, y0), (x1, y1), (x2, y2) = ((s if straight else math.log(s), loss) for s, loss in points)
    slope_left, slope_right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (slope_right - slope_left) / (x2 - x0)
    if math.isnan(curvature) or math.isinf(curvature):
        return math.nan
    if curvature <= 0:
        return math.inf
    vertex = (x0 + x1) / 2 - slope_left / (2 * curvature)
    return vertex if straight else math.exp(vertex)
