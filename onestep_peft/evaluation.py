"""Scores of a trained model on labelled rows, as a run itself reports them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onestep_peft import data
from onestep_peft import metrics as metric_names
from onestep_peft.collation import check_lengths, collator_for
from onestep_peft.config import OneStepConfig
from onestep_peft.lengths import positions_of
from onestep_peft.methods import prompt_tuning
from onestep_peft.rows import Tokeniser, as_rows, is_raw
from onestep_peft.scoring import ScoringTrainer
from onestep_peft.tasks import task_of
from onestep_peft.wrapping import config_of, labels_of


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on some rows.

    Args:
        metrics: The mean loss of all items, and the metrics.
        class_counts: Items of each class; empty for a task without classes.
        class_recall: Share of each class' items that is found.
    """

    metrics: dict[str, float]
    class_counts: dict[str, int]
    class_recall: dict[str, float]


class Evaluator(ScoringTrainer):
    """The part of OneStepTrainer that scores, for a model that is not trained any more."""

    def __init__(self, model: Any, tokenizer: Any, tokenise: Tokeniser, metrics: Sequence[Any], **options: Any) -> None:
        self.task, self.tokenise = tokenise.task, tokenise
        self._labels = labels_of(config_of(model), self.task)
        scored = metric_names.function_for(metric_names.resolve(metrics), self.task, self._labels)
        with tempfile.TemporaryDirectory() as unused:  # Trainer makes its folder at once
            super().__init__(
                model=model,
                args=OneStepConfig(
                    output_dir=unused, report_to="none", batch_eval_metrics=scored is not None, **options
                ),
                processing_class=tokenizer,
                data_collator=collator_for(self.task, tokenizer, tokenise.virtual_tokens > 0),
                compute_metrics=scored,
                preprocess_logits_for_metrics=self.predicted if scored is not None else None,
            )

    def evaluation(self, rows: Any) -> Evaluation:
        """The scores of tokenised rows."""
        scores, tally = self.scores(rows), self._last_tally
        return Evaluation(scores, tally.counts(self._labels), tally.recall(self._labels))


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Any,
    *,
    metrics: Sequence[Any] = (),
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    **options: Any,
) -> Evaluation:
    """The mean loss and the metrics of a model on labelled rows, through the same code as a run's own scores.

    For the same rows, precision and `max_length`, the numbers are those of the run's report.

    Args:
        model: As `load` returns it; its class and configuration tell the task, and with it the loss.
        tokenizer: Its tokenizer, which also pads rows that are tokens already.
        rows: As the task has them (see `onestep_peft.data`), or tokenised.
        metrics: Names or `evaluate.Metric` objects; default by task.
        text_column: The column with the text, or two of them; guessed where it is clear.
        label_column: The column with the labels; guessed where it is clear.
        **options: Fields of OneStepConfig, such as `per_device_eval_batch_size`, `max_length`, `bf16` or `use_cpu`.

    Raises:
        ValueError: No rows, no such column, labels that the model does not take, an unknown metric or task.
    """
    task, rows = task_of(model), as_rows("rows", rows)
    columns = None
    if is_raw(rows):
        data.check_some(rows, "rows")
        columns = data.guess_columns(rows, text_column, label_column, task)
    tokenise = Tokeniser(
        tokenizer, columns, config_of(model), task, positions_of(model), options.get("max_length"),
        prompt_tuning.virtual_tokens(None, None, model),
    )  # fmt: skip
    evaluator = Evaluator(model, tokenizer, tokenise, metrics, **options)
    rows = tokenise("rows", rows)
    check_lengths(rows, task, evaluator.data_collator, tokenizer)
    return evaluator.evaluation(rows)
