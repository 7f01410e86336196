"""Small models of eight architectures, from configurations, saved as bases without a classification head."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

from tests.conftest import CLS, PAD, SEP, SMALL, VOCABULARY, word_tokenizer

_FIXED = {**SMALL, "pad_token_id": PAD}
_SPECIAL = {"cls_token_id": CLS, "bos_token_id": CLS, "sep_token_id": SEP, "eos_token_id": SEP}

CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_FIXED),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, pad_token_id=PAD, initializer_range=0.1
    ),
    "deberta-v2": DebertaV2Config(
        **_FIXED, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0,
    ),
    "modernbert": ModernBertConfig(**_FIXED, **_SPECIAL),
    "roberta": RobertaConfig(**{**_FIXED, "max_position_embeddings": 66}),
    "t5": T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=PAD,
        eos_token_id=SEP, decoder_start_token_id=PAD,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=PAD, bos_token_id=CLS,
        eos_token_id=SEP, initializer_range=0.1,
    ),
    "llama": LlamaConfig(**_FIXED, num_key_value_heads=2, bos_token_id=CLS, eos_token_id=SEP),
}  # fmt: skip


def save_base(folder: Path, config: PreTrainedConfig) -> Path:
    """A backbone without a head, and its tokenizer, as encoders stand on the Hub."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
