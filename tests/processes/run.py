"""Whole runs of several kinds, under `accelerate launch` or alone; rank 0 writes down what came out of each.

python -m tests.processes.run FOLDER [KIND ...]
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

from onestep_peft.step import processes
from tests.conftest import tiny_bert, toy_rows, trainer_for

ROWS = toy_rows(
    75, seed=1
)  # without the held-out ones 53 or 60: batches of 8, dealt to two processes, do not come out even
EVALUATION = toy_rows(21, seed=2)
ADAPTER: dict[str, Any] = {"peft_config": LoraConfig(r=8, lora_alpha=8)}
ON_CPU = os.environ.get("ACCELERATE_USE_CPU", "true") == "true"
FIXED: dict[str, Any] = {"step_size": 0.05, "guard": False}
KINDS: dict[str, dict[str, Any]] = {
    "lora, auto": {**ADAPTER},
    "lora, kfac": {**ADAPTER, "direction": "kfac", **FIXED},
    "lora, plain": {**ADAPTER, "direction": "sgd", "step_size": 0.1},
    "lora, sign": {**ADAPTER, "direction": "sign", "step_size": 0.001, "guard": False},
    "lora, two steps": {**ADAPTER, "max_steps": 2},
    "full, kfac": {"method": "full", "direction": "kfac", **FIXED},
    "full, muon": {"method": "full", "direction": "muon", **FIXED, "step_size": 0.005},
    "full, plain": {"method": "full", "direction": "sgd", "step_size": 0.1},
    "prompt, rows kept": {"method": "prompt_tuning", "direction": "natural", **FIXED},
    "prompt, Gram matrix": {
        "peft_config": PromptTuningConfig(num_virtual_tokens=1), "direction": "natural", **FIXED,
    },
    "activation checkpointing": {**ADAPTER, "direction": "kfac", **FIXED, "gradient_checkpointing": True},
}  # fmt: skip


def run(folder: Path, kind: str) -> None:
    model = tiny_bert()
    torch.manual_seed(7)  # PEFT draws A at random
    trainer = trainer_for(
        folder / "output", list(ROWS), model=model, eval_dataset=list(EVALUATION), per_device_train_batch_size=8,
        per_device_eval_batch_size=4, save_pass_minutes=0, use_cpu=ON_CPU, **{"search_fraction": 0.3, **KINDS[kind]},
    )  # fmt: skip
    output = trainer.train()
    everywhere = processes.objects({name: p.detach().cpu() for name, p in trainer.model.state_dict().items()})
    if processes.rank() > 0:
        return
    assert all(torch.equal(ours, theirs[name]) for theirs in everywhere for name, ours in everywhere[0].items())
    name = kind.replace(", ", "-").replace(" ", "_")
    moved = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(moved, folder / f"{name}.safetensors")
    report = {
        "processes": processes.number(),
        "rows": trainer.report.rows,
        "steps": trainer.report.steps,
        "metrics": trainer.report.metrics,
        "train_loss": output.training_loss,
    }
    (folder / f"{name}.json").write_text(json.dumps(report))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for kind in sys.argv[2:] or KINDS:
        run(folder, kind)


if __name__ == "__main__":
    main()
