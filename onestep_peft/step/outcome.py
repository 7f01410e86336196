"""What is asked of a step, and what it did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from onestep_peft.step.line_search import SearchResult

# Direction of the outcome of a walk's small steps.
WALK = "walk"


@dataclass(frozen=True)
class StepSettings:
    """What the user fixed about the step.

    Args:
        directions: Names of the candidates; see `step.directions`.
        step_size: A fixed η, or None for a search.
        damping: λ, in units of a covariance's mean eigenvalue, ≥ 0.
        rank: The most that an update's rank may be; None leaves it to each layer.
        guard: Whether held-out rows may refuse the step.
        guard_confidence: Share of resamples that must agree before the evidence counts as strong.
        slices: Of how many slices of rows a walk is made: the first one's step is searched, and where it is, the
            others go on from there; see `step.walk`.
        parts: Into how many parts the rows are dealt, each with a body of its own; see `step.bodies`.
        pace: Length of a walk's first small step by that of the step that it goes on from.
        slice_rows: Rows of each slice of a walk but the first, on average; see `step.walk.Walk.begin`.
        at_once: Whether the first slice's step is a small one, too, of a prompt; see `step.prompt_steps`.
    """

    directions: Sequence[str]
    step_size: float | None
    damping: float
    rank: int | None
    guard: bool
    guard_confidence: float
    slices: int = 1
    parts: int = 1
    pace: float = 0.0
    slice_rows: float = 1.0
    at_once: bool = False

    @property
    def walks(self) -> bool:
        """Whether rows make small steps, be it after one that is searched."""
        return self.slices > 1 and self.step_size is None

    def left(self, place: int) -> float:
        """Which share of a walk's small steps is left at the slice of this number, from 0 on; 1 at the first one."""
        lead = int(not self.at_once)
        return 1 - (place - lead) / (self.slices - lead)


@dataclass
class StepOutcome:
    """What one step did. Losses are means over rows in nats, NaN where no held-out rows were at hand.

    `step_size` and `candidates` speak of the first part of what moves, `parts` of the searches for the others. `reach`
    has, by part, the step size in units of the first one tried. `last_fit` has, of the head's fit to held-out rows,
    their number ("rows") and their mean "loss" under heads that leave them out.
    """

    direction: str
    step_size: float
    candidates: list[tuple[str, SearchResult]]
    loss_before: float
    loss_after: float
    accepted: bool
    reason: str
    energy_lost: float = 0.0
    share_moved: float = 0.0
    parts: list[tuple[str, SearchResult]] = field(default_factory=list)
    head_refitted: bool = False
    last_fit: dict[str, float] | None = None
    reach: dict[str, float] = field(default_factory=dict)


class Clock:
    """Wall time by part, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now

    def skip(self) -> None:
        """Leaves out what has been timed elsewhere."""
        self._last = time.perf_counter()
