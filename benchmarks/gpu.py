"""What one step costs on an accelerator: speed and peak memory, on random weights and random tokens.

    python benchmarks/gpu.py                # all that is missing, then the tables
    python benchmarks/gpu.py --size tiny    # the whole script with tiny sizes, on any machine; nothing is kept

(a) A pass (LoRA r8, `kfac`) against an epoch of Trainer with AdamW and the same LoRA, rows and batches. `bf16` means
base weights in bf16 and autocast. What to expect:

- Memory. Both hold the weights and the activations of a micro-batch. AdamW adds 16 bytes a parameter of the adapter,
  one step the statistics of every layer, in fp32, with m the smaller of its widths:
  4 · (d_in · m + d_out · m + d_in · d_out) bytes, whatever the batch: about three times the layers' weights in fp32
  where the inner width is four times the outer one (MiniLM 0.1 GiB, 1B 8.5 GiB). The step itself works a layer at a
  time, in float64.
- Speed. A token costs a frozen layer 4 · d_in · d_out flops forward and backward, and its statistics
  2 · (d_in · m + d_out · m + d_in · d_out) more: over a block 1.25 times as many, and in fp32 even under bf16. So in
  fp32 a pass takes up to 2.3 times as long as the epoch, and in bf16, where a card's fp32 units are slow, much longer.

(b) A plain `sgd` step of full bf16 weights with activation checkpointing. Gradients are summed in fp32 (a bf16 sum
loses small addends), so weights and gradient are 2 + 4 bytes a parameter. Beyond them:

- the pass: the activations of one checkpointed layer and the logits of a micro-batch, and one parameter's bf16
  gradient, which is freed as soon as it is added;
- the step: one parameter at a time, its old value (2 bytes), that in fp32 (4), the scaled gradient (4) and the sum
  (4), so 14 bytes times the largest parameter;
- the copies for an error and for the guard lie in the host's memory (where they are over 1 GiB): two of them, 2 bytes
  a parameter each.

7B: 38 GiB of weights and gradient, and less than 3 GiB more.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from results_file import Results
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from onestep_peft import OneStepConfig, OneStepTrainer
from onestep_peft.report import peak_memory

RANK, GIB = 8, 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Load:
    """A model by its shape, and the rows that it gets."""

    config: PreTrainedConfig
    rows: int
    length: int
    batch: int

    @property
    def classifies(self) -> bool:
        return isinstance(self.config, BertConfig)

    def model(self, precision: str) -> Any:
        """Random weights, made on the device: a host may have no room for them."""
        auto: Any = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        torch.manual_seed(0)
        with DEVICE:
            return auto.from_config(self.config, dtype=DTYPES[precision])

    def dataset(self, rows: int) -> Dataset:
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(5, self.config.vocab_size, (rows, self.length), generator=draw)
        labels = tokens[:, 0] % 2 if self.classifies else tokens
        mask = torch.ones_like(tokens)
        columns = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def llama(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=2048, pad_token_id=0,
        use_cache=False,
    )  # fmt: skip


def loads(size: str) -> tuple[dict[str, Load], Load]:
    """Those of (a) by name, and that of (b)."""
    if size == "tiny":
        bert = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        small = llama(32, 128, 2, 4, 2, 128)
        return {"MiniLM": Load(bert, 16, 16, 8), "1B": Load(small, 8, 16, 4)}, Load(small, 4, 16, 1)
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return {
        "MiniLM": Load(minilm, 4_096, 128, 64),
        "1B": Load(llama(2048, 8192, 16, 32, 8, 32_000), 32, 1024, 4),
    }, Load(llama(4096, 11_008, 32, 32, 32, 32_000), 8, 512, 1)


class Watch(TrainerCallback):
    """Time and peak memory of the loop, and apart from it of the optimizer's last step."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        _reset_peak()
        self._began = _now()
        self.before_step = 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.before_step = max(self.before_step, peak_memory(DEVICE))
        _reset_peak()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = _now() - self._began
        self.from_step = peak_memory(DEVICE)

    @property
    def peaks(self) -> dict[str, int]:
        return {"pass_peak_bytes": self.before_step, "step_peak_bytes": self.from_step}


def _reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def settings(load: Load, folder: str, precision: str, checkpointing: bool) -> dict[str, Any]:
    on_cpu = DEVICE.type == "cpu"
    return {
        "output_dir": folder, "use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu, "bf16": precision == "bf16",
        "per_device_train_batch_size": load.batch, "gradient_checkpointing": checkpointing, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip


def adamw(load: Load, rows: int, precision: str, checkpointing: bool) -> dict[str, Any]:
    """An epoch of Trainer."""
    adapter = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="SEQ_CLS" if load.classifies else "CAUSAL_LM"
    )
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(num_train_epochs=1, **settings(load, folder, precision, checkpointing))
        Trainer(
            get_peft_model(load.model(precision), adapter), arguments, default_data_collator,
            train_dataset=load.dataset(rows), callbacks=[watch],
        ).train()  # fmt: skip
    return {"tokens_per_second": rows * load.length / watch.seconds, **watch.peaks}


def one_step(load: Load, rows: int, precision: str, checkpointing: bool) -> dict[str, Any]:
    """A pass and a step along `kfac`, without a search: that costs the same forwards on any machine."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = OneStepTrainer(
            model=load.model(precision),
            args=OneStepConfig(
                direction="kfac", step_size=1e-6, guard=False, fit_head=False, save_pass_minutes=0,
                **settings(load, folder, precision, checkpointing),
            ),
            train_dataset=load.dataset(rows),
            data_collator=default_data_collator,
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK),
            callbacks=[watch],
        )  # fmt: skip
        trainer.train()
    sums = (total for record in trainer.one_step.statistics.values() for total in record.sums().values())
    return {
        "tokens_per_second": rows * load.length / trainer.report.seconds["pass"],
        "seconds": trainer.report.seconds,
        "statistics_bytes": sum(total.nbytes for total in sums),
        **watch.peaks,
    }


def plain_step(load: Load) -> dict[str, Any]:
    """θ ← θ − η∇L on all of the weights."""
    watch, model = Watch(), load.model("bf16")
    weights = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        OneStepTrainer(
            model=model,
            args=OneStepConfig(
                method="full", direction="sgd", step_size=1e-3, save_pass_minutes=0,
                **settings(load, folder, "bf16", True),
            ),
            train_dataset=load.dataset(load.rows),
            data_collator=default_data_collator,
            callbacks=[watch],
        ).train()  # fmt: skip
    return {"parameters": weights, "largest_parameter": largest, **watch.peaks}


RUNS = {"adamw": adamw, "one step": one_step}


def measured(run: Any, load: Load, *options: Any) -> dict[str, Any]:
    """A run's numbers, after a short one that loads the kernels; or that the memory did not suffice."""
    try:
        if options and DEVICE.type == "cuda":
            run(load, 2 * load.batch, *options)
            _free()
        return run(load, load.rows, *options) if options else run(load)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        _free()


def _free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def run_missing(size: str, results: Results) -> None:
    lora, full = loads(size)
    for model, precision, checkpointing in itertools.product(lora, DTYPES, (False, True)):
        for name, run in RUNS.items():
            key = {"run": name, "model": model, "precision": precision, "checkpointing": checkpointing}
            if results.find(**key) is None:
                results.add({**key, **measured(run, lora[model], precision, checkpointing)})
    if results.find(run="plain step") is None:
        results.add({"run": "plain step", "model": "7B", **measured(plain_step, full)})


def table(results: Results) -> str:
    return f"{_speed_table(results)}\n\n{_plain_line(results)}"


def _speed_table(results: Results) -> str:
    lines = [
        "| | | checkpointing | AdamW, tokens/s | one step's pass | AdamW, peak GiB | pass | step | its statistics |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results.rows():
        if row["run"] != "one step":
            continue
        key = {name: row[name] for name in ("model", "precision", "checkpointing")}
        epoch = results.find(run="adamw", **key) or {}
        epoch_peak = max(epoch.get("pass_peak_bytes", 0), epoch.get("step_peak_bytes", 0))
        cells = [
            row["model"], row["precision"], "yes" if row["checkpointing"] else "no", _number(epoch), _number(row),
            _gib(epoch_peak), *(_gib(row.get(f"{part}_bytes", 0)) for part in ("pass_peak", "step_peak", "statistics")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "out of memory"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else "–"


def _plain_line(results: Results) -> str:
    row = results.find(run="plain step")
    if row is None or "parameters" not in row:
        return "The plain step of 7B has not run, or ran out of memory."
    number = row["parameters"]
    return (
        f"Plain sgd step of {number / 1e9:.2f} billion bf16 weights: weights {_gib(2 * number)} GiB, fp32 gradient "
        f"{_gib(4 * number)} GiB, together {_gib(6 * number)}; peak of the pass {_gib(row['pass_peak_bytes'])}, of the "
        f"step {_gib(row['step_peak_bytes'])} (expected {_gib(6 * number + 14 * row['largest_parameter'])})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--table", action="store_true", help="draw the tables from the results that are there")
    arguments = parser.parse_args()
    if arguments.size == "full" and DEVICE.type == "cpu" and not arguments.table:
        parser.error("there is no accelerator here. `--size tiny` runs the whole script on the CPU.")
    with tempfile.TemporaryDirectory() as folder:
        results = Results("gpu", Path(folder) if arguments.size == "tiny" else None)
        if not arguments.table:
            run_missing(arguments.size, results)
        print(table(results))


if __name__ == "__main__":
    main()
