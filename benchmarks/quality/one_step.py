"""One step, and what else this package does from one pass."""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import EvalPrediction

from onestep_peft import OneStepConfig, OneStepTrainer
from onestep_peft.step.outcome import WALK

from . import baselines
from .settings import MAX_LENGTH, Setting

RANK = 8


def one_step(setting: Setting, method: str = "lora", **options: Any) -> dict[str, Any]:
    """A run with defaults, or with these options of the config; the score of the head alone comes with it.

    The trainer is told the name of the score, by which AdamW's rate is chosen, too: where it is an F1 the head decides
    by it.
    """
    stages: list[dict[str, Any]] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        stages.append(setting.scores(prediction.predictions, prediction.label_ids))
        return {"score": stages[-1]["score"]}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = OneStepTrainer(
            model=setting.model(),
            args=OneStepConfig(
                output_dir=folder, method=method, seed=setting.seed, disable_tqdm=True, report_to="none",
                max_length=MAX_LENGTH, metric_for_best_model="score", **options,
            ),
            train_dataset=Dataset.from_list(setting.train()),
            search_dataset=Dataset.from_list(setting.search()),
            eval_dataset=Dataset.from_list(setting.test()),
            processing_class=setting.tokenizer(),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK) if method == "lora" else None,
            compute_metrics=compute_metrics,
        )  # fmt: skip
        trainer.train()
    report = trainer.report
    return {
        # The head that a walk begins with knows its first slice only.
        "head": stages[1] if trainer.slices == 1 or trainer.walks_at_once else baselines.head_alone(setting),
        "test": stages[-1],
        **({"threshold": report.threshold["value"]} if report.threshold else {}),
        "accepted": [step["accepted"] for step in report.steps],
        "directions": [step["direction"] for step in report.steps],
        "seconds": report.seconds,
        "forwards": forwards(report, trainer.lead_rows),
    }


def forwards(report: Any, lead: int) -> int:
    """Forwards of single rows that the run took; a row of the pass counts three, a head's row one.

    Args:
        lead: How many rows the head was fitted to at first.
    """
    rows, held = report.rows["gradient"], max(report.rows["search"], report.rows["guard"])
    alone = report.steps[0]["direction"] == WALK  # small steps alone, and the head that follows them
    total = (rows * 5 if alone else lead) + held  # the first head; its losses need no forward
    for step in report.steps:
        searches = [*step["candidates"], *step.get("parts", ())]
        total += held * sum(len(search["points"]) - 1 for search in searches)  # zero is known
        if step["direction"] == WALK:
            total += held  # its end is judged
        else:
            total += 3 * rows  # the small steps' rows with those of the first
            total += rows if step["accepted"] else 0  # the head once more; the held-out rows are known there
    return total
