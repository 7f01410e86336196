"""The options of `onestep train` that only one method has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, PromptTuningConfig

from onestep_peft.methods import full, lora, prompt_tuning


@dataclass
class AdapterOptions:
    """Options of LoRA and of prompt tuning."""

    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=8, metadata={"help": "Scaling of the LoRA adapter: alpha / r."})
    lora_target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Layers to adapt (default: every linear layer but the head)."}
    )
    num_virtual_tokens: int = field(
        default=prompt_tuning.VIRTUAL_TOKENS, metadata={"help": "Length of the prompt, with --method prompt_tuning."}
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "Words that the prompt starts from (default: words drawn at random)."}
    )


OWNERS = {
    "lora_r": lora.name,
    "lora_alpha": lora.name,
    "lora_target_modules": lora.name,
    "num_virtual_tokens": prompt_tuning.name,
    "prompt_tuning_init_text": prompt_tuning.name,
}


def check_owners(method: str | None, given: Mapping[str, Any]) -> None:
    """Raises a ValueError for a given option that another method has."""
    chosen = method or lora.name
    for name, owner in OWNERS.items():
        if name in given and owner != chosen:
            raise ValueError(
                f"`--{name.replace('_', '-')} {given[name]}` belongs to the method {owner}, and this run's is "
                f"{chosen}. Leave it out, or choose `--method {owner}`."
            )


def peft_config(method: str | None, options: AdapterOptions, model: str) -> PeftConfig | None:
    """The adapter's configuration; None for full weights.

    Args:
        model: The base, whose tokenizer reads the prompt's first words.
    """
    if method == full.name:
        return None
    if method != prompt_tuning.name:
        targets = options.lora_target_modules or None
        return LoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=targets)
    if options.prompt_tuning_init_text is None:
        config = prompt_tuning.default()
        config.num_virtual_tokens = options.num_virtual_tokens
        return config
    return PromptTuningConfig(
        num_virtual_tokens=options.num_virtual_tokens,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=options.prompt_tuning_init_text,
        tokenizer_name_or_path=model,
    )
