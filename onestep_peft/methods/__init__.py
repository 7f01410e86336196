"""Which parameters move, how their layers are observed, and where an update is written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from peft import LoraConfig, PeftModel, PromptTuningConfig
from torch import nn

from onestep_peft.errors import nearest
from onestep_peft.methods import full, lora, prompt_tuning
from onestep_peft.step.directions import rule_of
from onestep_peft.step.layers import Layer, Prompt


class Method(Protocol):
    """What a method says of itself; each is a module of this package.

    Attributes:
        name: As it stands in `onestep.json`.
        directions: Names of the directions that can be written.
        auto: Those that "auto" tries, as many of the first as its budget of forwards allows.
        rank: Rank of a direction where the user names none; None for the full one.
        walks_at_once: Whether "auto" is a walk of small steps alone, without a searched one before them.
        default: The adapter's configuration where the user gives none.
    """

    name: str
    directions: tuple[str, ...]
    auto: tuple[str, ...]
    rank: int | None
    walks_at_once: bool

    def default(self) -> Any: ...

    def validate(self, config: Any) -> None:
        """Raises a ValueError for a configuration whose update one step cannot write."""

    def wrap(self, model: Any, config: Any, head: Sequence[str], revision: str | None, task_type: str) -> nn.Module:
        """Puts the adapter on a model; `head` names the modules that no checkpoint filled."""

    def is_idle(self, model: Any) -> bool:
        """Whether an adapter is there that adds nothing yet, so that `set_aside` changes no output."""

    def set_aside(self, model: Any) -> AbstractContextManager[None]:
        """While open, and again later, the base answers alone; its layers' outputs have gradients all the same."""

    def layers(self, model: Any, left_out: str | None) -> Sequence[Layer | Prompt]:
        """What moves, without the layer `left_out`."""


METHODS: dict[str, Method] = {method.name: method for method in (lora, full, prompt_tuning)}
OF_CONFIG = {LoraConfig: lora, PromptTuningConfig: prompt_tuning}


def method_for(name: str | None, peft_config: Any, model: nn.Module) -> Method:
    """The method that the user names, or that an adapter's configuration or a PeftModel stands for; else LoRA.

    Raises:
        ValueError: An unknown name, an adapter of another kind, or a name that the adapter contradicts.
    """
    if name is not None and name not in METHODS:
        raise ValueError(f"`method={name!r}` is none of {', '.join(METHODS)}.{nearest(name, METHODS)}")
    config = model.peft_config[str(model.active_adapter)] if isinstance(model, PeftModel) else peft_config
    if config is None:
        return METHODS[name or lora.name]
    known: Any = next((method for kind, method in OF_CONFIG.items() if isinstance(config, kind)), None)
    if known is None:
        raise ValueError(
            f"`peft_config` is a {type(config).__name__}; one step can write a LoraConfig or a PromptTuningConfig. "
            'Pass one of them, or `method="full"` for full weights.'
        )
    if name is not None and name != known.name:
        raise ValueError(
            f"`method={name!r}`, but the adapter is a {type(config).__name__} ({known.name}). Leave one of the two out."
        )
    return known


def check_directions(method: Method, names: Sequence[str]) -> None:
    """Raises a ValueError for a direction that a method cannot write."""
    for name in names:
        if rule_of(name) not in method.directions:
            raise ValueError(
                f"`direction={name!r}` does not go with the method {method.name}, which knows "
                f'{", ".join(method.directions)}. Choose one of these, or "auto".'
            )
