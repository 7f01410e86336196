"""The model card: `onestep.json` as a README.md that the Hub understands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from onestep_peft import tasks
from onestep_peft.report import STAGES, StepReport

TEMPLATE = Path(__file__).with_name("card.md")
SHOWN_LABELS = 30
NO_LOSS = "–"
# What the folder is to its base, by the report's method.
KINDS = {
    "lora": "A LoRA adapter for",
    "prompt_tuning": "A tuned prompt (an adapter) for",
    "full": "A fully tuned copy of",
    "merged": "A LoRA adapter merged into",
}
# What the card's example calls the pipeline, by task.
EXAMPLES = {"text-classification": "classify", "token-classification": "tag", "text-generation": "generate"}


def card(report: StepReport, repo_id: str | None = None) -> str:
    """The card as Markdown with YAML metadata, drawn from the report alone.

    Args:
        repo_id: Where it will be; None for a folder that nobody has pushed.
    """
    where, whole = repo_id or "path/to/this/folder", report.method == "full"
    task = tasks.named(report.task, report.problem_type)
    # Rows that came as tokens leave no tokenizer in the folder; the base has one.
    tokenizer = where if "tokenizer_config.json" in report.files or not report.files else report.base_model
    return str(
        ModelCard.from_template(
            _metadata(report, where),
            template_path=str(TEMPLATE),
            name=where.rpartition("/")[2] if repo_id else f"A {report.task} {'model' if whole else 'adapter'}",
            kind=KINDS[report.merged_from and "merged" or report.method],
            whole=whole,
            where=where,
            tokenizer=tokenizer,
            base=hub_base(report),
            revision=report.base_revision,
            task=report.task,
            labels=_labels(report.labels),
            outputs=report.outputs or len(report.labels),
            auto=task.auto_model.__name__ if whole else task.auto_peft,
            prompted=report.method == "prompt_tuning" and task.by_token,
            example=EXAMPLES[report.task],
            steps=[_step(step) for step in report.steps],
            rows=report.rows,
            seconds=_seconds(report.seconds),
            memory=f"{report.peak_memory_bytes / 2**20:,.0f} MiB",
            datasets=_datasets(report),
            picture=any(step["candidates"] for step in report.steps),
            table=markdown_table(report),
            fitted=bool(report.metrics.get("head")),
            doubt=report.doubt,
            decision=report.decision,
        )
    )


def hub_base(report: StepReport) -> str | None:
    """The base's Hub id, or None for a folder: its path means nothing elsewhere, and the Hub refuses such a card."""
    return report.base_model if report.base_revision is not None else None


def _metadata(report: StepReport, where: str) -> ModelCardData:
    names = sorted({name for found in report.datasets.values() for name in found})
    results = _results(report)
    return ModelCardData(
        base_model=hub_base(report),
        library_name="transformers" if report.method == "full" else "peft",
        pipeline_tag=report.task,
        tags=["onestep_peft", report.method],
        datasets=names or None,
        model_name=where.rpartition("/")[2],
        eval_results=results or None,
    )


def _results(report: StepReport) -> list[EvalResult]:
    """The scores after the step; a set that is not on the Hub is told as such, never as the training set."""
    known = report.datasets.get("evaluation", [])
    scores = report.metrics.get("after") or {}
    return [
        EvalResult(
            task_type=report.task,
            dataset_type=known[0] if len(known) == 1 else "unknown",
            dataset_name=known[0] if len(known) == 1 else report.scored_on if report.doubt else "evaluation rows",
            metric_type=name,
            metric_value=value,
        )
        for name, value in scores.items()
        if value is not None and math.isfinite(value)
    ]


def markdown_table(report: StepReport) -> str:
    """The scores at each stage, a row a stage; empty where there are none."""
    stages = [(stage, report.metrics[stage] or {}) for stage in STAGES if report.metrics.get(stage)]
    names = list(dict.fromkeys(name for _, scores in stages for name in scores))
    if not names:
        return ""
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {stage} | {' | '.join(_number(scores.get(name)) for name in names)} |" for stage, scores in stages]
    return "\n".join(lines)


def _step(step: dict[str, Any]) -> dict[str, str]:
    verdict = step["reason"] if step["accepted"] else f"{step['reason']}; the parameters are as before the step"
    verdict += "; the head was fitted again after it" if step.get("head_refitted") else ""
    verdict += "; in the end the head was fitted to the held-out rows, too" if step.get("last_fit") else ""
    return {
        "direction": step["direction"],
        "size": f"{step['step_size']:.4g}",
        "before": _number(step["loss_before"]),
        "after": _number(step["loss_after"]),
        "lost": f"{100 * (step.get('energy_lost') or 0):.1f} %",
        "verdict": verdict.replace("|", "/"),
    }


def _number(value: float | None) -> str:
    return NO_LOSS if value is None or not math.isfinite(value) else f"{value:.4f}"


def _seconds(seconds: dict[str, float]) -> str:
    parts = [f"{name} {value:.1f}" for name, value in seconds.items() if name not in ("total", "evaluation") and value]
    return f"{seconds.get('total', 0):.1f} s" + (f" ({', '.join(parts)})" if parts else "")


def _labels(labels: list[str]) -> str:
    # A name is data: a backtick or a line break in it must not leave its code span.
    shown = [f"`{' '.join(label.replace('`', chr(39)).split())}`" for label in labels[:SHOWN_LABELS]]
    more = len(labels) - len(shown)
    return ", ".join(shown) + (f" and {more} more (in `onestep.json`)" if more else "")


def _datasets(report: StepReport) -> str:
    return "; ".join(
        f"{role} rows from {', '.join(f'[`{name}`](https://huggingface.co/datasets/{name})' for name in names)}"
        for role, names in report.datasets.items()
        if names
    )
