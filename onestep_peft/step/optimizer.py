"""The whole step behind torch.optim's interface: candidates, search, guard, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onestep_peft.step import processes
from onestep_peft.step.bodies import Bodies, below
from onestep_peft.step.candidates import Bundle, Candidate, Evidence, build_candidates, share_at_start
from onestep_peft.step.guard import best_trial, cross_fitted, falls_behind, judge
from onestep_peft.step.layers import Layer, Prompt
from onestep_peft.step.line_search import PART_EVALUATIONS, SearchResult, search_step_size
from onestep_peft.step.outcome import WALK, Clock, StepOutcome, StepSettings
from onestep_peft.step.parameter_gradients import ParameterGradients
from onestep_peft.step.snapshot import Snapshot
from onestep_peft.step.statistics import Statistics, finite_norms
from onestep_peft.step.walk import Walk, products

# Rows are dealt into so many folds for the guard: each fold judges what the others chose.
FOLDS = 4

Progress = Callable[[str, float, float], None]


class OneStepOptimizer(torch.optim.Optimizer):
    """Moves once, along the best of its candidates, as far as the held-out rows say; a walk goes on from there.

    The pass adds up gradients of *summed* losses (in `.grad` and in the statistics) and calls `count` for every
    micro-batch; `finish_pass` divides once by the exact number of items. `step` then builds the candidates,
    searches each, takes the best, and keeps it only if the guard agrees; else every parameter gets back the bits it
    had.

    Args:
        parameters: The trainable parameters.
        settings: What the user fixed.
        layers: What a direction moves that is not one for parameters as they are.
        statistics: By layer name; filled by `step.statistics.observed` during the pass.
        held_out_losses: Losses of the held-out rows at the model as it stands, `(rows,)`; None without such rows,
            and then the step size must be fixed and nothing guards it.
        progress: Called with (candidate, step size, mean loss) after each point of the search.
        body: The parameters that a part's body has of its own; None for all.
        settle: Called before held-out rows judge a walk of small steps alone, to bring the head to where it has led.

    Attributes:
        bodies: Those of the parts.
        walk: What goes on from a step.
        done: Steps made so far, the small ones of a walk among them.
        loss: Mean loss of the last pass' rows, in nats.
        step_size: Of the last step. A small one's is its length by that of the step that the walk began with.
        seconds: Wall time of the last step by part.
        goes_on: Whether another pass over the same rows follows the step.
        gradient_norm: Of the last pass' mean gradient, over all layers whose update is a product; None without such.
        kept: What its owner wants to find in a checkpoint, by name.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        settings: StepSettings,
        *,
        layers: Sequence[Layer | Prompt] = (),
        statistics: Mapping[str, Statistics] | None = None,
        held_out_losses: Callable[[], Tensor] | None = None,
        progress: Progress | None = None,
        body: Sequence[Tensor] | None = None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        rate = settings.step_size if settings.step_size is not None else 1.0
        # What the next step goes by travels in Trainer's checkpoints with the rate.
        super().__init__(list(parameters), {"lr": rate, "scale": 1.0})
        self.settings = settings
        self.layers = layers
        self.statistics = statistics or {}
        self.outcomes: list[StepOutcome] = []
        self._losses, self._settle = held_out_losses, settle
        self._progress = progress
        self.gradients = ParameterGradients(self._parameters)
        self._items, self._covered, self._covers = 0.0, 0.0, True
        body = self._parameters if body is None else body
        self.bodies = Bodies(body, settings.parts, lambda: self.state)
        self.walk = Walk(layers, self._parameters, [p for p in self._parameters if not any(p is one for one in body)])
        self.goes_on, self.done, self.loss, self.step_size = False, 0, math.nan, 0.0
        self.seconds: dict[str, float] = {}
        self.gradient_norm: float | None = None
        self.kept: dict[str, Tensor] = {}

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def begin_pass(self) -> None:
        """Empties the sums: a pass that was cut short leaves nothing behind."""
        self._items = self._covered = 0.0
        self.cover(not self.walk.under_way)  # a walk keeps the metric that it began with
        self.bodies.begin_pass()
        self.gradients.reset()
        for record in self.statistics.values():
            record.reset()

    def enter_part(self, part: int) -> None:
        """Before a micro-batch of rows of this part."""
        if self.goes_on:
            self.bodies.close_before(part, self._sums_of_layers)
        self.bodies.enter(part)

    def cover(self, covers: bool) -> None:
        """Before a micro-batch whose rows count for the layers' covariances, or do not."""
        self._covers = covers
        for record in self.statistics.values():
            record.covers = covers

    def _sums_of_layers(self) -> dict[str, Tensor]:
        """`items` (all, and those covered), and by layer and name what its statistics and its gradient are so far."""
        found = {"items": torch.tensor([self._items, self._covered], device=self._parameters[0].device)}
        for layer in self.layers:
            if isinstance(layer, Layer):
                total = self._gradient_in_place(layer)
                sums = self.statistics[layer.name].sums() | ({} if total is None else {"gradient": total})
                found |= {f"{layer.name}/{name}": one for name, one in sums.items()}
        return found

    def _gradient_in_place(self, layer: Layer) -> Tensor | None:
        """The gradient of a layer's parameter, as a matrix; None for a layer whose statistics sum it up."""
        if layer.parameter is None:
            return None
        total = self.gradients.of(layer.parameter())
        return layer.as_matrix(total) if total is not None else torch.zeros(())

    def count(self, items: float) -> None:
        """Adds the number of items (rows, or labelled tokens) of a micro-batch."""
        self._items += items
        self._covered += items * self._covers

    def sums(self) -> dict[str, Tensor]:
        """All that a pass has summed up so far in this process, by name."""
        named = {"items": torch.tensor([self._items, self._covered], dtype=torch.float64)}
        named |= {f"gradient.{i}": total for i, total in self.gradients.sums().items()}
        for name, record in self.statistics.items():
            named |= {f"statistics.{name}.{key}": total for key, total in record.sums().items()}
        named |= {f"walk.{name}": tensor for name, tensor in self.walk.tensors().items()}
        return named | {f"bodies.{name}": tensor for name, tensor in self.bodies.tensors().items()}

    def load_sums(self, named: Mapping[str, Tensor]) -> None:
        """Takes over what `sums` returned."""
        self._items, self._covered = named["items"].tolist()
        self.gradients.load(below("gradient", named))
        for name, record in self.statistics.items():
            record.load(below(f"statistics.{name}", named))
        self.walk.load(below("walk", named))
        self.bodies.load(below("bodies", named))

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim, with what a walk goes by, and what is kept."""
        return {**super().state_dict(), "walk": self.walk.tensors(), "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim."""
        self.walk.load(state_dict.get("walk", {}))
        self.kept = dict(state_dict.get("kept", {}))
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in ("walk", "kept")})

    @torch.no_grad()
    def finish_pass(self) -> float:
        """Adds up what the processes have summed and turns it into means over all items; returns their number.

        Raises:
            ValueError: The pass met no labelled item, or a gradient is not finite.
        """
        self.bodies.leave()
        if self.goes_on:
            self.bodies.end_pass(self._sums_of_layers())
        items, covered = self._all_items()
        if items == 0:
            raise ValueError("The pass met no labelled item, so there is no gradient. Check the label column.")
        processes.sum_over(total for _, total in self.gradients.all())
        self.gradients.divide(items)
        summed: list[str] = []
        for layer in self.layers:
            record = self.statistics[layer.name]
            record.reduce()
            record.finish(items, covered)
            total = self._gradient_in_place(layer) if isinstance(layer, Layer) else None
            if total is not None:
                record.gradient = total
            elif isinstance(layer, Layer):
                summed.append(layer.name)
        norms = finite_norms(self.statistics)
        self.gradient_norm = math.hypot(*(norms[name] for name in summed)) if summed else None
        return items

    def _all_items(self) -> tuple[float, float]:
        """The items of all processes, and how many of them count for the covariances."""
        device = self._parameters[0].device if self._parameters else None
        items = torch.tensor([self._items, self._covered], device=device)
        processes.sum_over([items])
        return float(items[0]), float(items[1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Builds the candidates, searches, moves, guards; the outcome is appended to `outcomes`.

        On a walk all but the first slice's rows (a prompt's, too) make a small step, and the guard follows the last.
        """
        loss = closure() if closure is not None else None
        clock = Clock()
        if self.settings.at_once and not self.walk.under_way and self._losses is not None:
            self.walk.begin_at_once(slices=self.settings.slices, losses=self._losses())
        if self.walk.under_way:
            self._walk_on(clock)
        else:
            self._first_step(clock)
        self.seconds = clock.seconds
        self.done += 1
        return loss

    def _first_step(self, clock: Clock) -> None:
        before = Snapshot(self._parameters)
        evidence = Evidence(self.layers, self.statistics, self.gradients, before)
        settings = self.settings
        so_far = products(self.layers) if settings.walks else {}
        candidates = build_candidates(evidence, settings.directions, damping=settings.damping, rank=settings.rank)
        clock.lap("directions")
        if not candidates:
            self.outcomes.append(self._nothing_to_move())
            return
        kept = False
        try:
            outcome, trials = self._decide(candidates, clock)
            if outcome.accepted and self.goes_on:
                self.bodies.follow(
                    evidence, outcome.direction, outcome.reach, damping=settings.damping, rank=settings.rank
                )
            else:
                self.bodies.forget()
            if outcome.accepted and settings.walks:
                losses = best_trial(trials)  # the model stands where they were seen
                self.walk.begin(
                    evidence, so_far, damping=settings.damping, pace=settings.pace, slices=settings.slices,
                    slice_rows=settings.slice_rows, losses=losses,
                )  # fmt: skip
            kept = outcome.accepted
        finally:  # an error or an interruption in the search leaves the model as it was
            if not kept:
                before.restore()
        processes.broadcast(self._parameters)
        clock.lap("guard")
        self.outcomes.append(outcome)
        self.step_size = outcome.step_size
        self.go_on_from(outcome)

    def _walk_on(self, clock: Clock) -> None:
        walk, place = self.walk, self.done % self.settings.slices
        before, kept = Snapshot(self._parameters), walk.snapshot()
        try:
            walk.advance(self.statistics, self.gradients, left=self.settings.left(place), loss=self.loss)
            self.step_size = self.settings.left(place) * walk.pace
            clock.lap("directions")
            if place == self.settings.slices - 1:
                self.outcomes.append(self._end_of_walk(clock))
                walk.forget()
                clock.lap("guard")
        except BaseException:
            before.restore()
            walk.load(kept)
            raise

    def _end_of_walk(self, clock: Clock) -> StepOutcome:
        """Whether held-out rows have gained by the small steps; else the model is back where they began."""
        assert self._losses is not None
        if self.settings.at_once and self._settle is not None:
            self._settle()
            clock.skip()
        before, after = self.walk.losses, self._losses()
        verdict = judge(before, after, confidence=self.settings.guard_confidence)
        accepted = verdict.accepted or not (self.settings.guard or after.isnan().any())
        if not accepted:
            self.walk.go_back()
        reason = verdict.reason if accepted == verdict.accepted else "accepted: not guarded"
        return StepOutcome(WALK, self.walk.pace, [], float(before.mean()), float(after.mean()), accepted, reason)

    def ended_steps(self) -> list[StepOutcome]:
        """What the steps of the walk through the rows that has just ended did; empty where it goes on."""
        if self.walk.under_way:
            return []
        if self.settings.walks:  # the search, and where it found something the small steps together
            searched = self.outcomes[-1].direction == WALK and not self.settings.at_once
            return self.outcomes[-2:] if searched else self.outcomes[-1:]
        slices = self.settings.slices
        return self.outcomes[-slices:] if self.done % slices == 0 else []

    def go_on_from(self, outcome: StepOutcome) -> None:
        """Lets the next step's search start where this one's ended."""
        if outcome.share_moved > 0:
            for group in self.param_groups:
                group["scale"] = outcome.share_moved / share_at_start(outcome.direction)

    def _nothing_to_move(self) -> StepOutcome:
        before = float(self._losses().mean()) if self._losses is not None else float("nan")
        reason = (
            "refused: every layer's gradient is zero or rounding. The head alone may separate all rows, or be all zeros"
        )
        return StepOutcome(self.settings.directions[0], 0.0, [], before, before, False, reason)

    def _decide(self, candidates: Sequence[Candidate], clock: Clock) -> tuple[StepOutcome, list[Tensor]]:
        """Searches and judges; leaves the model at the best point, accepted or not. Also the losses of all trials."""
        outcome, trials = self._search(candidates)
        clock.lap("search")
        if outcome.accepted and trials and self.settings.guard:
            # A lone point was not chosen: it is judged as it is.
            free = self.settings.step_size is None or len(candidates) > 1
            after = cross_fitted(trials, FOLDS) if free else trials[1]
            verdict = judge(trials[0], after, confidence=self.settings.guard_confidence)
            outcome.accepted, outcome.reason = verdict.accepted, verdict.reason
        return outcome, trials

    def _search(self, candidates: Sequence[Candidate]) -> tuple[StepOutcome, list[Tensor]]:
        """Leaves the model at the best point of the best candidate; also every trial's losses, the first at zero."""
        fixed = self.settings.step_size
        if self._losses is None:
            if fixed is None or len(candidates) > 1:
                raise ValueError("Without held-out rows the direction and the step size must both be fixed.")
            lost, nan = candidates[0].apply(fixed), float("nan")
            return StepOutcome(candidates[0].name, fixed, [], nan, nan, True, "accepted: not guarded", lost), []
        trials = [self._losses()]
        before = float(trials[0].mean())
        searched: list[tuple[Candidate, SearchResult]] = []
        # The next candidate starts at the relative length that was best for the last one, the first where the step
        # before ended.
        scale = self.param_groups[0]["scale"]
        for candidate in candidates:
            if fixed is None:
                first = candidate.first
                loss = self._loss_along(first, candidate.name, trials)
                hopeless = falls_behind(trials) if searched else lambda: False
                result = search_step_size(loss, first.start * scale, loss_at_zero=before, hopeless=hopeless)
                if result.best[0] > 0:
                    scale = result.best[0] / first.start
            else:
                loss = self._loss_along(candidate, candidate.name, trials)
                result = SearchResult([(0.0, before), (fixed, loss(fixed))])
            candidate.apply(0.0)
            searched.append((candidate, result))
        return self._move(searched, trials), trials

    def _loss_along(self, moving: Candidate | Bundle, name: str, trials: list[Tensor]) -> Callable[[float], float]:
        """The held-out loss as a function of the step size; what each row has lost is added to `trials`."""

        def loss(step_size: float) -> float:
            assert self._losses is not None
            moving.apply(step_size)
            trials.append(self._losses())
            value = float(trials[-1].mean())
            if self._progress is not None:
                self._progress(name, step_size, value)
            return value

        return loss

    def _move(self, searched: Sequence[tuple[Candidate, SearchResult]], trials: list[Tensor]) -> StepOutcome:
        fixed, before = self.settings.step_size is not None, float(trials[0].mean())

        def end(result: SearchResult) -> tuple[float, float]:
            return result.points[1] if fixed and not self.settings.guard else result.best

        def reached(pair: tuple[Candidate, SearchResult]) -> float:
            loss = end(pair[1])[1]
            return loss if math.isfinite(loss) else math.inf

        best, result = min(searched, key=reached)
        step_size, after = end(result)
        points = [(candidate.name, one) for candidate, one in searched]
        if step_size == 0.0:
            reason = "refused: no step size that was tried lowers the held-out loss"
            return StepOutcome(best.name, 0.0, points, before, before, False, reason)
        lost = best.apply(step_size) if fixed else best.first.apply(step_size)
        outcome = StepOutcome(best.name, step_size, points, before, after, True, "accepted: not guarded", lost)
        if not fixed:
            outcome.reach = {next(iter(best.parts)): step_size / best.first.start}
            outcome.share_moved = step_size / best.first.start * share_at_start(best.name)
            self._move_other_parts(best, outcome, trials)
        return outcome

    def _move_other_parts(self, best: Candidate, outcome: StepOutcome, trials: list[Tensor]) -> None:
        """One part after the other, from where the others stand, as far as held-out rows gain."""
        relative = outcome.step_size / best.first.start
        for name, part in list(best.parts.items())[1:]:
            loss = self._loss_along(part, f"{best.name}, {name}", trials)
            result = search_step_size(
                loss, part.start * relative, loss_at_zero=outcome.loss_after, budget=PART_EVALUATIONS
            )
            step_size, outcome.loss_after = result.best
            part.apply(step_size)
            outcome.reach[name] = step_size / part.start
            outcome.parts.append((name, result))
