"""Scores of rows at the stages of a run, and the target that ends it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from onestep_peft.config import OneStepConfig
from onestep_peft.errors import nearest
from onestep_peft.interruption import ResumableTrainer
from onestep_peft.report import HELD_OUT, StepReport
from onestep_peft.tally import Tally
from onestep_peft.wrapping import config_of, labels_of

# Scores that fall as a model gets better, by the ends of their names.
LOWER_IS_BETTER = ("loss", "perplexity", "mse")


class ScoringTrainer(ResumableTrainer):
    """Takes rows with text wherever Trainer takes tokens, and scores them on the way."""

    report: StepReport
    held_rows: Any
    seconds: dict[str, float]
    _tally: Tally | None = None
    _last_tally = Tally()
    _keeps_logits = False

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in Trainer; rows may hold text."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.tokenise("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in Trainer; rows may hold text, and come without labels."""
        return super().get_test_dataloader(self.tokenise("test_dataset", test_dataset, labelled=False))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer, with the mean loss of all items in place of a mean of the batches' means."""
        self._tally = self._last_tally = Tally()
        self._keeps_logits = description == "Prediction"  # `predict` gives them to its caller
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._tally = None
        loss = self._last_tally.loss
        if loss is not None and output.metrics is not None:
            scores = {"loss": loss, **self.task.scores_of_loss(loss)}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def predicted(self, logits: Any, _labels: Tensor) -> Tensor:
        """What an evaluation keeps of a batch's logits: those of a language model would fill the memory."""
        first = logits[0] if isinstance(logits, tuple) else logits
        return first if self._keeps_logits else self.task.predict(first)

    def observe(self, logits: Tensor, labels: Tensor, losses: Tensor, items: Tensor) -> None:
        """Adds a batch to the sums of the evaluation that is under way."""
        if self._tally is not None:
            self._tally.add_rows(self.task, logits, labels, losses, items, self.accelerator.gather_for_metrics)

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Books the wall time of a block under a part of the run."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def measure(self, stage: str) -> None:
        """Scores the evaluation rows at this stage of the run, once; where there are none, the held-out rows."""
        sets = self.evaluation_sets or ({} if self.held_rows is None else {"": self.held_rows})
        if not sets or self.report.metrics[stage] is not None:
            return
        self.report.scored_on = "eval_dataset" if self.evaluation_sets else HELD_OUT
        with self.clock("evaluation"):
            before = self.report.metrics["head"] or self.report.metrics["base"]  # neither in a resumed run
            if stage == "after" and before and self.is_as_before:
                self.report.metrics["after"] = before
                recall = self.report.class_recall
                if before_recall := recall.get("head") or recall.get("base"):
                    recall["after"] = before_recall
            else:
                scores: dict[str, float] = {}
                tally = Tally()
                for name, some in sets.items():
                    scores |= {f"{name}_{key}" if name else key: v for key, v in self.scores(some).items()}
                    tally.add(self._last_tally)
                self.report.metrics[stage] = scores
                self._report_classes(stage, tally)

    @property
    def is_as_before(self) -> bool:
        """Whether the run has left the model as it was at the stage before the step."""
        return not any(outcome.accepted for outcome in self.one_step.outcomes)

    def metrics_of(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """What `compute_metrics` says of some items, asked as an evaluation asks it.

        Args:
            logits: `(items, outputs)`.
            labels: `(items,)`, or `(items, outputs)`.
        """
        assert self.compute_metrics is not None
        logits, labels = logits.float().cpu(), labels.cpu()
        kept = self.preprocess_logits_for_metrics
        predictions = kept(logits, labels) if kept is not None else logits
        if self.args.batch_eval_metrics:
            found = self.compute_metrics(EvalPrediction(predictions, labels), compute_result=True)  # type: ignore
        else:
            found = self.compute_metrics(EvalPrediction(nested_numpify(predictions), labels.numpy()))
        return {name.removeprefix("eval_"): value for name, value in found.items()}

    def _report_classes(self, stage: str, tally: Tally) -> None:
        """What the scored rows have of each class, and the share of it that is found at this stage."""
        labels = labels_of(config_of(cast(nn.Module, self.model)), self.task)
        if recall := tally.recall(labels):
            self.report.class_counts = tally.counts(labels)
            self.report.class_recall[stage] = recall

    def scores(self, rows: Any) -> dict[str, float]:
        """Loss and metrics of some rows, without Trainer's callbacks."""
        result = self.evaluation_loop(
            self.get_test_dataloader(rows),
            description="Evaluation",
            # Without metrics nobody asks for logits, and those of a language model would fill the memory.
            prediction_loss_only=True if self.compute_metrics is None else None,
        )
        scores = {key.removeprefix("eval_"): value for key, value in (result.metrics or {}).items()}
        return {key: value for key, value in scores.items() if key != "model_preparation_time"}

    def check_target(self) -> None:
        """Raises a ValueError, before the pass, where `stop_at` could never be compared."""
        if cast(OneStepConfig, self.args).stop_at is None:
            return
        if self.held_rows is None:
            raise ValueError("`stop_at` needs held-out rows: give a `search_dataset`, or leave `guard` on.")
        scores = self.scores(self.held_rows)
        if self._target_name not in scores:
            near = nearest(self._target_name, scores)
            raise ValueError(f"`metric_for_best_model={self._target_name!r}` is none of {sorted(scores)}.{near}")

    @property
    def _target_name(self) -> str:
        return (self.args.metric_for_best_model or "loss").removeprefix("eval_")

    def reached_target(self) -> bool:
        """Whether the held-out rows' score is as good as `stop_at` asks."""
        target = cast(OneStepConfig, self.args).stop_at
        if target is None:
            return False
        score = self.scores(self.held_rows)[self._target_name]
        greater = self.args.greater_is_better
        if greater is None:
            greater = not self._target_name.endswith(LOWER_IS_BETTER)
        return score >= target if greater else score <= target
