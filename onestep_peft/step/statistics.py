"""What one pass over the rows leaves behind, per linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onestep_peft.step.layers import Layer

# Below this share of the bound that Cauchy and Schwarz set, a gradient is rounding noise and has no direction.
NOISE_FLOOR = 1e-6
# Below this share of the largest δ in its row, a token's δ is rounding noise.
DEAD_SHARE = 1e-6


class LayerStatistics:
    """Sums over a pass for a layer y = W x with output gradient δ = ∂(sum of the rows' losses)/∂y, in fp32.

    After `finish(items)` the three are means:

    - `gradient`, G = (1/N) Σ δ xᵀ, `(d_out, d_in)`;
    - `input_covariance`, A = mean of x xᵀ over the tokens whose δ is not zero, `(d_in, d_in)`;
    - `output_grad_covariance`, S = (1/N) Σ δ δᵀ, summed over tokens, divided by rows, `(d_out, d_out)`.

    N is the number of items (rows, or labelled tokens) whose losses were added up. Padding has δ = 0 and so
    drops out by itself. With δ from the data's own labels S is the empirical Fisher's factor (Martens & Grosse,
    "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015).
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        d_out, d_in = shape
        self.gradient = torch.zeros(d_out, d_in, device=device)
        self.input_covariance = torch.zeros(d_in, d_in, device=device)
        self.output_grad_covariance = torch.zeros(d_out, d_out, device=device)
        self.tokens = torch.zeros((), device=device)
        self._tokens_per_item = 0.0

    def reset(self) -> None:
        """Empties the sums for the next pass."""
        for total in (self.gradient, self.input_covariance, self.output_grad_covariance, self.tokens):
            total.zero_()

    @torch.no_grad()
    def add(self, x: Tensor, delta: Tensor) -> None:
        """Adds one call of the layer: x `(..., d_in)` and δ `(..., d_out)`."""
        live = _live(delta)
        x = x.detach().reshape(-1, x.shape[-1]).float()  # (tokens, d_in)
        delta = delta.reshape(-1, delta.shape[-1]).float()  # (tokens, d_out)
        if x.device.type == "cpu":
            x, delta = x[live], delta[live]
        else:  # indexing would wait for the device
            x = x * live[:, None]
        self.gradient.addmm_(delta.T, x)
        self.input_covariance.addmm_(x.T, x)
        self.output_grad_covariance.addmm_(delta.T, delta)
        self.tokens += live.sum()

    def finish(self, items: float) -> None:
        """Turns the sums into means over `items` rows (or labelled tokens)."""
        self.gradient /= items
        self.output_grad_covariance /= items
        self.input_covariance /= self.tokens.clamp_min(1)
        self._tokens_per_item = float(self.tokens) / items

    def is_noise(self) -> bool:
        """Whether the gradient is so far below what x and δ allow that only rounding is left in it."""
        bound = (self.input_covariance.trace() * self._tokens_per_item * self.output_grad_covariance.trace()).sqrt()
        return not bool(self.gradient.norm() > NOISE_FLOOR * bound)


def _live(delta: Tensor) -> Tensor:
    """Which tokens have a δ, `(tokens,)`.

    Where δ is zero in theory (the query of a token that sees only itself) rounding may leave something, in one batch
    and not in another: below 1e-6 of the largest in its row it counts as zero.
    """
    size = delta.abs().amax(-1).float()  # (rows, ..., tokens)
    floor = DEAD_SHARE * size.amax(-1, keepdim=True) if size.dim() > 1 else torch.zeros_like(size)
    return (size > floor).reshape(-1)


class _Tap(torch.autograd.Function):
    """The identity on y that hands x and δ to the statistics.

    A forward hook that kept x would see activation-checkpointed layers twice and keep x alive; a backward hook
    on a frozen layer whose input needs no gradient never fires. This records once per backward, in both cases.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, statistics: LayerStatistics) -> Tensor:
        ctx.save_for_backward(x)
        ctx.statistics = statistics
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (delta,) = grad_outputs
        (x,) = ctx.saved_tensors
        ctx.statistics.add(x, delta)
        return delta, None, None


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def observed(layers: Sequence[Layer]) -> Iterator[Mapping[str, LayerStatistics]]:
    """While open, every backward through one of the layers adds to its statistics (by layer name)."""
    statistics = {layer.name: LayerStatistics(layer.shape, _device_of(layer.module)) for layer in layers}

    def tap(record: LayerStatistics) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return _Tap.apply(output, args[0].detach(), record) if output.requires_grad else None

        return hook

    handles = [layer.module.register_forward_hook(tap(statistics[layer.name])) for layer in layers]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
