"""Fit of a freshly initialised head on the cached input of its last layer, to convergence."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onestep_peft.head_problem import Problem, Solution
from onestep_peft.step import processes
from onestep_peft.tasks import TEXT_CLASSIFICATION, Task, logits_for
from onestep_peft.tasks.task import UNLABELLED

# Ridge penalties that are tried, from the strongest on, in units of the features' variance.
PENALTIES = tuple(10 ** (-i / 2) for i in range(0, 9))
# Largest entry of the gradient at which L-BFGS stops: to compare penalties, and for the head that is kept.
ROUGH, CONVERGED = 1e-4, 1e-7
# L-BFGS makes many small products one after the other: up to so many (items by inputs by outputs) it goes to the CPU,
# which does not wait for launches (500 rows of MiniLM on an H200: the heads took three of a run's six seconds).
SMALL = 1 << 24


def fresh_modules(model: nn.Module) -> list[str]:
    """Names of the modules that no checkpoint filled: the head, and whatever else is saved with it.

    transformers marks every parameter that it loaded (`_is_hf_initialized`, a private name: where it is missing
    from all of them, as in a model built from a configuration, the head is what stands beside the backbone).
    """
    fresh = [
        name for name, parameter in model.named_parameters() if not getattr(parameter, "_is_hf_initialized", False)
    ]
    total = sum(1 for _ in model.parameters())
    backbone = getattr(model, "base_model_prefix", "")
    if len(fresh) == total:
        if getattr(getattr(model, "config", None), "name_or_path", ""):
            warnings.warn(
                "The model is a copy, or was built from a loaded configuration: whether its head has been trained "
                "cannot be told, so it counts as fresh. `fit_head=False` keeps it.",
                stacklevel=2,
            )
        return [
            name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
        ]
    return _roots(model, set(fresh))


def fresh_copies(model: nn.Module) -> list[str]:
    """The same for a base whose adapter saves whole modules: their originals tell whether a checkpoint filled them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(original := getattr(module, "original_module", None), nn.Module)
        and not any(getattr(parameter, "_is_hf_initialized", False) for parameter in original.parameters())
    ]


def copies_are_as_made(model: nn.Module) -> bool:
    """Whether every module that an adapter saves whole has its original's bits: nothing has trained it."""
    for module in model.modules():
        original: Any = getattr(module, "original_module", None)
        copies: Any = getattr(module, "modules_to_save", None)
        if isinstance(original, nn.Module) and isinstance(copies, nn.ModuleDict):
            for copied in copies.values():
                pairs = zip(copied.parameters(), original.parameters(), strict=True)
                if not all(torch.equal(ours, theirs.to(ours)) for ours, theirs in pairs):
                    return False
    return True


def _roots(module: nn.Module, fresh: set[str], prefix: str = "") -> list[str]:
    """The topmost modules all of whose parameters are fresh."""
    names: list[str] = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        own = [f"{path}.{parameter}" for parameter, _ in child.named_parameters()]
        if own and all(parameter in fresh for parameter in own):
            names.append(path)
        elif any(parameter in fresh for parameter in own):
            names += _roots(child, fresh, f"{path}.")
    return names


def last_layer(model: nn.Module, head: Sequence[str], classes: int) -> str | None:
    """Name of the last linear layer of the head that gives one output a class, or None."""
    found = None
    for path, module in model.named_modules():
        if ".modules_to_save." in path:  # PEFT's copy; the original beside it goes by the module's own name
            continue
        name = path.replace(".original_module", "")
        inside = any(name == root or name.startswith(f"{root}.") for root in head)
        if inside and isinstance(module, nn.Linear) and module.out_features == classes:
            found = name
    return found


def active(model: nn.Module, name: str) -> nn.Linear:
    """The layer of this name that a forward uses: PEFT puts a copy beside a module that it saves."""
    get_base = getattr(model, "get_base_model", None)
    module: Any = get_base() if get_base is not None else model
    for part in name.split("."):
        module = getattr(module, part)
        copies = getattr(module, "modules_to_save", None)
        if copies is not None and hasattr(module, "original_module"):
            module = copies[
                module.active_adapter if isinstance(module.active_adapter, str) else module.active_adapter[0]
            ]
    return module


@dataclass(frozen=True)
class Features:
    """The last layer's inputs, and what its outputs should be; one for every row, or for every labelled token.

    Args:
        x: `(items, d)`, fp32.
        labels: `(items,)`, or `(items, outputs)` where an item has several.
        rows: `(items,)`, which row an item belongs to, as the batches have them.
    """

    x: Tensor
    labels: Tensor
    rows: Tensor

    def gathered(self) -> Features:
        """Those of all processes; numbers of rows in a process' batches then say nothing."""
        return Features(*(processes.gathered(part) for part in (self.x, self.labels, self.rows)))

    def where(self, which: Tensor) -> Features:
        """Those of the items for which it is true, `(items,)`."""
        return Features(self.x[which], self.labels[which], self.rows[which])

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """Those of all batches."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "labels", "rows")))


def features(model: nn.Module, layer: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Features:
    """The last layer's input for every row or labelled token, dropout off.

    Decoders that classify texts apply the layer to every token and keep one token's logits; that token is found by
    its logits.

    Raises:
        ValueError: The model's logits are not a selection of the layer's outputs.
    """
    return Features.joined([found for _, _, found in outputs(model, layer, batches)])


@torch.no_grad()
def outputs(
    model: nn.Module, layer: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Tensor, Tensor, Features]]:
    """Batch by batch the model's logits, the labels, and the features, whose rows are counted through all batches."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    was_training, rows = model.training, 0
    model.eval()
    try:
        for batch in batches:
            inputs = dict(batch)
            labels = inputs.pop("labels")
            logits = logits_for(model, inputs)
            (x, output), *_ = seen
            seen.clear()
            items = items_of(x, output, logits, inputs.get("attention_mask"))
            yield logits, labels, _features_of(items.float(), labels, rows)
            rows += len(labels)
    finally:
        handle.remove()
        model.train(was_training)


def _features_of(x: Tensor, labels: Tensor, first: int) -> Features:
    """Those of a batch whose first row has this number; of tokens only the labelled ones."""
    numbers = torch.arange(first, first + len(labels), device=labels.device)
    if x.dim() == 2:
        return Features(x, labels, numbers)
    known = labels.ne(UNLABELLED)
    return Features(x[known], labels[known], numbers[:, None].expand_as(labels)[known])


def items_of(x: Tensor, output: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """The layer's inputs that the logits belong to: `(rows, d)`, or `(rows, tokens, d)` for logits by token.

    Args:
        x: All of the layer's inputs.
        output: What the layer made of them.
        logits: What the model made of that.
        mask: `(rows, tokens)`, zero at padding: in 16 bits a token there may have the logits of the row's last one.
    """
    if output.shape == logits.shape:
        return x
    if output.dim() == logits.dim() == 3 and output.shape[2] == logits.shape[2]:  # virtual tokens before the row's
        return x[:, -logits.shape[1] :]
    same = None
    if output.dim() == 3:  # NaN is found too: what is wrong with such a row is said where its loss is looked at
        output = output.to(logits.dtype)  # 16 bits under autocast, made fp32 again in what the model returns
        same = output.isclose(logits[:, None, :], rtol=0, atol=0, equal_nan=True).all(-1)  # (rows, tokens)
        if mask is not None and mask.dim() == 2:  # virtual tokens stand before those that it is of
            same = same & nn.functional.pad(mask.bool(), (same.shape[1] - mask.shape[1], 0), value=True)
    if same is None or not bool(same.any(1).all()):
        raise ValueError(
            "The model's logits are not rows of its last layer's output, so the head cannot be fitted by itself. Pass "
            "`fit_head=False`."
        )
    last = same.shape[1] - 1 - same.flip(1).int().argmax(1)
    return x[torch.arange(x.shape[0], device=x.device), last]


@dataclass(frozen=True)
class HeadFit:
    """A fitted head.

    Args:
        weight: `(outputs, d)`.
        bias: `(outputs,)`, or None.
        penalty: The ridge penalty that was chosen.
        held_out_loss: Mean loss of the held-out items, or None where there were none.
    """

    weight: Tensor
    bias: Tensor | None
    penalty: float
    held_out_loss: float | None

    def to(self, device: torch.device) -> HeadFit:
        """The same on a device."""
        bias = self.bias.to(device) if self.bias is not None else None
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)

    def logits(self, x: Tensor) -> Tensor:
        """Of items `(items, d)`: `(items, outputs)`, float64."""
        logits = x.double() @ self.weight.double().T
        return logits if self.bias is None else logits + self.bias.double()


def fit(
    x: Tensor,
    labels: Tensor,
    *,
    held_out: tuple[Tensor, Tensor] | None,
    outputs: int,
    bias: bool,
    task: Task = TEXT_CLASSIFICATION,
) -> HeadFit:
    """The task's loss under a ridge penalty, minimised by L-BFGS in float64; held-out items choose the penalty.

    That is multinomial logistic regression for one class an item, an independent one for each of several labels, and
    ridge least squares for numbers. Penalties are tried from the strongest on, each from the last one's solution,
    until the held-out loss has risen twice; the best one's is then refined. Without held-out items the penalty is
    1/items (scikit-learn's default C = 1). Items without a label are left out.

    Args:
        x: `(items, d)`.
        labels: `(items,)`, or `(items, outputs)`.
        held_out: The same for items that choose the penalty, or None.
        outputs: Number of classes, or of numbers.
        bias: Whether the layer has a bias.
    """
    device = x.device
    where = _best_place(x, outputs)
    x, labels = (one.to(where) for one in labelled(x, labels, task))
    if held_out is not None:
        held_x, held_labels = (one.to(where) for one in labelled(*held_out, task))
        held_out = held_x, held_labels
    problem = Problem(x, labels, task, bias)
    solution = problem.zero(outputs)
    best: tuple[float | None, float, Solution] | None = None
    rises = 0
    for penalty in PENALTIES if held_out is not None else (1 / len(x),):
        solution = problem.minimised(solution, penalty, ROUGH)
        loss = problem.loss(solution, *held_out) if held_out is not None else None
        if best is None or loss is None or loss < (best[0] or 0.0):
            best, rises = (loss, penalty, solution), 0
        else:
            rises += 1
            if rises == 2:
                break
    assert best is not None
    _, penalty, solution = best
    solution = problem.minimised(solution, penalty, CONVERGED)
    loss = problem.loss(solution, *held_out) if held_out is not None else None
    return HeadFit(*problem.installed(solution), penalty, loss).to(device)


def refit(
    x: Tensor, labels: Tensor, start: HeadFit, task: Task = TEXT_CLASSIFICATION, tolerance: float = CONVERGED
) -> HeadFit:
    """The same fit to other items at a known penalty, from a known head on.

    To convergence: a head that knows these items by heart, and others, has hardly a gradient on them, and a rough fit
    would leave it as it is.

    Args:
        x: `(items, d)`.
        labels: `(items,)`, or `(items, outputs)`.
        start: Gives the penalty, and where to begin.
        tolerance: Largest entry of the gradient at which to stop.
    """
    device = x.device
    where = _best_place(x, len(start.weight))
    x, labels = (one.to(where) for one in labelled(x, labels, task))
    problem = Problem(x, labels, task, start.bias is not None)
    start = start.to(where)
    solution = problem.minimised(problem.standardised(start.weight, start.bias), start.penalty, tolerance)
    return HeadFit(*problem.installed(solution), start.penalty, None).to(device)


def pull(
    x: Tensor, labels: Tensor, fitted: HeadFit, others: tuple[Tensor, Tensor], task: Task = TEXT_CLASSIFICATION
) -> Tensor:
    """How the summed loss of other items changes with the features of those that a head is fitted to.

    Args:
        x: `(items, d)`.
        labels: `(items,)`, or `(items, outputs)`.
        fitted: What `refit` gave for them.
        others: The same two of the other items.

    Returns:
        The gradient at `x` of the loss in nats, `(items, d)`, fp32; zero for an item without a label.
    """
    where = _best_place(x, len(fitted.weight))
    pulled = torch.zeros(x.shape, device=x.device)
    own, known = (one.to(where) for one in labelled(x, labels, task))
    other_x, other_labels = (one.to(where) for one in labelled(*others, task))
    if len(other_x):
        problem, fitted = Problem(own, known, task, fitted.bias is not None), fitted.to(where)
        solution = problem.standardised(fitted.weight, fitted.bias)
        found = problem.pull(solution, fitted.penalty, other_x, other_labels)
        pulled[_is_labelled(labels, task)] = found.to(pulled)
    return pulled


def labelled(x: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """The items that have a label."""
    known = _is_labelled(labels, task)
    return x[known], labels[known]


def _is_labelled(labels: Tensor, task: Task) -> Tensor:
    # A token is an item by itself here, so a task by tokens counts as one by rows.
    return labels.ne(UNLABELLED) if task.by_token else task.row_items(labels) > 0


def _best_place(x: Tensor, outputs: int) -> torch.device:
    return torch.device("cpu") if x.numel() * outputs <= SMALL else x.device


def current(layer: nn.Linear) -> HeadFit:
    """The head that a layer holds."""
    bias = layer.bias.detach().clone() if layer.bias is not None else None
    return HeadFit(layer.weight.detach().clone(), bias, 0.0, None)


@torch.no_grad()
def install(layer: nn.Linear, fitted: HeadFit) -> None:
    """Copies a fitted head into its layer."""
    layer.weight.copy_(fitted.weight)
    if layer.bias is not None and fitted.bias is not None:
        layer.bias.copy_(fitted.bias)
