"""SetFit on the rows that the other arms have: pairs that pull rows of a class together, then logistic regression.

It trains all of the encoder, from the mean of the tokens, as that encoder was made to be used.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from .settings import BASE, MAX_LENGTH, Setting

# A pair is two rows. SetFit is given so many pairs that as many rows go forward and back as in AdamW's longest run
# (2,500 pairs for 500 rows and 10 epochs): that is what fits the time. By default it would take every pair of rows,
# and those of the rarer kind more than once: 125,000 to 250,000 for 500 rows.
ROWS_A_PAIR = 2
SCRIPT = Path(__file__).with_name("setfit_run.py")


def setfit(setting: Setting, python: Path, epochs: int) -> dict[str, Any]:
    """A run in SetFit's own environment.

    Args:
        python: That environment's interpreter.
        epochs: How long AdamW's longest run is; the pairs are capped by it.
    """
    rows = setting.train()
    job: dict[str, Any] = {
        "model": str(BASE),
        "train": rows,
        "search": setting.search(),
        "test": setting.test(),
        "labels": len(setting.labels()),
        "seed": setting.seed,
        "max_length": MAX_LENGTH,
        "pairs": len(rows) * epochs // ROWS_A_PAIR,
        "threads": torch.get_num_threads(),
    }
    # Isolated (-I), so that it finds no package but its own environment's.
    run = subprocess.run([python, "-I", SCRIPT], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(run.stdout.splitlines()[-1])
    scored = {
        split: setting.scores(answer[split], [row["label"] for row in job[split]]) for split in ("search", "test")
    }
    return {
        **scored,
        "seconds": {"train": answer["seconds"], "total": answer["seconds"]},
        "forwards": 3 * ROWS_A_PAIR * answer["pairs"] + len(rows),  # the head's rows go forward once
        "pairs": answer["pairs"],
        "setfit_versions": answer["versions"],
    }
