"""Full weights: updates go into the model's own linear layers, embeddings, biases and gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onestep_peft.methods.linear import is_quantised
from onestep_peft.step.layers import Factor, Layer, Part

name = "full"
directions = ("sgd", "sign", "muon", "lora_one", "kfac", "kfac_muon", "kfac_schatten")
# Few classes and few rows like a low rank, many a full one; trying both costs forwards only.
auto = ("kfac", "kfac_schatten:8", "kfac_muon", "kfac_schatten", "kfac_muon:8")
rank: int | None = None
walks_at_once = False

# A covariance of so many outputs would be larger than the layer; its trace is kept.
HUGE = 16_384


def default() -> None:
    """Full weights have no adapter to configure."""
    return


def validate(config: Any) -> None:
    """Full weights have no adapter to configure."""
    if config is not None:
        raise ValueError(f"`method={name!r}` has no adapter, so `peft_config` has nothing to say. Leave it out.")


def wrap(
    model: PreTrainedModel, config: Any, head: Sequence[str], revision: str | None, task_type: str
) -> PreTrainedModel:
    """The model itself, all of its parameters trainable but those that the user froze.

    Raises:
        ValueError: The weights are quantised, or all frozen.
    """
    validate(config)
    quantised = next((path for path, module in model.named_modules() if is_quantised(module)), None)
    if quantised is not None:
        raise ValueError(
            f"The weights of {quantised} are quantised, and an update would be lost in their rounding. Load the model "
            'without quantisation, or use `method="lora"`.'
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Every parameter of the model is frozen. Set `requires_grad_(True)` on those that may move.")
    return model


def is_idle(model: PreTrainedModel) -> bool:
    """No: there is no adapter that could be."""
    return False


def set_aside(model: PreTrainedModel) -> AbstractContextManager[None]:
    """There is no adapter to set aside."""
    return nullcontext()


def layers(model: PreTrainedModel, left_out: str | None = None) -> list[Layer]:
    """Everything that a direction for layers can move, each parameter once.

    Linear layers (`nn.Linear`, `Conv1D`), their biases, the input embedding, and gains and biases of normalisations.
    An output layer that is tied to the embedding counts as a linear layer. Position and type embeddings stay: one
    look-up serves a whole micro-batch, so their second moments would depend on its size. So do convolutions and
    parameters outside of these layers.
    """
    output = model.get_output_embeddings()
    users = _users(model)
    taken: set[Tensor] = set()
    found: list[Layer] = []
    modules = [(path, module) for path, module in model.named_modules() if path != left_out]
    # The output layer first: a weight that it shares with the embedding is moved as its own.
    for path, module in sorted(modules, key=lambda pair: pair[1] is not output):
        for layer in _of_module(path, module, module is output, model.get_input_embeddings(), users):
            parameter = layer.parameter() if layer.parameter is not None else None
            if parameter is not None and parameter.requires_grad and parameter not in taken:
                taken.add(parameter)
                found.append(layer)
    return found


def _users(model: nn.Module) -> dict[Tensor, list[nn.Module]]:
    """By weight, the embeddings that look it up: T5 has one table behind several modules."""
    users: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            users.setdefault(module.weight, []).append(module)
    return users


def _of_module(
    path: str, module: Any, is_output: bool, embedding: nn.Module, users: dict[Tensor, list[nn.Module]]
) -> Iterator[Layer]:
    if isinstance(module, nn.Linear | Conv1D):
        transposed = isinstance(module, Conv1D)
        d_out = module.weight.shape[1 if transposed else 0]
        output_factor: Factor = "trace" if is_output or d_out > HUGE else "dense"
        part: Part = "embeddings" if is_output else "weights"
        yield _matrix(path, module, transposed, part, "dense", output_factor)
        if getattr(module, "bias", None) is not None:
            yield _vector(path, module, "bias")
    elif isinstance(module, nn.Embedding) and module.weight is getattr(embedding, "weight", None):
        also = [user for user in users[module.weight] if user is not module]
        yield _matrix(path, module, True, "embeddings", "diagonal", "dense", also)
    elif type(module).__name__.endswith("Norm"):
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                yield _vector(path, module, own)


def _matrix(
    path: str,
    module: Any,
    transposed: bool,
    part: Part,
    input_factor: Factor,
    output_factor: Factor,
    also: Sequence[nn.Module] = (),
) -> Layer:
    def as_matrix(tensor: Tensor) -> Tensor:
        return tensor.T if transposed else tensor

    d_out, d_in = as_matrix(module.weight).shape
    return Layer(
        f"{path}.weight",
        module,
        (d_out, d_in),
        _norm(module.weight),
        None,
        input_factor=input_factor,
        output_factor=output_factor,
        parameter=lambda: module.weight,
        as_matrix=as_matrix,
        shared_with=also,
        part=part,
    )


def _vector(path: str, module: Any, own: str) -> Layer:
    """A bias or a gain, `(d,)`, as a matrix of one column."""
    get: Callable[[], Tensor] = lambda: getattr(module, own)  # noqa: E731
    return Layer(
        f"{path}.{own}",
        module,
        (get().shape[0], 1),
        _norm(get()),
        None,
        input_factor="one",
        output_factor="diagonal",
        parameter=get,
        as_matrix=lambda tensor: tensor[:, None],
        part="vectors",
    )


def _norm(weight: Tensor) -> float:
    return float(weight.detach().float().norm())
