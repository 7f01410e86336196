"""Metrics by `evaluate`: some that need no network, any `evaluate.Metric`, any name that `evaluate.load` finds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from onestep_peft.errors import nearest
from onestep_peft.tasks import Task
from onestep_peft.tasks.task import MULTI_LABEL, REGRESSION, UNLABELLED

_ITEMS = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_ROWS = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ("predictions", "references")})
_TAGS = datasets.Features({name: datasets.List(datasets.Value("string")) for name in ("predictions", "references")})
_NUMBERS = datasets.Features({name: datasets.Value("float64") for name in ("predictions", "references")})
OUTSIDE = "O"


def _counts(predictions: np.ndarray, references: np.ndarray, average: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives, predicted and true counts by class, `(classes,)` each.

    Class 1 alone for "binary", and for "micro" over 0/1 decisions `(rows, classes)`: one count for them all.
    """
    classes = np.unique(np.concatenate([predictions, references])) if average == "macro" else np.array([1])
    hits = np.array([np.sum((predictions == c) & (references == c)) for c in classes])
    predicted = np.array([np.sum(predictions == c) for c in classes])
    true = np.array([np.sum(references == c) for c in classes])
    return hits, predicted, true


def _mean_ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Mean over classes; a class with nothing in the denominator scores 0, as scikit-learn has it."""
    return float(np.mean(np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)))


class _Bundled(evaluate.Metric):
    """A metric of predicted and true classes: one an item, or a row of 0/1 decisions."""

    kinds: Any = [_ITEMS, _ROWS]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=self.kinds)


class Accuracy(_Bundled):
    """Share of rows whose class is right; with several labels a row, whose every label is."""

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        same = np.asarray(predictions) == np.asarray(references)
        return {"accuracy": float(np.mean(same.reshape(len(same), -1).all(1)))}


class Precision(_Bundled):
    """Of the rows given a class, the share that has it; `average` is "binary" (class 1), "macro" or "micro"."""

    def _compute(self, *, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        hits, predicted, _ = _counts(np.asarray(predictions), np.asarray(references), average)
        return {"precision": _mean_ratio(hits, predicted)}


class Recall(_Bundled):
    """Of the rows of a class, the share that was found; `average` is "binary" (class 1), "macro" or "micro"."""

    def _compute(self, *, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        hits, _, true = _counts(np.asarray(predictions), np.asarray(references), average)
        return {"recall": _mean_ratio(hits, true)}


class F1(_Bundled):
    """Harmonic mean of a class's precision and recall; `average` is "binary" (class 1), "macro" or "micro"."""

    def _compute(self, *, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        hits, predicted, true = _counts(np.asarray(predictions), np.asarray(references), average)
        return {"f1": _mean_ratio(2 * hits, predicted + true)}


class TokenF1(_Bundled):
    """Micro F1 over the tokens whose tag is, or is taken for, another than "O"."""

    kinds = _TAGS

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        pairs = [pair for rows in zip(predictions, references, strict=True) for pair in zip(*rows, strict=True)]
        hits = sum(predicted == true != OUTSIDE for predicted, true in pairs)
        named = sum((predicted != OUTSIDE) + (true != OUTSIDE) for predicted, true in pairs)
        return {"token_f1": 2 * hits / named if named else 0.0}


class EntityF1(_Bundled):
    """Micro F1 over entities: one is right where its kind, its beginning and its end are."""

    kinds = _TAGS

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        rows = [(set(entities(p)), set(entities(t))) for p, t in zip(predictions, references, strict=True)]
        hits = sum(len(predicted & true) for predicted, true in rows)
        named = sum(len(predicted) + len(true) for predicted, true in rows)
        return {"entity_f1": 2 * hits / named if named else 0.0}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first item, item after the last) of the entities in a row of BIO tags.

    An "I-" of another kind than the tag before it begins an entity too, as in the evaluation of CoNLL-2000.
    """
    found: list[tuple[str, int, int]] = []
    start, kind = 0, ""
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        if kind and not (prefix == "I" and name == kind):
            found.append((kind, start, i))
            kind = ""
        if prefix in ("B", "I") and name and not kind:
            start, kind = i, name
    return found


class MeanSquaredError(_Bundled):
    """Mean of the squared errors."""

    kinds = _NUMBERS

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return {"mse": float(np.mean(np.square(np.asarray(predictions) - np.asarray(references))))}


class Pearson(_Bundled):
    """Pearson's correlation; not a number where one side never varies."""

    kinds = _NUMBERS

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        x, y = (np.asarray(values) - np.mean(values) for values in (predictions, references))
        norm = float(np.sqrt(np.sum(x * x) * np.sum(y * y)))
        return {"pearson": float(np.sum(x * y)) / norm if norm > 0 else float("nan")}


#: Metrics that need no network, by name.
BUNDLED: dict[str, type[_Bundled]] = {
    "accuracy": Accuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "token_f1": TokenF1,
    "entity_f1": EntityF1,
    "mse": MeanSquaredError,
    "pearson": Pearson,
}


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


def default_names(task: Task, labels: Sequence[str]) -> list[str]:
    """A task's metrics, less that of entities where no class begins one."""
    return [name for name in task.metrics if name != "entity_f1" or any(label.startswith("B-") for label in labels)]


def function_for(
    metrics: Sequence[evaluate.EvaluationModule], task: Task, labels: Sequence[str]
) -> Callable[..., dict[str, float]] | None:
    """`compute_metrics` for the metrics that the user gives, or else the task's; None where there are neither."""
    metrics = metrics or resolve(default_names(task, labels))
    return compute_metrics(metrics, task, labels) if metrics else None


def compute_metrics(
    metrics: Sequence[evaluate.EvaluationModule], task: Task, labels: Sequence[str]
) -> Callable[..., dict[str, float]]:
    """A function for Trainer's `compute_metrics` with `batch_eval_metrics=True`, on logits or what `task.predict`
    leaves of them.

    What a metric gets follows from the features that it declares: lists of strings are a row's tags, lists of numbers
    a row's decisions (one a class), and plain numbers single items.

    Args:
        labels: Names of the classes. A metric that can average over classes takes "binary" for two classes, "macro"
            from three on, and for several labels a row "micro", over all decisions.
    """
    several = task.problem_type == MULTI_LABEL
    kinds = [_takes(metric, several) for metric in metrics]
    options = [_options(metric, kind, several, len(labels)) for metric, kind in zip(metrics, kinds, strict=True)]

    def compute(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        rows = _labelled_rows(task, prediction)
        for metric, kind in zip(metrics, kinds, strict=True):
            if rows:
                predicted, true = zip(*rows, strict=True)
                metric.add_batch(predictions=_given(predicted, kind, labels), references=_given(true, kind, labels))
        if not compute_result:
            return {}
        results: dict[str, float] = {}
        for metric, option in zip(metrics, options, strict=True):
            results.update(metric.compute(**option) or {})
        return results

    return compute


Kind = Literal["items", "rows", "tags"]


def _takes(metric: evaluate.EvaluationModule, several: bool) -> Kind:
    """What a metric compares: items, or whole rows of numbers or of names."""
    features = metric.features if isinstance(metric.features, list) else [metric.features]
    lists = [kind["predictions"].feature for kind in features if hasattr(kind["predictions"], "feature")]
    if any(getattr(inner, "dtype", None) == "string" for inner in lists):
        return "tags"
    return "rows" if lists and (several or len(lists) == len(features)) else "items"


def _options(metric: Any, kind: Kind, several: bool, classes: int) -> dict[str, str]:
    if "average" not in inspect.signature(metric._compute).parameters:
        return {}
    if several:
        return {"average": "micro" if kind == "rows" else "binary"}
    return {"average": "binary" if classes == 2 else "macro"}


def _labelled_rows(task: Task, prediction: EvalPrediction) -> list[tuple[np.ndarray, np.ndarray]]:
    """By row the predictions and labels of its labelled items; rows without any are left out."""
    predictions = prediction.predictions
    first = torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)
    if first.is_floating_point():  # logits, as `Trainer.predict` keeps them
        first = task.predict(first)
    pair = task.aligned(first, torch.as_tensor(prediction.label_ids))
    predicted, true = (_array(part.reshape(len(part), -1)) for part in pair)
    known = ~np.isnan(true) if task.problem_type == REGRESSION else true != UNLABELLED
    return [(p[k], t[k]) for p, t, k in zip(predicted, true, known, strict=True) if k.any()]


def _given(rows: Sequence[np.ndarray], kind: Kind, labels: Sequence[str]) -> Any:
    if kind == "items":
        return np.concatenate(rows)
    return [[labels[int(i)] for i in row] if kind == "tags" else row.tolist() for row in rows]


def _array(values: Tensor) -> np.ndarray:
    return (values.float() if values.is_floating_point() else values).cpu().numpy()
