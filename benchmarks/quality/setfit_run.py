"""Trains SetFit on the rows of one setting, in SetFit's own environment, where neither this package nor its parts are.

Reads one JSON object from the standard input: `model` (folder of the encoder), `train`, `search`, `test` (rows with
`text` and `label`), `labels` (their number), `seed`, `max_length` in tokens, `pairs` (at most so many) and `threads`.
The last line on the standard output is one too: `search` and `test` (class log-probabilities in nats, row by row),
`seconds` of training, `pairs` used, and `versions`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from setfit import logging as setfit_logging
from sklearn.linear_model import LogisticRegression
from transformers.trainer_callback import ProgressCallback

BATCH = 16
# The head's inverse penalty. SetFit's own, 1, leaves embeddings of length 1 with many classes far from fitted; the
# search rows choose, as they choose AdamW's rate.
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
# The least probability of a class: one without training rows is not in SetFit's head at all, and keeps the log-loss
# finite so.
LEAST = 1e-6


def trained(job: dict[str, Any]) -> tuple[SetFitModel, float, int]:
    """The model after one epoch of pairs and the head, seconds of both, and the number of pairs."""
    model = SetFitModel.from_pretrained(job["model"], device="cuda" if torch.cuda.is_available() else "cpu")
    model.model_body.max_seq_length = job["max_length"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, batch_size=BATCH, num_epochs=1, max_steps=job["pairs"] // BATCH, seed=job["seed"],
            report_to="none", show_progress_bar=False, logging_strategy="no", save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, Dataset.from_list(job["train"]))
        trainer.remove_callback(ProgressCallback)
        began = time.perf_counter()
        trainer.train()  # draws the pairs, too
        model.model_head = chosen_head(model, job)
        seconds = time.perf_counter() - began
        return model, seconds, BATCH * trainer.st_trainer.state.global_step


def chosen_head(model: SetFitModel, job: dict[str, Any]) -> LogisticRegression:
    """The head at the penalty that is best on the search rows."""
    split = {name: model.encode([row["text"] for row in job[name]]) for name in ("train", "search")}
    labels = {name: [row["label"] for row in job[name]] for name in split}
    heads = [LogisticRegression(C=c, max_iter=1000).fit(split["train"], labels["train"]) for c in PENALTIES]
    return max(heads, key=lambda head: head.score(split["search"], labels["search"]))


def log_probabilities(model: SetFitModel, rows: Sequence[dict[str, Any]], labels: int) -> list[list[float]]:
    """Rows × labels; the head has columns only for the classes that it was fitted on."""
    found = np.full((len(rows), labels), LEAST)
    found[:, model.model_head.classes_] = model.predict_proba([row["text"] for row in rows], as_numpy=True)
    return np.log(found.clip(min=LEAST)).tolist()


def main() -> None:
    job = json.load(sys.stdin)
    setfit_logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    model, seconds, pairs = trained(job)
    scored = {split: log_probabilities(model, job[split], job["labels"]) for split in ("search", "test")}
    versions = {name: version(name) for name in ("setfit", "sentence-transformers", "transformers", "torch")}
    print(json.dumps({**scored, "seconds": seconds, "pairs": pairs, "versions": versions}))


if __name__ == "__main__":
    main()
