"""The end of a run: what held-out rows still do for the head once they have chosen and judged everything."""

from __future__ import annotations

import math
import warnings
from typing import cast

import torch
from accelerate.utils.memory import should_reduce_batch_size

from onestep_peft import f1_threshold, head, last_fit, out_of_fold
from onestep_peft.config import OneStepConfig
from onestep_peft.head_trainer import BEFORE, CHOSEN, HeadTrainer
from onestep_peft.held_out import by_content, key_of_the_input, listed
from onestep_peft.step.outcome import StepOutcome

# The metric whose decisions are tuned, by its name in `evaluate`.
F1 = "f1"


class FinishingTrainer(HeadTrainer):
    """Fits the head to the held-out rows, too, and lets it decide as an F1 asks where that is the metric."""

    scored_by: list[str]  # names of the metrics of `evaluate`

    def measure(self, stage: str) -> None:
        """As before; but held-out rows are not scored by a head that knows them."""
        if self.evaluation_sets or self._noted(CHOSEN) is None:
            super().measure(stage)

    def finish_head(self) -> None:
        """After the last step: what there is to do with held-out rows that are not evaluated.

        Where there is no evaluation set the held-out rows are scored, and so they are before.
        """
        wanted = self.fits_head() and (cast(OneStepConfig, self.args).refit_on_held_out or self._decides_by_f1)
        if wanted and self.held_out is not None and self._noted(BEFORE) is not None:
            if not self.evaluation_sets:
                self.measure("after")
            with self.clock("head"):
                try:
                    self._finish()
                except Exception as error:
                    if not should_reduce_batch_size(error):
                        raise
                    # Smaller batches would not help, and the step is made.
                    warnings.warn(f"The head is not fitted to the held-out rows: {error}", stacklevel=2)
        self._fitted_to = None

    def _finish(self) -> None:
        known = self._fitted_to or self.fit_head(install=False)  # anew where the run ends before its last pass
        assert known is not None
        rows = listed(self.held_rows)
        rows = [rows[i] for i in by_content(rows)]
        scored = {key_of_the_input(row) for some in self.evaluation_sets.values() for row in listed(some)}
        free = torch.tensor([key_of_the_input(row) not in scored for row in rows])
        known, folds = known.among(free), out_of_fold.fold_of_each(rows, last_fit.FOLDS)
        chosen = final = head.current(self.head_layer())
        held = chosen.logits(known.held.x)  # of a head that has not seen them
        last = self._last_accepted
        if cast(OneStepConfig, self.args).refit_on_held_out and (found := last_fit.fit(known, folds, self.task)):
            final, held = found.head, found.logits
            last.last_fit = {"rows": int(free.sum()), "loss": found.loss}
        if self._decides_by_f1:
            f1 = f1_threshold.best_f1(f1_threshold.chances(held, known.held.labels, self.task))
            if f1 is not None:
                final = f1_threshold.lowered(final, f1 / 2, self.task)
                last.decision = {"metric": F1, "threshold": f1 / 2, "expected": f1}
        if final is not chosen:
            self._note(CHOSEN, chosen)
            self._install(final)

    @property
    def _last_accepted(self) -> StepOutcome:
        """What the end of the run is told of; of no step where those before a checkpoint are meant."""
        accepted = [outcome for outcome in self.one_step.outcomes if outcome.accepted]
        return accepted[-1] if accepted else StepOutcome("", 0.0, [], math.nan, math.nan, False, "")

    @property
    def _decides_by_f1(self) -> bool:
        """Whether the run is for an F1 that a threshold decides; the head then needs a bias."""
        config, layer = cast(OneStepConfig, self.args), self.head_layer()
        wanted = config.tune_threshold and self._target_name == F1 and F1 in self.scored_by
        return wanted and layer.bias is not None and f1_threshold.is_for(self.task, layer.out_features)
