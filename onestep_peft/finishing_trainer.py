"""The end of a run: what held-out rows still do for the head once they have chosen and judged everything."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from onestep_peft import f1_threshold, head, last_fit, out_of_fold
from onestep_peft.config import OneStepConfig
from onestep_peft.head_trainer import BEFORE, CHOSEN, HeadTrainer
from onestep_peft.held_out import by_content, key_of_the_input, listed
from onestep_peft.last_fit import Known, LastFit


class FinishingTrainer(HeadTrainer):
    """Fits the head to the held-out rows, too, and lets it decide as an F1 asks where that is the metric."""

    def measure(self, stage: str) -> None:
        """As before; but held-out rows are not scored by a head that knows them."""
        if self.evaluation_sets or self._noted(CHOSEN) is None:
            super().measure(stage)

    @property
    def is_as_before(self) -> bool:
        """As before, and the head decides as it did."""
        return super().is_as_before and not self.report.threshold

    def finish_head(self) -> None:
        """After the last step: what there is to do with held-out rows that are not evaluated.

        Where there is no evaluation set the held-out rows are scored, and so they are before.
        """
        config = cast(OneStepConfig, self.args)
        if self.held_out is not None and self.fits_head():
            moved = self._noted(BEFORE) is not None
            if (moved and config.refit_on_held_out) or self._has_a_threshold:
                if not self.evaluation_sets:
                    self.measure("after")
                with self.clock("head"):
                    self._finish(moved)
        self._fitted_to = None

    def _finish(self, moved: bool) -> None:
        """The last fit, where the body has moved, and the threshold."""
        assert self.held_out is not None
        layer, found, known = self.head_layer(), None, None
        rows = listed(self.held_rows)
        rows = [rows[i] for i in by_content(rows)]
        scored = {key_of_the_input(row) for some in self.evaluation_sets.values() for row in listed(some)}
        free = torch.tensor([key_of_the_input(row) not in scored for row in rows])
        with _or_else("The head is not fitted to the held-out rows"):
            if moved:
                known = self._fitted_to or self.fit_head(install=False)  # anew where the run ends before its last pass
            if known is not None and cast(OneStepConfig, self.args).refit_on_held_out:
                found = self._fit_to_held_out(known.among(free), out_of_fold.fold_of_each(rows, last_fit.FOLDS))
        if self._has_a_threshold:
            with _or_else("The head decides from one half on"):
                held = known.held if known else self.held_out.placed(self.held_out.features(self.bare_model, layer))
                held = held.where(free.to(held.rows.device)[held.rows])
                self._decide(found.logits if found else head.current(layer).logits(held.x), held.labels)

    def _fit_to_held_out(self, known: Known, folds: Tensor) -> LastFit | None:
        if (found := last_fit.fit(known, folds, self.task)) is None:
            return None
        self._note(CHOSEN, head.current(self.head_layer()))
        self._install(found.head)
        for outcome in [one for one in self.one_step.outcomes if one.accepted][-1:]:
            outcome.last_fit = {"rows": len(known.held.rows.unique()), "loss": found.loss}
        return found

    @property
    def _has_a_threshold(self) -> bool:
        """Whether the run is for a metric that may be an F1, and the head has a bias to decide by."""
        config, layer = cast(OneStepConfig, self.args), self.head_layer()
        named = config.tune_threshold and config.metric_for_best_model is not None and self.compute_metrics is not None
        return named and layer.bias is not None and f1_threshold.is_for(self.task, layer.out_features)

    def _decide(self, logits: Tensor, labels: Tensor) -> None:
        """Lets the head say yes from where that is best, by the logits of held-out items that it had not seen."""
        expected = f1_threshold.best_f1(f1_threshold.chances(logits, labels, self.task))
        if expected is None or not self._is_for_f1(logits, labels, expected / 2):
            return
        fitted = head.current(self.head_layer())
        if self._noted(CHOSEN) is None:
            self._note(CHOSEN, fitted)
        self._install(f1_threshold.with_threshold(fitted, expected / 2, self.task))
        self.report.threshold = {"metric": self._target_name, "value": expected / 2, "expected": expected}

    def _is_for_f1(self, logits: Tensor, labels: Tensor, threshold: float) -> bool:
        def metric(way: Tensor) -> float:
            return float(self.metrics_of(way, labels)[self._target_name])

        try:
            return f1_threshold.is_f1(metric, logits, labels, self.task, threshold)
        except Exception:  # it is the user's, who may have made it for the evaluation rows alone, or without this score
            return False


@contextlib.contextmanager
def _or_else(told: str) -> Iterator[None]:
    """Goes on with a warning where memory does not suffice: smaller batches would not help, and the step is made."""
    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        warnings.warn(f"{told}: {error}", stacklevel=2)
