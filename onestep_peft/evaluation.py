"""Scores of a trained model on labelled rows, as a run itself reports them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from onestep_peft import data
from onestep_peft import metrics as metric_names
from onestep_peft.config import OneStepConfig
from onestep_peft.preparation import Tokeniser, as_rows, is_raw
from onestep_peft.scoring import ScoringTrainer
from onestep_peft.tasks import Task, task_named, task_of
from onestep_peft.wrapping import config_of


class Evaluator(ScoringTrainer):
    """The part of OneStepTrainer that scores, for a model that is not trained any more."""

    def __init__(
        self, model: Any, tokenizer: Any, task: Task, tokenise: Tokeniser, metrics: Sequence[Any], **options: Any
    ) -> None:
        self.task = task
        self.tokenise = tokenise
        resolved = metric_names.resolve(metrics or self.task.metrics)
        with tempfile.TemporaryDirectory() as unused:  # Trainer makes its folder at once
            super().__init__(
                model=model,
                args=OneStepConfig(output_dir=unused, report_to="none", batch_eval_metrics=True, **options),
                processing_class=tokenizer,
                compute_metrics=metric_names.compute_metrics(resolved, config_of(model).num_labels),
            )


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Any,
    *,
    task: str | None = None,
    metrics: Sequence[Any] = (),
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """The mean loss and the metrics of a model on labelled rows, through the same code as a run's own scores.

    For the same rows in the same order, batch size and precision, the numbers are those of the run's report.

    Args:
        model: As `load` returns it.
        tokenizer: Its tokenizer, which also pads rows that are tokens already.
        rows: With text and labels, or tokens.
        task: As the report names it; it has the loss and the default metrics. None to tell it by the model's class.
        metrics: Names or `evaluate.Metric` objects; default by task.
        text_column: The column with the text, or two of them; guessed where it is clear.
        label_column: The column with the label; guessed where it is clear.
        **options: Fields of OneStepConfig, such as `per_device_eval_batch_size`, `bf16` or `use_cpu`.

    Raises:
        ValueError: No rows, no such column, a label that is no class of the model, an unknown metric or task.
    """
    rows = as_rows("rows", rows)
    columns = None
    if is_raw(rows):
        data.check_some(rows, "rows")
        columns = data.guess_columns(rows, text_column, label_column)
    tokenise = Tokeniser(tokenizer, columns, config_of(model))
    of = task_named(task) if task is not None else task_of(model)
    evaluator = Evaluator(model, tokenizer, of, tokenise, metrics, **options)
    return evaluator.scores(tokenise("rows", rows))
