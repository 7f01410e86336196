"""How far to go: a bracket by a constant factor, one parabola, and the best point that was evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

FACTOR = 1.6
# The most evaluations of one search.
EVALUATIONS = 12
# And of the search for a further part of what moves, which starts from where the first part's ended.
PART_EVALUATIONS = EVALUATIONS // 2
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

    From `start` the step grows by a factor of 1.6 while the best point is the largest one, and shrinks while it is
    the smallest (by the factor's square while nothing has helped yet). A parabola through the best point and its
    neighbours, in the logarithm of the step size, gives one more point. The end is the best point evaluated, zero
    included, so the result is never worse than standing still on the rows that `loss` reads.

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
    while len(result.points) < budget:
        if len(result.points) > LOOKS and hopeless():
            return result
        tried = [step_size for step_size, _ in result.points[1:]]
        best = result.best[0]
        if best == max(tried):
            look(best * FACTOR)
        elif best == min(tried):
            look(best / FACTOR)
        elif best == 0.0:
            look(min(tried) / FACTOR**2)
        else:
            break
    vertex = _vertex(result)
    if vertex is not None and len(result.points) <= budget:
        look(vertex)
    return result


def _vertex(result: SearchResult) -> float | None:
    """Where the parabola in log(step size) through the best point and its two neighbours has its minimum."""
    points = sorted(point for point in result.points if point[0] > 0)
    best = result.best[0]
    index = next((i for i, point in enumerate(points) if point[0] == best), None)
    if index is None or not 0 < index < len(points) - 1:
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(s), loss) for s, loss in points[index - 1 : index + 2])
    if not math.isfinite(y0 + y2):
        return None
    slope_left, slope_right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (slope_right - slope_left) / (x2 - x0)
    if curvature <= 0:
        return None
    vertex = (x0 + x1) / 2 - slope_left / (2 * curvature)
    if abs(vertex - x1) < 0.02 or not x0 < vertex < x2:  # within 2 % of a point that is known already
        return None
    return math.exp(vertex)
