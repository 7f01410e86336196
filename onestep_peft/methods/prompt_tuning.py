"""Prompt tuning: updates go into virtual tokens before every row's own; the model's weights are never touched."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from onestep_peft.lengths import check_virtual_tokens, positions_of
from onestep_peft.methods.saved import modules_to_save
from onestep_peft.step.layers import Prompt
from onestep_peft.tasks import logits_for

name = "prompt_tuning"
directions = ("sgd", "sign", "natural", "kfac", "kfac_muon", "kfac_schatten")
auto = ("kfac", "natural")
rank: int | None = None
walks_at_once = True

VIRTUAL_TOKENS = 20
# How far a row's logits may move where padding is put behind it, by their scale.
PADDING_TOLERANCE = 1e-2


def default() -> PromptTuningConfig:
    """20 virtual tokens, drawn from the vocabulary: random vectors lie where no token ever does."""
    return PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, prompt_tuning_init="SAMPLE_VOCAB")


def virtual_tokens(method: str | None, peft_config: Any, model: Any) -> int:
    """How many virtual tokens will stand before every row, from what the user said; 0 for other methods."""
    config = model.peft_config[str(model.active_adapter)] if isinstance(model, PeftModel) else peft_config
    if config is None:
        return VIRTUAL_TOKENS if method == name else 0
    return (config.num_virtual_tokens or 0) if isinstance(config, PromptTuningConfig) else 0


def validate(config: Any) -> None:
    """Refuses configurations that have no prompt to move."""
    if not config.num_virtual_tokens or config.num_virtual_tokens < 1:
        raise ValueError(
            f"`num_virtual_tokens={config.num_virtual_tokens!r}` in the PromptTuningConfig: there must be at least 1; "
            f"{VIRTUAL_TOKENS} is usual."
        )
    if config.inference_mode:
        raise ValueError("`inference_mode=True` in the PromptTuningConfig freezes the prompt. Leave it out.")


def wrap(
    model: PreTrainedModel, config: PromptTuningConfig, head: Sequence[str], revision: str | None, task_type: str
) -> PeftModel:
    """Puts a prompt before a model.

    Raises:
        ValueError: The model has no room for the prompt, or cannot take one.
    """
    validate(config)
    embedding: Any = model.get_input_embeddings()
    check_virtual_tokens(positions_of(model), config.num_virtual_tokens)
    # PEFT guesses these from names that not every configuration has.
    config.token_dim = config.token_dim or embedding.embedding_dim
    config.num_layers = config.num_layers or getattr(model.config, "num_hidden_layers", 1)
    config.num_attention_heads = config.num_attention_heads or getattr(model.config, "num_attention_heads", 1)
    config.task_type = config.task_type or task_type
    config.modules_to_save = modules_to_save(config, head)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config.revision = config.revision or revision
    wrapped = get_peft_model(model, config, revision=config.revision)
    try:
        _check_works(cast(PeftModel, wrapped))
    except ValueError:
        _unwrap(model, frozen)
        raise
    settle(cast(PeftModel, wrapped))
    return cast(PeftModel, wrapped)


@torch.no_grad()
def begin_like_a_row(model: nn.Module, first_token: int | None) -> None:
    """Makes the first virtual token, of those that were drawn, the one that rows begin with; else does nothing.

    What many classifiers read is the output at the first place. There stands a virtual token now, and [CLS] behind
    the prompt: of a word drawn at random that output says little.

    Args:
        first_token: Its number in the vocabulary; None where rows begin with a word of theirs.
    """
    config = model.peft_config[str(model.active_adapter)] if isinstance(model, PeftModel) else None
    drawn = isinstance(config, PromptTuningConfig) and config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB
    if drawn and first_token is not None:
        wrapped = cast(Any, model)
        layers(wrapped)[0].parameter()[0] = wrapped.get_base_model().get_input_embeddings().weight[first_token]


def _unwrap(model: PreTrainedModel, trainable: Sequence[nn.Parameter]) -> None:
    """Takes off what PEFT has put on a model, so that it is as it came."""
    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, module.original_module)
    for parameter in trainable:
        parameter.requires_grad_(True)


def settle(model: PeftModel) -> None:
    """Makes a model with a prompt answer as one expects, where PEFT alone would not.

    A classifier of tokens answers for the row's own tokens only: a pipeline counts from the first answer on.

    A language model generates without a cache of past tokens where PEFT would not find it, and would put the prompt
    before every new token: PEFT 0.21 looks for `past_key_values`, which transformers 5.24 calls `cache`. Remove once
    PEFT knows that name.
    """
    base: Any = model.get_base_model()
    if model.peft_config[str(model.active_adapter)].task_type == "TOKEN_CLS":
        model.register_forward_hook(_without_prompt, with_kwargs=True)
    config = getattr(base, "generation_config", None)
    if config is not None and "past_key_values" not in inspect.signature(base.forward).parameters:
        config.use_cache = False


def _without_prompt(_model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
    ids = inputs.get("input_ids", args[0] if args else None)
    if ids is not None and isinstance(output, ModelOutput):
        output["logits"] = output["logits"][:, -ids.shape[1] :]
    return output


def is_idle(model: PeftModel) -> bool:
    """No: virtual tokens are always read."""
    return False


def set_aside(model: PeftModel) -> AbstractContextManager[None]:
    """Virtual tokens are always read."""
    return nullcontext()


def layers(model: PeftModel, left_out: str | None = None) -> list[Prompt]:
    """The prompt, as the step sees it."""
    adapter = str(model.active_adapter)
    encoder: Any = cast(Any, model).prompt_encoder[adapter]
    shape = tuple(encoder.embedding.weight.shape)
    base: Any = model.base_model
    words: Any = cast(Any, model).get_base_model().get_input_embeddings()
    return [Prompt("prompt", base, shape, lambda: encoder.embedding.weight, lambda: words.weight)]


@torch.no_grad()
def _check_works(model: PeftModel) -> None:
    """Runs a short row alone and with padding behind it: some heads lose track of a row's end under a prompt.

    Raises:
        ValueError: The model takes no embedded inputs, or answers for the padding.
    """
    base: Any = model.get_base_model()
    kind = type(base).__name__
    device = next(base.parameters()).device
    pad = base.config.pad_token_id or 0
    words = [i for i in range(1, 12) if i != pad and i < base.get_input_embeddings().num_embeddings]
    row = torch.tensor([words[:4]], device=device)
    padded = torch.cat([row, torch.full((1, 3), pad, device=device)], 1)
    was_training = model.training
    model.eval()
    try:
        alone = _logits(model, row, torch.ones_like(row))
        beside = _logits(model, padded, (torch.arange(padded.shape[1], device=device) < row.shape[1]).long()[None])
    except (NotImplementedError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{kind} cannot be tuned by prompts: {reason} Use LoRA or full weights.") from error
    finally:
        model.train(was_training)
    if alone.dim() == 3:
        beside = beside[:, : row.shape[1]]
    if float((alone - beside).abs().max()) > PADDING_TOLERANCE * float(alone.abs().max()):
        raise ValueError(
            f"{kind} cannot be tuned by prompts: it looks for a row's last token by its number, which a prompt hides, "
            "and would answer for the padding. Use LoRA or full weights."
        )


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return logits_for(model, {"input_ids": ids, "attention_mask": mask}).float()
