"""What one pass over the rows leaves behind, per linear layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from onestep_peft.step import processes
from onestep_peft.step.layers import Factor, Layer, Prompt
from onestep_peft.step.natural import RowGradients
from onestep_peft.step.quick_products import quick_products

# Below this share of the bound that Cauchy and Schwarz set, a gradient is rounding noise and has no direction.
NOISE_FLOOR = 1e-6
# Below this share of the largest δ in its row, a token's δ is rounding noise.
DEAD_SHARE = 1e-6
# A covariance is symmetric: it is summed in columns of blocks of this size, from the diagonal down.
TRIANGLE_BLOCK = 192
# No side up to this width is cut into blocks.
BLOCK_MIN = 384


class Statistics(Protocol):
    """What a pass sums up for one layer."""

    gradient: Tensor
    covers: bool

    def sums(self) -> dict[str, Tensor]: ...

    def load(self, sums: Mapping[str, Tensor]) -> None: ...

    def reset(self) -> None: ...

    def add(self, x: Tensor, delta: Tensor) -> None: ...

    def reduce(self) -> None: ...

    def finish(self, items: float, covered: float | None = None) -> None: ...

    def is_noise(self) -> bool: ...


class LayerStatistics:
    """Sums over a pass for a layer y = W x with output gradient δ = ∂(sum of the rows' losses)/∂y, in fp32.

    After `finish(items)` the three are means:

    - `gradient`, G = (1/N) Σ δ xᵀ, `(d_out, d_in)`;
    - `input_covariance`, A = mean of x xᵀ over the tokens whose δ is not zero, `(d_in, d_in)`;
    - `output_grad_covariance`, S = (1/N) Σ δ δᵀ, summed over tokens, divided by rows, `(d_out, d_out)`.

    Where only a diagonal or a trace is kept they have the shapes `(d,)` and `()`. Of a side that is wider than the
    other (the inner one of a feed-forward part; the input of keys and values that heads share) only blocks on the
    diagonal are kept, `(blocks, d / blocks, d / blocks)`, each about as wide as the other side, or as 384: covariances
    then take about as much time and room as G.

    N is the number of items (rows, or labelled tokens) whose losses were added up. Padding has δ = 0 and so
    drops out by itself. While `covers` is off, rows add to G and to diagonals, but not to whole matrices A and S: these
    are then means over the rows of which it was on. With δ from the data's own labels S is the empirical Fisher's
    factor (Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015).

    Args:
        shape: `(d_out, d_in)`.
        input_factor: How A is kept. "diagonal" is for embeddings: their x is a token's number.
        output_factor: How S is kept.
        sums_gradient: Whether G is summed here, or is the gradient of a parameter that autograd sums.

    Attributes:
        covers: Whether what is added counts for whole matrices A and S.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        input_factor: Factor = "dense",
        output_factor: Factor = "dense",
        *,
        sums_gradient: bool = True,
    ) -> None:
        d_out, d_in = shape
        self._input_factor, self._output_factor = input_factor, output_factor
        self._sums_gradient = sums_gradient
        self.gradient = torch.zeros((d_out, d_in) if sums_gradient else (), device=device)
        self.input_covariance = torch.zeros(_shape(input_factor, d_in, d_out), device=device)
        self.output_grad_covariance = torch.zeros(_shape(output_factor, d_out, d_in), device=device)
        self.tokens, self.covered_tokens = torch.zeros((), device=device), torch.zeros((), device=device)
        self.covers = True
        self._tokens_per_item = self.tokens

    def sums(self) -> dict[str, Tensor]:
        """The sums that a pass has made so far, by name."""
        sums = {
            "input_covariance": self.input_covariance,
            "output_grad_covariance": self.output_grad_covariance,
            "tokens": self.tokens,
            "covered_tokens": self.covered_tokens,
        }
        return {"gradient": self.gradient, **sums} if self._sums_gradient else sums

    def load(self, sums: Mapping[str, Tensor]) -> None:
        """Takes over what `sums` returned."""
        for name, total in self.sums().items():
            total.copy_(sums[name])

    def reset(self) -> None:
        """Empties the sums for the next pass."""
        for total in self.sums().values():
            total.zero_()

    @torch.no_grad()
    def add(self, x: Tensor, delta: Tensor) -> None:
        """Adds one call of the layer: x `(..., d_in)` (token numbers `(...)` for an embedding) and δ `(..., d_out)`."""
        live = _live(delta)
        number = live.sum()
        self.tokens += number
        if self.covers:
            self.covered_tokens += number
        elif not self._sums_gradient and {self._input_factor, self._output_factor} <= {"dense", "one"}:
            return  # all that is left to add up is autograd's
        delta = delta.reshape(-1, delta.shape[-1]).float()  # (tokens, d_out)
        if self._input_factor == "diagonal":
            self.input_covariance.index_add_(0, x.reshape(-1), live.float())
        elif self._input_factor != "one":
            x = x.detach().reshape(-1, x.shape[-1]).float()  # (tokens, d_in)
            if x.device.type != "cpu":  # indexing would wait for the device
                x = x * live[:, None]
            elif number < len(live):
                places = live.nonzero().squeeze(1)  # a third of the time that a mask takes
                x, delta = x.index_select(0, places), delta.index_select(0, places)
            if self._sums_gradient:
                with quick_products(delta.device):
                    self.gradient.addmm_(delta.T, x)
            if self._adds_to(self._input_factor):
                _add_products(self.input_covariance, x)
        if self._adds_to(self._output_factor):
            _add_products(self.output_grad_covariance, delta)

    def _adds_to(self, factor: Factor) -> bool:
        return self.covers or factor != "dense"

    def reduce(self) -> None:
        """Adds up the sums of all processes."""
        processes.sum_over(self.sums().values())

    def finish(self, items: float, covered: float | None = None) -> None:
        """Turns the sums into means over `items` rows (or labelled tokens).

        Args:
            covered: How many of them whole matrices A and S are made of; None for all.
        """
        covered = items if covered is None else covered
        if self._sums_gradient:
            self.gradient /= items
        if covered:  # else they are zero
            _mirror(self.input_covariance)
            _mirror(self.output_grad_covariance)
        self.output_grad_covariance /= covered if self._output_factor == "dense" else items
        if self._input_factor == "one":
            self.input_covariance.fill_(1.0)
        else:
            tokens = self.covered_tokens if self._input_factor == "dense" else self.tokens
            self.input_covariance /= tokens.clamp_min(1)
        self._tokens_per_item = self.tokens / items

    def of(self, sums: Mapping[str, Tensor], items: float, covered: float) -> LayerStatistics:
        """What other sums come to: those of `sums`, with the gradient's among them in any case."""
        other = copy.copy(self)
        for name, total in sums.items():
            setattr(other, name, total)
        if not self._sums_gradient:
            other.gradient = other.gradient / items
        other.finish(items, covered)
        return other

    def is_noise(self) -> bool:
        """Whether the gradient is so far below what x and δ allow that only rounding is left in it."""
        dense = "dense" in (self._input_factor, self._output_factor)
        # Its module was never called, or by no row that is covered, so there is nothing to whiten by.
        if float(self.covered_tokens if dense else self.tokens) == 0:
            return True
        traces = _trace(self.input_covariance) * _trace(self.output_grad_covariance)
        bound = (traces * self._tokens_per_item).sqrt()
        return not bool(self.gradient.norm() > NOISE_FLOOR * bound)


def finite_norms(statistics: Mapping[str, Statistics]) -> dict[str, float]:
    """Frobenius norms of the layers' gradients, by name, asked for at once: one by one a GPU would be waited for.

    Raises:
        ValueError: A gradient is not finite; it names the first such layer.
    """
    norms = [torch.linalg.vector_norm(record.gradient) for record in statistics.values()]
    found = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
    if not all(map(math.isfinite, found)):  # a large one may overflow, too
        for name, record in statistics.items():
            if not torch.isfinite(record.gradient).all():
                raise ValueError(f"The gradient of {name} is not finite, though the loss is. Try `bf16=False`.")
    return dict(zip(statistics, found, strict=True))


def _shape(factor: Factor, d: int, other: int) -> tuple[int, ...]:
    blocks = _blocks(d, other)
    dense = (blocks, d // blocks, d // blocks) if blocks > 1 else (d, d)
    return {"dense": dense, "diagonal": (d,), "trace": (), "one": (1, 1)}[factor]


def _blocks(d: int, other: int) -> int:
    """In how many equal blocks the covariance of a side is kept; one where its width does not divide evenly."""
    least = -(-d // max(other, BLOCK_MIN))
    return next((blocks for blocks in range(least, 2 * least) if d % blocks == 0), 1)


def _add_products(total: Tensor, vectors: Tensor) -> None:
    """Adds Σ v vᵀ, its diagonal or its trace, over vectors `(tokens, d)`; of a large matrix the lower triangle only."""
    if total.dim() < 2:
        total += vectors.square().sum(0) if total.dim() == 1 else vectors.square().sum()
        return
    blocks = total if total.dim() == 3 else total[None]
    with quick_products(total.device):
        for block, part in zip(blocks, vectors.split(total.shape[-1], 1), strict=True):
            _add_triangle(block, part)


def _add_triangle(total: Tensor, vectors: Tensor) -> None:
    d = total.shape[0]
    for start in range(0, d, TRIANGLE_BLOCK):
        end = min(start + TRIANGLE_BLOCK, d)
        total[start:, start:end].addmm_(vectors[:, start:].T, vectors[:, start:end])


def _mirror(total: Tensor) -> None:
    """Fills the upper triangle of a sum that `_add_products` has made."""
    if total.dim() >= 2 and total.shape[-1] > TRIANGLE_BLOCK:
        total.copy_(total.tril() + total.tril(-1).mT)


def _trace(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1).sum() if covariance.dim() >= 2 else covariance.sum()


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
    def forward(ctx: Any, y: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
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


def statistics_of(layer: Layer | Prompt, covariances: bool = True, device: torch.device | None = None) -> Statistics:
    """Empty statistics for a layer.

    Args:
        covariances: Whether a direction needs them. Their traces are kept in any case, to tell noise.
        device: Where they are kept; None for where the layer is.
    """
    device = device or _device_of(layer.module)
    if isinstance(layer, Prompt):
        return RowGradients(layer.shape, device)
    factors = [
        factor if covariances or factor == "one" else "trace" for factor in (layer.input_factor, layer.output_factor)
    ]
    if layer.input_factor == "diagonal" and not covariances:
        factors[0] = "diagonal"  # counts are cheap, and the trace of unit vectors says nothing
    return LayerStatistics(layer.shape, device, *factors, sums_gradient=layer.parameter is None)


@contextmanager
def observed(layers: Sequence[Layer | Prompt], covariances: bool = True) -> Iterator[Mapping[str, Statistics]]:
    """While open, every backward through one of the layers adds to its statistics (by layer name)."""
    statistics = {layer.name: statistics_of(layer, covariances) for layer in layers}
    handles = [handle for layer in layers for handle in _tapped(layer, statistics[layer.name])]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _tapped(layer: Layer | Prompt, record: Statistics) -> list[Any]:
    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return _Tap.apply(output, args[0].detach(), record) if output.requires_grad else None

    def before(_module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        embedded = inputs["inputs_embeds"]
        if not embedded.requires_grad:
            return None
        return args, {**inputs, "inputs_embeds": _Tap.apply(embedded, embedded.detach(), record)}

    if isinstance(layer, Prompt):
        return [layer.module.register_forward_pre_hook(before, with_kwargs=True)]
    return [module.register_forward_hook(after) for module in (layer.module, *layer.shared_with)]
