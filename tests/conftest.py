"""A word-level language, rows that can be learnt, and small real models; everything from seeds."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch and the Hub's clients are imported: one thread (the machines have few cores), one GPU at most (a process
# with more is refused), no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from onestep_peft import OneStepConfig, OneStepTrainer
from onestep_peft.step.layers import Layer

PAD, UNK, CLS, SEP = range(4)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = 96
VOCABULARY = len(SPECIAL) + WORDS
# Words that decide a row's class: the first eight are class 0's, the next eight class 1's, and so on.
SIGNAL_WORDS = 8


def word_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a word, `w0` to `w95`."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        padding_side=padding_side,
    )


def toy_rows(number: int, seed: int, *, classes: int = 2, noise: float = 0.02) -> list[dict[str, Any]]:
    """Texts of 3 to 12 words whose class is decided by which signal words occur, with some labels wrong."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        label = draw.randrange(classes)
        words = [f"w{draw.randrange(classes * SIGNAL_WORDS, WORDS)}" for _ in range(draw.randint(2, 10))]
        for _ in range(draw.randint(1, 2)):
            words.insert(draw.randrange(len(words) + 1), f"w{label * SIGNAL_WORDS + draw.randrange(SIGNAL_WORDS)}")
        if draw.random() < noise:
            label = (label + 1) % classes
        rows.append({"text": " ".join(words), "label": label})
    return rows


def tokenised(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast | None = None) -> Dataset:
    """The same rows as token ids."""
    tokens = (tokenizer or word_tokenizer())([row["text"] for row in rows])
    return Dataset.from_dict({**dict(tokens), "labels": [row["label"] for row in rows]})


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    # Ten times BERT's: with 0.02 a random encoder hardly tells one token from another.
    "initializer_range": 0.1,
}


def tiny_bert(seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**SMALL, "num_labels": 2, **options}))


def tiny_llama(seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    fixed = {"num_labels": 2, "pad_token_id": PAD, "num_key_value_heads": 2, "use_cache": False}
    return LlamaForSequenceClassification(LlamaConfig(**{**SMALL, **fixed, **options}))


def config_for(folder: Path, **options: Any) -> OneStepConfig:
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True}
    return OneStepConfig(output_dir=str(folder), **{**quiet, **options})


def trainer_for(
    folder: Path, rows: Any, *, model: Any = None, processing_class: Any = None, **options: Any
) -> OneStepTrainer:
    """A trainer on a small BERT; options that OneStepTrainer does not know go to its config."""
    own = {
        name: options.pop(name)
        for name in (
            "eval_dataset", "search_dataset", "peft_config", "metrics", "compute_metrics", "text_column",
            "label_column", "callbacks", "data_collator", "model_init",
        )
        if name in options
    }  # fmt: skip
    if model is None and "model_init" not in own:
        model = tiny_bert()
    return OneStepTrainer(
        model=model,
        args=config_for(folder, **options),
        train_dataset=rows,
        processing_class=processing_class or word_tokenizer(),
        **own,
    )


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor], only: Callable[[str], bool] = lambda _: True) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name in before if only(name) and not same_bits(after[name], before[name])]
    assert not changed, f"changed: {changed[:5]}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of the bytes: NaN equals itself, and 0.0 differs from -0.0."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def updates(model: nn.Module) -> dict[str, Tensor]:
    """ΔW = scaling · B · A by layer, in float64."""
    return {
        name: module.scaling["default"]
        * module.lora_B["default"].weight.detach().double()
        @ module.lora_A["default"].weight.detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def unmoved(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Names of the trainable parameters that no layer moves."""
    moved = {layer.parameter() for layer in layers if layer.parameter is not None}
    return [name for name, p in model.named_parameters() if p.requires_grad and p not in moved]


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def only_known_warnings() -> Any:
    """transformers' own deprecation notices are not what these tests look at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()
