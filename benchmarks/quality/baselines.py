"""What people would use instead: AdamW in Trainer on a LoRA of rank 8 or a prompt, from a random or the fitted head."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from onestep_peft import head
from onestep_peft.methods import prompt_tuning

from . import thresholds
from .settings import MAX_LENGTH, Setting

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
# A prompt's entries move alone, without a second factor that grows with them, and take larger rates.
PROMPT_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
RANK = 8
# Every linear layer of the encoder; PEFT adds the head to what is trained.
TARGETS = r".*encoder.*\.(query|key|value|dense)"


def adamw(setting: Setting, rate: float, epochs: int, fitted: bool = False, threshold: bool = False) -> dict[str, Any]:
    """LoRA and head by AdamW with Trainer's defaults (linear decay, batches of 16).

    Args:
        fitted: Whether to begin from the head that one step begins from.
        threshold: Whether the search rows also choose the threshold of an F1.
    """
    return _adamw(setting, get_peft_model(setting.model(), _lora()), rate, epochs, fitted, threshold)


def prompt_adamw(setting: Setting, rate: float, epochs: int, fitted: bool = False) -> dict[str, Any]:
    """A prompt and the head in the same way; the prompt is the one that one step begins from."""
    model, config = setting.model(), prompt_tuning.default()
    config.task_type = "SEQ_CLS"
    torch.manual_seed(setting.seed)  # the prompt is drawn
    peft = get_peft_model(model, config)
    prompt_tuning.begin_like_a_row(peft, setting.tokenizer().cls_token_id)
    return _adamw(setting, peft, rate, epochs, fitted)


def _adamw(
    setting: Setting, peft: Any, rate: float, epochs: int, fitted: bool, threshold: bool = False
) -> dict[str, Any]:
    tokenizer = setting.tokenizer()
    seconds: dict[str, float] = {}
    if fitted:
        began = time.perf_counter()
        fit_head(setting, peft, tokenizer)
        seconds["head"] = time.perf_counter() - began
    return trained(setting, peft, tokenizer, rate, epochs, seconds=seconds, threshold=threshold)


def loraga(setting: Setting, rate: float, steps: int = -1) -> dict[str, Any]:
    """PEFT's LoRA-GA initialisation from all training rows, then an epoch, or so many steps, of AdamW."""
    model, tokenizer = setting.model(), setting.tokenizer()
    rows = tokenised(setting.train(), tokenizer)
    collate: Any = DataCollatorWithPadding(tokenizer)
    fit_head(setting, model, tokenizer)

    def walk() -> None:
        with torch.enable_grad():
            for start in range(0, len(rows), 16):
                batch = collate([rows[i] for i in range(start, min(start + 16, len(rows)))])
                model(**batch.to(model.device)).loss.backward()

    began = time.perf_counter()
    config = _lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, walk)
    peft = get_peft_model(model, config)
    seconds = {"initialisation": time.perf_counter() - began}
    found = trained(setting, peft, tokenizer, rate, 1, steps=steps, seconds=seconds)
    return {**found, "forwards": found["forwards"] + 3 * len(rows)}  # the initialisation's walk


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="SEQ_CLS", **options)


def trained(
    setting: Setting,
    model: Any,
    tokenizer: Any,
    rate: float,
    epochs: int,
    *,
    steps: int = -1,
    seconds: dict[str, float],
    threshold: bool = False,
) -> dict[str, Any]:
    """Trains in Trainer, and scores the search and the test rows, on request with a threshold of their own, too."""
    rows = tokenised(setting.train(), tokenizer)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, max_steps=steps, learning_rate=rate, per_device_train_batch_size=16,
            per_device_eval_batch_size=32, seed=setting.seed, report_to="none", disable_tqdm=True, save_strategy="no",
            logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), rows)
        began = time.perf_counter()
        trainer.train()
        seconds["train"] = time.perf_counter() - began
        predicted = {
            name: trainer.predict(tokenised(some, tokenizer))[:2]
            for name, some in (("search", setting.search()), ("test", setting.test()))
        }
    scored = {name: setting.scores(*some) for name, some in predicted.items()}
    if threshold:
        scored |= thresholds.scores(setting, *predicted["search"], *predicted["test"])
    walked = len(rows) * epochs if steps < 0 else 16 * steps
    return {**scored, "seconds": {**seconds, "total": sum(seconds.values())}, "forwards": 3 * walked}


def head_alone(setting: Setting) -> dict[str, Any]:
    """The test score of that head on the frozen encoder."""
    model, tokenizer = setting.model(), setting.tokenizer()
    fit_head(setting, model, tokenizer)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(folder, per_device_eval_batch_size=32, report_to="none", disable_tqdm=True)
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer))
        return setting.scores(*trainer.predict(tokenised(setting.test(), tokenizer))[:2])


def head_too(setting: Setting) -> dict[str, Any]:
    """The head on the frozen encoder once more, fitted to the search rows, too."""
    began = time.perf_counter()
    found = head_alone(replace(setting, search_too=True))
    rows = len(setting.train()) + len(setting.search())
    return {"test": found, "seconds": {"total": time.perf_counter() - began}, "forwards": rows}


def tokenised(rows: list[dict[str, Any]], tokenizer: Any) -> Dataset:
    tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
    return Dataset.from_dict({**dict(tokens), "labels": [row["label"] for row in rows]})


def fit_head(setting: Setting, model: Any, tokenizer: Any) -> None:
    """The head that one step begins from: logistic regression on the frozen encoder.

    Where the search rows are training rows, too, they have chosen its penalty before.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as Trainer chooses it
    model.to(device)
    layer = head.active(model, "classifier")
    collate: Any = DataCollatorWithPadding(tokenizer)

    def found(rows: list[dict[str, Any]]) -> head.Features:
        tokens = tokenised(rows, tokenizer)
        starts = range(0, len(tokens), 32)
        batches = (
            collate([tokens[i] for i in range(start, min(start + 32, len(tokens)))]).to(device) for start in starts
        )
        return head.features(model, layer, batches)

    train, held = found(replace(setting, search_too=False).train()), found(setting.search())
    fitted = head.fit(train.x, train.labels, held_out=(held.x, held.labels), outputs=layer.out_features, bias=True)
    if setting.search_too:
        everyone = head.Features.joined([train, held])
        fitted = head.refit(everyone.x, everyone.labels, fitted)
    head.install(layer, fitted)
