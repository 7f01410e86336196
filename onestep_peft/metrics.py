"""Metrics by `evaluate`: four that need no network, any `evaluate.Metric`, any name that `evaluate.load` finds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from onestep_peft.errors import nearest

_FEATURES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})


def _counts(predictions: np.ndarray, references: np.ndarray, average: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives, predicted and true counts by class, `(classes,)` each: class 1 alone for "binary"."""
    classes = np.array([1]) if average == "binary" else np.unique(np.concatenate([predictions, references]))
    hits = np.array([np.sum((predictions == c) & (references == c)) for c in classes])
    predicted = np.array([np.sum(predictions == c) for c in classes])
    true = np.array([np.sum(references == c) for c in classes])
    return hits, predicted, true


def _mean_ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Mean over classes; a class with nothing in the denominator scores 0, as scikit-learn has it."""
    return float(np.mean(np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)))


class _Bundled(evaluate.Metric):
    """A metric of predicted and true classes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=_FEATURES)


class Accuracy(_Bundled):
    """Share of rows whose class is right."""

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class Precision(_Bundled):
    """Of the rows given a class, the share that has it; `average` is "binary" (class 1) or "macro"."""

    def _compute(self, *, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        hits, predicted, _ = _counts(np.asarray(predictions), np.asarray(references), average)
        return {"precision": _mean_ratio(hits, predicted)}


class Recall(_Bundled):
    """Of the rows of a class, the share that was found; `average` is "binary" (class 1) or "macro"."""

    def _compute(self, *, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        hits, _, true = _counts(np.asarray(predictions), np.asarray(references), average)
        return {"recall": _mean_ratio(hits, true)}


class F1(_Bundled):
    """Harmonic mean of a class's precision and recall; `average` is "binary" (class 1) or "macro"."""

    def _compute(self, *, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        hits, predicted, true = _counts(np.asarray(predictions), np.asarray(references), average)
        return {"f1": _mean_ratio(2 * hits, predicted + true)}


#: Metrics that need no network, by name.
BUNDLED: dict[str, type[_Bundled]] = {"accuracy": Accuracy, "precision": Precision, "recall": Recall, "f1": F1}


def resolve(metrics: Sequence[str | evaluate.EvaluationModule]) -> list[evaluate.EvaluationModule]:
    """Metric objects for names and objects.

    Raises:
        ValueError: A name that is neither bundled nor found by `evaluate.load`.
    """
    return [_resolved(metric) for metric in metrics]


def _resolved(metric: Any) -> evaluate.EvaluationModule:
    if isinstance(metric, str):
        return _by_name(metric)
    if not isinstance(metric, evaluate.EvaluationModule):
        raise ValueError(
            f"{metric!r} is neither a metric's name nor an object of evaluate.Metric. Pass one of the two."
        )
    return metric


def _by_name(name: str) -> evaluate.EvaluationModule:
    if name in BUNDLED:
        return BUNDLED[name](keep_in_memory=True)
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # evaluate raises FileNotFoundError, ConnectionError, ImportError, ... for one cause
        raise ValueError(
            f"No metric {name!r}.{nearest(name, BUNDLED)} It is not one of the bundled {', '.join(BUNDLED)}, and "
            f"`evaluate.load` does not find it ({type(error).__name__}: {error})."
        ) from error


def compute_metrics(metrics: Sequence[evaluate.EvaluationModule], classes: int) -> Callable[..., dict[str, float]]:
    """A function for Trainer's `compute_metrics` with `batch_eval_metrics=True`: it keeps classes, never logits.

    Args:
        metrics: Metrics of predicted and true classes.
        classes: Number of classes. A metric that can average over classes is averaged (macro) from three on.
    """
    average = "binary" if classes == 2 else "macro"
    options = [
        {"average": average} if "average" in inspect.signature(metric._compute).parameters else {} for metric in metrics
    ]

    def compute(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = _array(prediction.label_ids)
        labelled = labels != -100
        predicted = _array(logits).argmax(-1)[labelled]
        for metric in metrics:
            metric.add_batch(predictions=predicted, references=labels[labelled])
        if not compute_result:
            return {}
        results: dict[str, float] = {}
        for metric, option in zip(metrics, options, strict=True):
            results.update(metric.compute(**option) or {})
        return results

    return compute


def _array(values: Any) -> np.ndarray:
    return values.float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
