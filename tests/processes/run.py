"""Whole runs of several kinds, under `accelerate launch` or alone; rank 0 writes down what came out of each.

python -m tests.processes.run FOLDER [KIND ...]
python -m tests.processes.run FOLDER --cut [KIND ...]     # every pass is cut short once, and the run started again
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import save_file
from transformers import TrainerCallback

from onestep_peft import OneStepTrainer
from onestep_peft.step import processes
from tests.conftest import tiny_bert, toy_rows, trainer_for, word_tokenizer
from tests.tasks.small import counting_texts, tagged_rows, tiny_causal_llama, tiny_tagger

# Of 75 rows 53, or 60, give the gradient: batches of 8, dealt to two processes, do not come out even.
ROWS, EVALUATION = 75, 21
ADAPTER: dict[str, Any] = {"peft_config": LoraConfig(r=8, lora_alpha=8)}
ON_CPU = os.environ.get("ACCELERATE_USE_CPU", "true") == "true"
FIXED: dict[str, Any] = {"step_size": 0.05, "guard": False}
TOKENS: dict[str, Any] = {"make": tiny_tagger, "rows": tagged_rows, "metrics": ["token_f1"]}
TEXTS: dict[str, Any] = {"make": tiny_causal_llama, "rows": counting_texts}
KINDS: dict[str, dict[str, Any]] = {
    "lora, auto": {**ADAPTER},
    "lora, kfac": {**ADAPTER, "direction": "kfac", **FIXED},
    "lora, whole head": {**ADAPTER, "direction": "kfac", **FIXED, "head_folds": 1},
    "lora, many folds": {**ADAPTER, "direction": "kfac", **FIXED, "head_folds": 7, "per_device_eval_batch_size": 3},
    "lora, plain": {**ADAPTER, "direction": "sgd", "step_size": 0.1},
    "lora, sign": {**ADAPTER, "direction": "sign", "step_size": 0.001, "guard": False},
    "lora, two steps": {**ADAPTER, "max_steps": 2},
    "lora, sampled": {**ADAPTER, "direction": "kfac", **FIXED, "covariance_rows": 20},
    "lora, slices": {**ADAPTER, "slices": 3, "direction": "kfac", **FIXED},
    "lora, auto, walk": {**ADAPTER, "slices": 4, "guard": False},
    "lora, tokens": {**ADAPTER, **TOKENS, "direction": "kfac", **FIXED},
    "lora, texts": {**ADAPTER, **TEXTS, "direction": "kfac", **FIXED},
    "full, kfac": {"method": "full", "direction": "kfac", **FIXED},
    "full, muon": {"method": "full", "direction": "muon", "step_size": 0.0005, "guard": False},
    "full, plain": {"method": "full", "direction": "sgd", "step_size": 0.1},
    "full, texts": {**TEXTS, "method": "full", "direction": "kfac", **FIXED},
    "prompt, rows kept": {"method": "prompt_tuning", "direction": "natural", **FIXED},
    "prompt, Gram matrix": {
        "peft_config": PromptTuningConfig(num_virtual_tokens=1), "direction": "natural", **FIXED,
    },
    "prompt, small steps": {"method": "prompt_tuning", "slices": 12, "guard": False},
    "activation checkpointing": {**ADAPTER, "direction": "kfac", **FIXED, "gradient_checkpointing": True},
}  # fmt: skip
CUT = ("lora, auto", "full, kfac", "prompt, rows kept")


class Cut(TrainerCallback):
    """Ends the call after three micro-batches, in every process."""

    def __init__(self) -> None:
        self.left = 3

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def trainer_of(folder: Path, kind: str, **options: Any) -> OneStepTrainer:
    settings = dict(KINDS[kind])
    rows, model = settings.pop("rows", toy_rows), settings.pop("make", tiny_bert)()
    torch.manual_seed(7)  # PEFT draws A at random
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[SEP]"
    return trainer_for(
        folder, rows(ROWS, 1), model=model, processing_class=tokenizer, eval_dataset=rows(EVALUATION, 2),
        **{
            "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "search_fraction": 0.3,
            "save_pass_minutes": 0, "use_cpu": ON_CPU, **settings, **options,
        },
    )  # fmt: skip


def run(folder: Path, kind: str, cut: bool) -> None:
    output, saved = folder / kind, {"save_pass_batches": 2} if cut else {}
    if cut:
        try:
            trainer_of(output, kind, **saved, callbacks=[Cut()]).train()
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the pass was to be cut short")
    trainer = trainer_of(output, kind, **saved)
    result = trainer.train()
    everywhere = processes.objects({name: p.detach().cpu() for name, p in trainer.model.state_dict().items()})
    if processes.rank() > 0:
        return
    assert all(torch.equal(ours, theirs[name]) for theirs in everywhere for name, ours in everywhere[0].items())
    moved = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    moved |= trainer.fixed_in_the_pass()
    save_file(moved, folder / f"{kind}.safetensors")
    report = {
        "processes": processes.number(),
        "rows": trainer.report.rows,
        "steps": trainer.report.steps,
        "metrics": trainer.report.metrics,
        "train_loss": result.training_loss,
        "resumed": [entry["resumed_batch"] for entry in trainer.state.log_history if "resumed_batch" in entry],
    }
    (folder / f"{kind}.json").write_text(json.dumps(report))


def main() -> None:
    torch.set_num_threads(1)
    folder, *kinds = (word for word in sys.argv[1:] if word != "--cut")
    cut = "--cut" in sys.argv
    for kind in kinds or (CUT if cut else KINDS):
        run(Path(folder), kind, cut)


if __name__ == "__main__":
    main()
