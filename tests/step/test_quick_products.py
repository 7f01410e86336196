from __future__ import annotations

import pytest
import torch

from onestep_peft.step.quick_products import quick_ones_are_exact, quick_products

SWITCH = torch.backends.mkldnn.matmul


def difference(rows: int, d_out: int, d_in: int) -> float:
    """Of a quick product from that in float64, by its norm."""
    draw = torch.Generator().manual_seed(rows)
    delta, x = torch.randn(rows, d_out, generator=draw), torch.randn(rows, d_in, generator=draw)
    exact = delta.double().T @ x.double()
    with quick_products():
        found = torch.zeros(d_out, d_in).addmm_(delta.T, x)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(1, 7, 5), (31, 384, 384), (190, 384, 1536), (700, 1536, 384), (2000, 64, 64)])
def test_a_quick_product_is_that_in_float64_to_the_rounding_of_its_factors(shape: tuple[int, int, int]) -> None:
    assert difference(*shape) < 2**-8


@pytest.mark.skipif(not quick_ones_are_exact(), reason="this processor rounds the factors of quick products")
@pytest.mark.parametrize("shape", [(1, 7, 5), (31, 384, 384), (190, 384, 1536), (700, 1536, 384), (2000, 64, 64)])
def test_where_quick_products_are_said_to_be_exact_they_are_so_in_every_shape(shape: tuple[int, int, int]) -> None:
    assert difference(*shape) < 1e-6


def test_a_processor_that_rounds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.Tensor.addmm_

    def rounded(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return multiply(total, left.bfloat16().float(), right.bfloat16().float())

    monkeypatch.setattr(torch.Tensor, "addmm_", rounded)
    assert not quick_ones_are_exact.__wrapped__()


@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_the_switch_is_back_where_it_was_also_after_an_error(before: str) -> None:
    found = SWITCH.fp32_precision
    SWITCH.fp32_precision = before
    try:
        with pytest.raises(RuntimeError), quick_products():
            assert SWITCH.fp32_precision == "bf16"
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        assert SWITCH.fp32_precision == before
    finally:
        SWITCH.fp32_precision = found


def test_a_torch_without_the_switch_multiplies_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    assert difference(31, 384, 384) < 1e-6
