"""What the pass costs beside a bare forward and backward through the same batches, with all linear layers' gradients.

Processor time of one thread, the pass and the bare forwards and backwards in turn, three times each, in one process;
told is the ratio of the medians. MiniLM-L6 with LoRA of rank 8, micro-batches of at most 16, as the pass makes them.
Told are the pass of one step, and that of a walk, slice by slice, without its small steps. Fetching rows and making
batches of them is in the pass's time, and not in that of the bare ones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from quality.settings import MAX_LENGTH, Setting
from results_file import Results
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from onestep_peft import OneStepConfig, OneStepTrainer

RESULTS = Results("pass_cost")
REPEATS, BATCH = 3, 16
Batch = dict[str, Tensor]


class Stopwatch(TrainerCallback):
    """Processor seconds from the start of the pass, or of each slice of it, to the step."""

    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seconds += time.process_time() - self._began


class Recording(OneStepTrainer):
    """Keeps the batches of its pass."""

    batches: list[Batch]

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


def the_pass(setting: Setting, slices: int | str) -> tuple[float, list[Batch]]:
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Recording(
            model=setting.model(),
            args=OneStepConfig(
                output_dir=folder, seed=setting.seed, disable_tqdm=True, report_to="none", max_length=MAX_LENGTH,
                per_device_train_batch_size=BATCH, direction=["kfac_schatten", "kfac"], search_budget=1,
                slices=slices, guard=False,
            ),
            train_dataset=Dataset.from_list(setting.train()),
            search_dataset=Dataset.from_list(setting.search()[:16]),  # the search is not what is timed
            processing_class=setting.tokenizer(),
            peft_config=LoraConfig(r=8, lora_alpha=16),
            callbacks=[watch],
        )  # fmt: skip
        trainer.batches = []
        trainer.train()
    return watch.seconds, trainer.batches


def bare(setting: Setting, batches: list[Batch]) -> float:
    model = setting.model().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("weight") and parameter.dim() == 2 and "embeddings" not in name)
    began = time.process_time()
    for batch in batches:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").backward()
    return time.process_time() - began


def measure(setting: Setting, slices: int | str) -> tuple[float, float]:
    seconds, batches = the_pass(setting, slices)
    return seconds, bare(setting, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder a set")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name, rows, slices in (("trec6", 500, 1), ("sst2", 500, 1), ("sst2", 3000, "auto")):
        setting = Setting(options.data, name, rows, 0)
        key = {**setting.key, "slices": slices}
        if RESULTS.find(**key) is None:
            times = [measure(setting, slices) for _ in range(REPEATS)]
            ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            RESULTS.add({**key, "pass": ours, "bare": theirs, "ratio": ours / theirs})
        found = RESULTS.find(**key)
        assert found is not None
        print(
            f"{name}, {rows} rows, {'a walk' if slices == 'auto' else 'one step'}: pass {found['pass']:.1f} s, bare "
            f"{found['bare']:.1f} s: {found['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
