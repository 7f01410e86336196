from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from onestep_peft.step.quick_products import are_exact, quick_products

CPU = torch.device("cpu")
HAS_SWITCH = hasattr(torch.backends.mkldnn, "matmul")
wants_the_switch = pytest.mark.skipif(not HAS_SWITCH, reason="this torch has no switch for oneDNN's products")
wants_exact_ones = pytest.mark.skipif(not are_exact(), reason="this processor rounds the factors, or torch is too old")


def precision() -> str:
    switch: Any = torch.backends.mkldnn.matmul
    return str(switch.fp32_precision)


def difference(rows: int, d_out: int, d_in: int) -> float:
    """Of a quick product from that in float64, by its norm."""
    draw = torch.Generator().manual_seed(rows)
    delta, x = torch.randn(rows, d_out, generator=draw), torch.randn(rows, d_in, generator=draw)
    exact = delta.double().T @ x.double()
    with quick_products(CPU):
        found = torch.zeros(d_out, d_in).addmm_(delta.T, x)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(1, 7, 5), (31, 384, 384), (190, 384, 1536), (700, 1536, 384), (2000, 64, 64)])
def test_a_quick_product_is_that_in_float64_on_any_processor(shape: tuple[int, int, int]) -> None:
    assert difference(*shape) < 1e-6


@wants_the_switch
def test_a_processor_that_rounds_is_found_out_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.Tensor.addmm_

    def rounded(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if precision() == "bf16":
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return multiply(total, left, right)

    monkeypatch.setattr(torch.Tensor, "addmm_", rounded)
    are_exact.cache_clear()
    try:
        assert not are_exact()
        assert difference(31, 384, 384) < 1e-6
    finally:
        are_exact.cache_clear()


@wants_exact_ones
def test_the_probe_does_not_follow_the_default_precision() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert are_exact.__wrapped__()
    finally:
        torch.set_default_dtype(torch.float32)


@wants_exact_ones
@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_the_switch_is_back_where_it_was_also_after_an_error(before: str) -> None:
    switch: Any = torch.backends.mkldnn.matmul
    found = precision()
    switch.fp32_precision = before
    try:
        with pytest.raises(RuntimeError), quick_products(CPU):
            assert precision() == "bf16"
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        assert precision() == before
    finally:
        switch.fp32_precision = found


@wants_exact_ones
def test_a_switch_that_followed_another_one_goes_on_doing_so() -> None:
    above: Any = torch.backends.mkldnn
    before = above.fp32_precision
    try:
        for value in ("tf32", "ieee"):
            above.fp32_precision = value
            with quick_products(CPU):
                assert precision() == "bf16"
            assert precision() == value
    finally:
        above.fp32_precision = before


@wants_exact_ones
def test_the_last_of_several_threads_turns_the_switch_back() -> None:
    before, entered, first_is_out = precision(), threading.Event(), threading.Event()
    seen: list[str] = []

    def second() -> None:
        with quick_products(CPU):
            entered.set()
            first_is_out.wait(10)
            seen.append(precision())

    thread = threading.Thread(target=second)
    with quick_products(CPU):
        thread.start()
        assert entered.wait(10)
    first_is_out.set()
    thread.join()
    assert seen == ["bf16"] and precision() == before


def test_other_devices_know_no_switch() -> None:
    before = precision() if HAS_SWITCH else ""
    with quick_products(torch.device("cuda")):
        assert not HAS_SWITCH or precision() == before


@wants_the_switch
def test_a_torch_without_the_switch_multiplies_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    assert not are_exact.__wrapped__()
