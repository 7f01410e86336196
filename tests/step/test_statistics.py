"""What a pass leaves behind, against autograd on one big batch and sums in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onestep_peft.step.layers import Layer
from onestep_peft.step.statistics import TRIANGLE_BLOCK, LayerStatistics, finite_norms, observed

D_IN, HIDDEN, CLASSES, TOKENS = 5, 7, 3, 4


class Tagger(nn.Module):
    """Two linear layers over tokens, the mean over real tokens, and a head; the inner layer is called twice."""

    def __init__(self, *, repeat: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(D_IN, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.repeat, self.checkpointed = repeat, checkpointed

    def body(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return torch.tanh(self.second(h)) if self.repeat else h

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def batch(rows: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x `(rows, TOKENS, D_IN)`, a mask with padding at the end of odd rows, and labels."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, TOKENS)
    mask[1::2, -2:] = 0
    labels = torch.randint(CLASSES, (rows,), generator=draw)
    return torch.randn(rows, TOKENS, D_IN, generator=draw), mask, labels


def layers_of(model: Tagger) -> list[Layer]:
    return [
        Layer(name, module, tuple(module.weight.shape), 1.0, 1, lambda: None, lambda update: 0.0)
        for name, module in (("first", model.first), ("second", model.second))
    ]


def one_pass(
    model: Tagger, x: Tensor, mask: Tensor, labels: Tensor, sizes: list[int], covered: list[bool] | None = None
) -> dict[str, LayerStatistics]:
    """A pass in micro-batches of these sizes, sums of losses, divided once; `covered` of them count for covariances."""
    covered = covered or [True] * len(sizes)
    with observed(layers_of(model)) as statistics:
        start = 0
        for size, covers in zip(sizes, covered, strict=True):
            for record in statistics.values():
                record.covers = covers
            part = slice(start, start + size)
            nn.functional.cross_entropy(model(x[part], mask[part]), labels[part], reduction="sum").backward()
            start += size
    for record in statistics.values():
        record.finish(len(x), sum(size for size, covers in zip(sizes, covered, strict=True) if covers))
    return dict(statistics)


def deltas_and_inputs(model: Tagger, x: Tensor, mask: Tensor, labels: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(x, δ) of each call of each layer in float64, by hand: outputs retained in one big batch."""
    model = model.double()
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {"first": [], "second": []}

    def keep(name: str) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            calls[name].append((args[0].detach(), output))

        return hook

    handles = [getattr(model, name).register_forward_hook(keep(name)) for name in calls]
    nn.functional.cross_entropy(model(x.double(), mask.double()), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {
        name: [
            (inputs.reshape(-1, inputs.shape[-1]), output.grad.reshape(-1, output.shape[-1])) for inputs, output in one
        ]
        for name, one in calls.items()
    }


def expected_covariances(calls: list[tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor, int]:
    """A over live tokens, S over rows, and the number of live tokens; token by token."""
    a, s, live = torch.zeros(1), torch.zeros(1), 0
    for inputs, delta in calls:
        for x, d in zip(inputs, delta, strict=True):
            if bool(d.any()):
                a, s, live = a + torch.outer(x, x), s + torch.outer(d, d), live + 1
    return a / live, s / rows, live


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_statistics_match_one_big_batch_in_float64(repeat: bool, checkpointed: bool) -> None:
    rows = batch(10)
    found = one_pass(Tagger(repeat=repeat, checkpointed=checkpointed), *rows, sizes=[10])
    oracle = Tagger(repeat=repeat)
    calls = deltas_and_inputs(oracle, *rows)
    assert len(calls["second"]) == (2 if repeat else 1)
    for name, record in found.items():
        gradient = getattr(oracle, name).weight.grad / 10
        a, s, live = expected_covariances(calls[name], 10)
        # Five of ten rows have two tokens of padding: they are no tokens here.
        assert live == 30 * len(calls[name])
        assert float(record.tokens) == live
        assert torch.allclose(record.gradient.double(), gradient, rtol=1e-4, atol=1e-7)
        assert torch.allclose(record.input_covariance.double(), a, rtol=1e-4, atol=1e-7)
        assert torch.allclose(record.output_grad_covariance.double(), s, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("sizes", [[1] * 10, [3, 3, 3, 1], [7, 3]])
def test_micro_batches_leave_the_statistics_of_one_batch(sizes: list[int]) -> None:
    rows = batch(10)
    whole, split = one_pass(Tagger(), *rows, sizes=[10]), one_pass(Tagger(), *rows, sizes=sizes)
    for name, record in whole.items():
        for value in ("gradient", "input_covariance", "output_grad_covariance"):
            one, other = getattr(record, value), getattr(split[name], value)
            assert float((one - other).norm() / one.norm()) < 1e-5


def test_matrices_are_means_over_the_covered_rows_and_the_gradient_is_of_all() -> None:
    x, mask, labels = batch(10)
    found = one_pass(Tagger(), x, mask, labels, [4, 3, 3], covered=[False, True, False])
    all_of_them, some = Tagger(), Tagger()
    deltas_and_inputs(all_of_them, x, mask, labels)
    calls = deltas_and_inputs(some, x[4:7], mask[4:7], labels[4:7])
    for name, record in found.items():
        a, s, live = expected_covariances(calls[name], 3)
        assert float(record.covered_tokens) == live and float(record.tokens) == 30
        assert torch.allclose(
            record.gradient.double(), getattr(all_of_them, name).weight.grad / 10, rtol=1e-4, atol=1e-7
        )
        assert torch.allclose(record.input_covariance.double(), a, rtol=1e-4, atol=1e-7)
        assert torch.allclose(record.output_grad_covariance.double(), s, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("output_factor", ["dense", "diagonal", "trace"])
def test_a_diagonal_comes_from_all_rows(output_factor: Any) -> None:
    # A rare token is in no sample, and what has no frequency would move as if it were the rarest of all.
    tokens, delta = torch.tensor([[0, 1], [2, 1]]), torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    record = LayerStatistics((3, 4), torch.device("cpu"), "diagonal", output_factor, sums_gradient=False)
    record.add(tokens[:1], delta[:1])
    record.covers = False
    record.add(tokens[1:], delta[1:])
    record.finish(2, 1)
    assert record.input_covariance.tolist() == [0.25, 0.5, 0.25, 0.0]
    flat = (delta[:1] if output_factor == "dense" else delta / 2**0.5).reshape(-1, 3)
    whole = flat.T @ flat
    expected = {"dense": whole, "diagonal": whole.diagonal(), "trace": whole.trace()}[output_factor]
    assert torch.allclose(record.output_grad_covariance, expected)


def test_a_layer_that_only_rows_beside_the_sample_reach_is_left_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    record = LayerStatistics((3, 4), torch.device("cpu"))
    record.covers = False
    record.add(torch.randn(2, 5, 4, generator=draw), torch.randn(2, 5, 3, generator=draw))
    record.finish(4, 2)
    assert bool(record.gradient.any()) and record.is_noise()


def test_sums_of_some_rows_are_means_over_those_of_them_that_are_covered() -> None:
    draw = torch.Generator().manual_seed(0)
    x, delta = torch.randn(3, 5, 4, generator=draw), torch.randn(3, 5, 3, generator=draw)
    record = LayerStatistics((3, 4), torch.device("cpu"))
    record.add(x[:1], delta[:1])
    record.covers = False
    record.add(x[1:], delta[1:])
    found = record.of({name: total.clone() for name, total in record.sums().items()}, 3, 1)
    flat = delta[0].double()
    assert torch.allclose(found.output_grad_covariance.double(), flat.T @ flat, rtol=1e-5)
    assert torch.allclose(found.input_covariance.double(), x[0].double().T @ x[0].double() / 5, rtol=1e-5)
    assert torch.allclose(found.gradient, torch.einsum("nto,nti->oi", delta, x) / 3, rtol=1e-4, atol=1e-6)


def test_padding_may_hold_anything() -> None:
    x, mask, labels = batch(10)
    other = torch.where(mask[..., None] > 0, x, 100.0)
    one, two = one_pass(Tagger(), x, mask, labels, [10]), one_pass(Tagger(), other, mask, labels, [10])
    for name in one:
        assert torch.equal(one[name].input_covariance, two[name].input_covariance)


def test_a_frozen_layer_whose_input_needs_no_gradient_is_observed() -> None:
    # As in an adapter: the base weight is frozen, and only the wrapper's output needs a gradient.
    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer.requires_grad_(False)
            self.up = nn.Parameter(torch.zeros(layer.out_features, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x[..., :1] @ self.up.T

    rows = batch(10)
    whole = one_pass(Tagger(), *rows, sizes=[10])
    model = Tagger()
    model.first = Wrapper(model.first)
    model.first.weight = model.first.layer.weight  # `layers_of` reads its shape
    wrapped = one_pass(model, *rows, sizes=[10])
    assert torch.allclose(wrapped["first"].gradient, whole["first"].gradient, atol=1e-7)
    assert model.first.layer.weight.grad is None


def test_nothing_is_observed_without_gradients_or_after_the_end() -> None:
    model = Tagger()
    x, mask, labels = batch(4)
    with observed(layers_of(model)) as statistics, torch.no_grad():
        model(x, mask)
    nn.functional.cross_entropy(model(x, mask), labels).backward()
    assert all(float(record.tokens) == 0 for record in statistics.values())


def test_observing_changes_no_output_and_no_gradient() -> None:
    rows = batch(6)
    plain, watched = Tagger(), Tagger()
    nn.functional.cross_entropy(plain(*rows[:2]), rows[2], reduction="sum").backward()
    one_pass(watched, *rows, sizes=[6])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_reset_empties_the_sums() -> None:
    record = LayerStatistics((2, 3), torch.device("cpu"))
    x, delta = torch.randn(4, 3), torch.randn(4, 2)
    record.add(x, delta)
    record.reset()
    record.add(x, delta)
    record.finish(4)
    assert torch.allclose(record.gradient, delta.T @ x / 4)


def test_bf16_is_summed_in_fp32() -> None:
    # 4096 equal terms of 1/4096: a sum kept in bf16 stands still once a term is below its last bit.
    record = LayerStatistics((1, 1), torch.device("cpu"))
    for _ in range(64):
        record.add(torch.ones(64, 1, dtype=torch.bfloat16), torch.full((64, 1), 2.0**-12, dtype=torch.bfloat16))
    assert float(record.gradient) == pytest.approx(1.0, rel=1e-6)


def test_a_gradient_of_rounding_alone_is_noise() -> None:
    # A key bias: softmax is blind to it, so its gradient is zero but for rounding. Here, a pair of equal tokens with
    # opposite δ.
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 6)
    delta = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    noise, signal, nothing = (LayerStatistics((4, 6), torch.device("cpu")) for _ in range(3))
    noise.add(x, torch.cat([delta, -delta * (1 + 1e-7)]))
    signal.add(x, torch.cat([delta, -delta * (1 - 1e-3)]))
    for record in (noise, signal, nothing):
        record.finish(2)
    assert noise.is_noise()
    assert not signal.is_noise()
    assert nothing.is_noise()


# Large covariances, of which the lower triangle is summed


def filled(d: int, parts: list[tuple[Tensor, Tensor]]) -> LayerStatistics:
    record = LayerStatistics((d, d), torch.device("cpu"))
    for x, delta in parts:
        record.add(x, delta)
    return record


def large(d: int) -> list[tuple[Tensor, Tensor]]:
    """x and δ of three micro-batches, all tokens live."""
    draw = torch.Generator().manual_seed(d)
    return [(torch.randn(n, d, generator=draw) + 0.5, torch.randn(n, d, generator=draw)) for n in (50, 3, 30)]


@pytest.mark.parametrize("d", [1, 255, 256, 257, 384, 400, 768, 1000])
def test_a_covariance_of_any_size_is_symmetric_and_that_of_all_tokens_in_float64(d: int) -> None:
    parts = large(d)
    record = filled(d, parts)
    if d > TRIANGLE_BLOCK:
        assert not record.input_covariance[0, TRIANGLE_BLOCK:].any()  # the work that is saved
    record.finish(83)
    for vectors, found in (
        (torch.cat([x for x, _ in parts]), record.input_covariance),
        (torch.cat([delta for _, delta in parts]), record.output_grad_covariance),
    ):
        expected = vectors.double().T @ vectors.double() / 83
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert d <= TRIANGLE_BLOCK or torch.equal(found, found.T)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("shape", [(384, 384), (20, 513), (20, 1000)])  # whole; small blocks; large ones
def test_a_micro_batch_without_a_live_token_adds_nothing(shape: tuple[int, int], live: bool) -> None:
    record = LayerStatistics(shape, torch.device("cpu"))
    record.add(torch.randn(4, 6, shape[1]), torch.randn(4, 6, shape[0]) * live)
    assert all(bool(total.any()) == live for total in record.sums().values())


@pytest.mark.parametrize("shape", [(384, 384), (20, 513), (20, 1000)])
def test_the_gradient_and_covariances_are_quick_products(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    @contextmanager
    def noting(device: torch.device) -> Iterator[None]:
        opened.append(device.type)
        yield

    monkeypatch.setattr("onestep_peft.step.statistics.quick_products", noting)
    LayerStatistics(shape, torch.device("cpu")).add(torch.randn(50, shape[1]), torch.randn(50, shape[0]))
    assert opened == ["cpu"] * 3


def test_sums_of_large_covariances_can_be_saved_on_the_way_and_start_again() -> None:
    first, *others = large(400)
    whole = filled(400, [first, *others])
    half = filled(400, [first])
    saved = {name: total.clone() for name, total in half.sums().items()}
    half.reset()
    assert not any(total.any() for total in half.sums().values())
    half.add(*others[1])  # a pass that came to nothing
    half.load(saved)
    for part in others:
        half.add(*part)
    for record in (whole, half):
        record.finish(83)
    assert all(torch.equal(half.sums()[name], total) for name, total in whole.sums().items())
    # The upper triangle that was filled in does not stay for the next pass.
    half.reset()
    for part in (first, *others):
        half.add(*part)
    half.finish(83)
    assert all(torch.equal(half.sums()[name], total) for name, total in whole.sums().items())


@pytest.mark.parametrize(
    ("d", "other", "blocks"),
    [
        (1536, 384, 4), (384, 1536, 1), (3072, 768, 4), (768, 768, 1), (384, 3, 1), (2048, 512, 4), (172, 64, 1),
        (769, 2, 1), (770, 2, 5), (11008, 4096, 4), (4096, 1024, 4),
    ],
)  # fmt: skip
def test_a_side_that_is_wider_than_the_other_has_its_covariance_in_blocks(d: int, other: int, blocks: int) -> None:
    meta = torch.device("meta")
    found = LayerStatistics((d, other), meta).output_grad_covariance, LayerStatistics((other, d), meta).input_covariance
    shape = (d, d) if blocks == 1 else (blocks, d // blocks, d // blocks)
    assert [tuple(one.shape) for one in found] == [shape, shape]


@pytest.mark.parametrize(("d", "blocks"), [(1200, 4), (513, 3)])  # wider and narrower than what a triangle is cut into
def test_blocks_are_those_of_the_whole_covariance_in_float64(d: int, blocks: int) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [(torch.randn(n, d, generator=draw) + 0.5, torch.randn(n, 20, generator=draw)) for n in (50, 3, 30)]
    record = LayerStatistics((20, d), torch.device("cpu"))
    for x, delta in parts:
        record.add(x, delta)
    record.finish(83)
    x = torch.cat([x for x, _ in parts]).double()
    whole = x.T @ x / 83
    assert record.input_covariance.shape == (blocks, d // blocks, d // blocks)
    for i, block in enumerate(record.input_covariance):
        part = slice(d // blocks * i, d // blocks * (i + 1))
        assert torch.allclose(block.double(), whole[part, part], rtol=1e-5, atol=1e-5)
        assert torch.equal(block, block.T)
    assert not record.is_noise()


def test_a_gradient_that_is_not_finite_is_named() -> None:
    records = {name: LayerStatistics((2, 3), torch.device("cpu")) for name in ("first", "second")}
    records["first"].gradient.fill_(1e30)  # whose square is not finite in fp32, but which is
    finite_norms(records)
    finite_norms({})
    records["second"].gradient[1, 2] = float("nan")
    with pytest.raises(ValueError, match="The gradient of second is not finite"):
        finite_norms(records)
