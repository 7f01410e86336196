"""One step against an epoch of AdamW on a language model: stories260K learns to speak like Shakespeare.

Protocol: every training row (a speech, cut at 128 tokens, nothing appended), one after the other as Trainer shuffles
them for AdamW; the rate of AdamW is the best of four on the validation rows; the same validation rows choose the step
and guard it. Told is the mean loss of the test rows' tokens, in nats, and the share of AdamW's fall of it that one
walk brings, in one step and in many, and three walks. No setting of the step is tuned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from results_file import Results
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from onestep_peft import OneStepConfig, OneStepTrainer
from onestep_peft.tasks import TEXT_GENERATION

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
METHODS = ("full", "lora")
# By name: a step from all rows, and what the defaults do: one from the first rows, and small ones from the others.
WALKS: dict[str, dict[str, Any]] = {"one step": {"slices": 1}, "one walk": {}, "three walks": {"max_steps": 3}}
LENGTH, SEED, RANK = 128, 0, 8
RESULTS = Results("language_model")


def rows_of(folder: Path, split: str, tokenizer: Any) -> Dataset:
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokens = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    return Dataset.from_list(
        [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in tokens if len(ids) > 1]
    )


class Setting:
    """The model, its tokenizer and the rows."""

    def __init__(self, model: Path, data: Path) -> None:
        self.model, self.tokenizer = model, AutoTokenizer.from_pretrained(model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.train, self.validation, self.test = (
            rows_of(data, split, self.tokenizer) for split in ("train", "validation", "test")
        )

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model)

    @torch.no_grad()
    def loss(self, model: Any, rows: Dataset) -> float:
        """Mean loss of the rows' tokens, in nats."""
        model.eval()
        collate = DataCollatorForTokenClassification(self.tokenizer)
        total, items = 0.0, 0.0
        for start in range(0, len(rows), 64):
            batch = collate([rows[i] for i in range(start, min(start + 64, len(rows)))]).to(model.device)
            labels = batch.pop("labels")
            total += float(TEXT_GENERATION.row_losses(model(**batch).logits, labels).double().sum())
            items += float(TEXT_GENERATION.row_items(labels).sum())
        return total / items


def adamw(setting: Setting, method: str, rate: float) -> dict[str, Any]:
    """One epoch in Trainer."""
    torch.manual_seed(SEED)
    model = setting.base()
    if method == "lora":
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, learning_rate=rate, per_device_train_batch_size=16, seed=SEED,
            report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        collate = DataCollatorForTokenClassification(setting.tokenizer)
        trainer = Trainer(model, arguments, train_dataset=setting.train, data_collator=collate)
        seconds = timed(trainer.train)
    losses = {"validation": setting.loss(model, setting.validation), "test": setting.loss(model, setting.test)}
    return {"losses": losses, "seconds": seconds}


def one_walk(setting: Setting, method: str, **options: Any) -> dict[str, Any]:
    """One walk through the rows, with defaults or with these options of the config."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = OneStepTrainer(
            model=setting.base(),
            args=OneStepConfig(
                output_dir=folder, method=method, seed=SEED, report_to="none", disable_tqdm=True,
                per_device_train_batch_size=64, per_device_eval_batch_size=64, **options,
            ),
            train_dataset=setting.train,
            search_dataset=setting.validation,
            eval_dataset=setting.test,
            processing_class=setting.tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK) if method == "lora" else None,
        )  # fmt: skip
        timed(trainer.train)
    report, model = trainer.report, trainer.model
    return {
        "losses": {"validation": setting.loss(model, setting.validation), "test": setting.loss(model, setting.test)},
        "seconds": report.seconds["total"],
        "parts": report.seconds,
        "directions": [step["direction"] for step in report.steps],
        "step_sizes": [step["step_size"] for step in report.steps],
        "accepted": [step["accepted"] for step in report.steps],
        "reported": report.metrics["after"],
    }


def timed(run: Callable[[], Any]) -> float:
    """Wall time in seconds; what Trainer prints is left out."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    return time.perf_counter() - began


def run_missing(setting: Setting) -> None:
    if RESULTS.find(run="base") is None:
        model = setting.base()
        losses = {"validation": setting.loss(model, setting.validation), "test": setting.loss(model, setting.test)}
        RESULTS.add({"run": "base", "losses": losses})
    for method in METHODS:
        for rate in RATES:
            if RESULTS.find(run="adamw", method=method, rate=rate) is None:
                RESULTS.add({"run": "adamw", "method": method, "rate": rate, **adamw(setting, method, rate)})
        for name, options in WALKS.items():
            if RESULTS.find(run=name, method=method) is None:
                RESULTS.add({"run": name, "method": method, **one_walk(setting, method, **options)})
        print(table(), flush=True)


def best_adamw(method: str) -> dict[str, Any] | None:
    """The epoch whose rate is the best on the validation rows."""
    runs = [row for row in RESULTS.rows() if row["run"] == "adamw" and row["method"] == method]
    return min(runs, key=lambda row: row["losses"]["validation"], default=None)


def table() -> str:
    base, full = RESULTS.find(run="base"), best_adamw("full")
    if base is None or full is None:
        return "Nothing has run yet."
    fall = base["losses"]["test"] - full["losses"]["test"]
    lines = ["| | test loss | of the fall | seconds |", "|---|---|---|---|"]

    def line(name: str, row: dict[str, Any]) -> None:
        share = (base["losses"]["test"] - row["losses"]["test"]) / fall
        lines.append(f"| {name} | {row['losses']['test']:.3f} | {share:.2f} | {row.get('seconds', 0):.0f} |")

    line("before", base)
    for method, name in (("full", "full weights"), ("lora", f"LoRA r{RANK}")):
        epoch = best_adamw(method)
        if epoch is not None:
            line(f"AdamW, an epoch, {name}, rate {epoch['rate']:g} of {len(RATES)}", epoch)
        for walk in WALKS:
            if (found := RESULTS.find(run=walk, method=method)) is not None:
                line(f"{walk}, {name}", found)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260K"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/lm_tinyshakespeare"))
    parser.add_argument("--table", action="store_true", help="draw the table from the results that are there")
    arguments = parser.parse_args()
    if not arguments.table:
        run_missing(Setting(arguments.model, arguments.data))
    print(table())


if __name__ == "__main__":
    main()
