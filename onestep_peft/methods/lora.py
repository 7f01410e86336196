"""LoRA: updates go into ordinary `lora_A` and `lora_B`; the base weights are never touched."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from onestep_peft.errors import nearest
from onestep_peft.methods.linear import linear_names
from onestep_peft.methods.saved import modules_to_save
from onestep_peft.step.layers import Layer, LowRank

name = "lora"
directions = ("sgd", "sign", "muon", "lora_one", "kfac", "kfac_muon", "kfac_schatten")
auto = ("kfac_schatten", "kfac")
rank: int | None = 8
walks_at_once = False

# Inits that leave the base weights alone and need no data. The others change the base, so that the adapter would
# not load onto the original one.
SAFE_INITS: tuple[Any, ...] = (True, False, "gaussian", "orthogonal")
# All that a plain product W + scaling · B · A is described by. PEFT's other options make more of a layer, or of reading
# the adapter (it imports the module that one of them names), so they must be as PEFT leaves them.
PLAIN = {
    *(f.name for f in dataclasses.fields(PeftConfig)),
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "ensure_weight_tying", "qalora_group_size", "runtime_config",
}  # fmt: skip


def default() -> LoraConfig:
    """Rank 8, and a scaling of 1: the search sets the scale."""
    return LoraConfig(r=8, lora_alpha=8)


def validate(config: LoraConfig) -> None:
    """Refuses adapter configurations whose update one step cannot write without touching the base."""
    if config.init_lora_weights not in SAFE_INITS:
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}` changes the base weights or needs data of its own, so "
            "the adapter would not load onto the original base. Leave it out: one step finds its own directions."
        )
    usual = LoraConfig()
    for option in sorted({f.name for f in dataclasses.fields(config)} - PLAIN):
        value = getattr(config, option)
        if value and value != getattr(usual, option):
            raise ValueError(
                f"`{option}={value!r}` in the LoraConfig is not a plain product of two matrices added to a linear "
                f"layer, so a step cannot be written to it exactly. Leave `{option}` out."
            )
    if config.inference_mode:
        raise ValueError("`inference_mode=True` in the LoraConfig freezes the adapter. Leave it out.")
    if config.bias != "none":
        raise ValueError(
            f"`bias={config.bias!r}` in the LoraConfig trains biases of the base model, which an adapter must not "
            'touch. Use bias="none".'
        )
    alphas = {
        "lora_alpha": config.lora_alpha,
        **{f"alpha_pattern[{k!r}]": v for k, v in (config.alpha_pattern or {}).items()},
    }
    for option, alpha in alphas.items():
        if alpha == 0:
            raise ValueError(
                f"`{option}=0` scales the adapter by zero, so no step could have an effect. Try {config.r}."
            )
        if not math.isfinite(alpha):
            raise ValueError(f"`{option}={alpha}` is no number to scale the adapter by. Try {config.r}.")


def wrap(
    model: PreTrainedModel, config: LoraConfig, head: Sequence[str], revision: str | None, task_type: str
) -> PeftModel:
    """Puts a LoRA adapter on a model.

    Args:
        head: Names of modules that no checkpoint filled: they are saved whole, beside the adapter. PEFT by itself
            adds only `classifier` and `score`.
        revision: The base's commit, pinned in the adapter's configuration where that names none.
        task_type: PEFT's name of the task; written to the configuration if it has none.

    Raises:
        ValueError: `target_modules` match no linear layer.
    """
    validate(config)
    linears = linear_names(model, head)
    if config.target_modules in (None, "all-linear", {"all-linear"}):
        config.target_modules = linears
    if config.task_type is None:
        config.task_type = task_type
    config.modules_to_save = modules_to_save(config, head)
    targets = config.target_modules
    try:
        wrapped = get_peft_model(model, config, revision=config.revision or revision)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        wanted = targets if isinstance(targets, str) else sorted(targets)[0]
        near = nearest(wanted, {name.split(".")[-1] for name in linears})
        raise ValueError(
            f"`target_modules={targets!r}` match no layer of {type(model).__name__}.{near} Leave `target_modules` out "
            "for every linear layer but the head."
        ) from error
    try:
        layers(wrapped)
    except ValueError:
        wrapped.unload()  # the model as it came
        raise
    return wrapped


def layers(model: PeftModel, left_out: str | None = None) -> list[Layer]:
    """The adapted linear layers, as the step sees them.

    Raises:
        ValueError: An adapted layer is not linear (an embedding, a convolution).
    """
    adapter = str(model.active_adapter)
    return [_layer(module_name, module, adapter) for module_name, module in _adapted(model, adapter)]


def is_idle(model: PeftModel) -> bool:
    """Whether the adapter is the only one and zero, so that it adds nothing to any output."""
    adapter = str(model.active_adapter)
    adapted = [module for _, module in _adapted(model, adapter)]
    alone = all(list(module.active_adapters) == [adapter] for module in adapted)
    return alone and not any(
        bool(up.any()) and bool(down.any()) for down, up in (_factors(m, adapter) for m in adapted)
    )


def set_aside(model: PeftModel) -> contextlib.AbstractContextManager[None]:
    """While open, the base answers without the adapter: where that is zero, the same outputs for a fifth less work.

    Gradients reach the outputs of the adapted layers all the same, and go no further back than the first of them; the
    adapter's own parameters get none. It may be opened again once it is closed.
    """
    return _SetAside([module for _, module in _adapted(model, str(model.active_adapter))])


class _SetAside(contextlib.AbstractContextManager[None]):
    def __init__(self, modules: Sequence[LoraLinear]) -> None:
        self._modules = modules

    def __enter__(self) -> None:
        self._wanted = [(one, one.requires_grad) for module in self._modules for one in module.parameters()]
        # Ahead of whatever observes the outputs.
        self._handles = [module.register_forward_hook(_begin_graph, prepend=True) for module in self._modules]
        try:
            self._enable(False)
        except BaseException:  # an interruption in between
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._enable(True)
        for handle in self._handles:
            handle.remove()

    def _enable(self, enabled: bool) -> None:
        for module in self._modules:
            module.enable_adapters(enabled)
        for parameter, requires_grad in self._wanted:  # who asks what is trainable gets the same answer
            parameter.requires_grad_(requires_grad)


def _begin_graph(_module: nn.Module, _args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _adapted(model: PeftModel, adapter: str) -> Iterator[tuple[str, LoraLinear]]:
    for module_name, module in model.named_modules():
        adapters = getattr(module, "lora_A", None)
        embeddings = getattr(module, "lora_embedding_A", {})
        if (adapters is None or adapter not in adapters) and adapter not in embeddings:
            continue
        plain = isinstance(adapters, nn.ModuleDict) and adapter in adapters and isinstance(adapters[adapter], nn.Linear)
        if not plain:
            if hasattr(module, "base_layer"):
                raise ValueError(
                    f"`target_modules` name {module_name}, a {type(module.base_layer).__name__}: one step moves linear "
                    "layers only. Leave it out of `target_modules`."
                )
            continue
        yield module_name, module


def _factors(module: LoraLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """A `(r, d_in)` and B `(d_out, r)`. Asked for anew each time: FSDP2 swaps parameters."""
    down: Any = module.lora_A[adapter]
    up: Any = module.lora_B[adapter]
    return down.weight, up.weight


def _layer(module_name: str, module: LoraLinear, adapter: str) -> Layer:
    scaling = float(module.scaling[adapter])
    if scaling == 0:
        raise ValueError(
            f"The adapter's scaling at {module_name} is 0, so no step could have an effect. Change its alpha."
        )

    def read() -> LowRank | None:
        down, up = (factor.detach().float() for factor in _factors(module, adapter))
        return LowRank(up * scaling, down.clone()) if bool(up.any() & down.any()) else None

    down, up = _factors(module, adapter)
    shape = (up.shape[0], down.shape[1])
    weight = cast(Tensor, module.get_base_layer().weight)
    # A quantised weight is packed integers: its norm says nothing, and an orthogonal layer's is as good a guess.
    norm = float(weight.detach().float().norm()) if weight.is_floating_point() else math.sqrt(min(shape))
    return Layer(
        module_name, module, shape, norm, down.shape[0], read, lambda update: _write(module, adapter, update, scaling)
    )


@torch.no_grad()
def _write(module: LoraLinear, adapter: str, update: LowRank, scaling: float) -> float:
    """scaling · B · A ← update, B and A of equal norm. Rows of A that the update does not need stay as they are."""
    down, up = _factors(module, adapter)
    fitted, lost = update.truncated(down.shape[0])
    left = fitted.left / scaling  # (d_out, rank)
    balance = (left.norm() / fitted.right.norm()).sqrt()
    balance = torch.where(balance.isfinite() & (balance > 0), balance, 1.0)  # not one by one: a GPU would be waited for
    up.zero_()
    up[:, : fitted.rank] = left / balance
    down[: fitted.rank] = fitted.right * balance
    return lost
