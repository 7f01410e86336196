"""Sums of gradients in fp32, against sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onestep_peft.step.parameter_gradients import ParameterGradients


def backward(parameter: Tensor, factor: float) -> None:
    (parameter * factor).sum().backward()


def test_a_16_bit_gradient_keeps_small_addends() -> None:
    # 1 + 1000 · 2⁻¹⁰: bf16 has eight bits, so every addend is lost beside the 1.
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    gradients = ParameterGradients([parameter])
    with gradients.collected():
        for factor in [1.0] + [2.0**-10] * 1000:
            backward(parameter, factor)
        assert parameter.grad is None  # freed at once
        total = gradients.of(parameter)
        assert total is not None
        assert total.dtype == torch.float32
        assert torch.allclose(total, torch.full((3,), 1 + 1000 / 1024))


def test_fp32_gradients_stay_in_grad() -> None:
    parameter = nn.Parameter(torch.ones(3))
    gradients = ParameterGradients([parameter])
    with gradients.collected():
        backward(parameter, 2.0)
        assert gradients.of(parameter) is parameter.grad


def test_frozen_parameters_and_those_without_a_part_are_left_out() -> None:
    used, unused, frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1)), torch.ones(1)
    gradients = ParameterGradients([used, unused, frozen])
    backward(used, 3.0)
    assert [parameter for parameter, _ in gradients.all()] == [used]
    assert gradients.of(unused) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divide_and_reset(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=dtype))
    gradients = ParameterGradients([parameter])
    with gradients.collected():
        backward(parameter, 6.0)
        gradients.divide(4.0)
        assert torch.allclose(gradients.of(parameter).float(), torch.full((2,), 1.5))
        gradients.reset()
        parameter.grad = None
        backward(parameter, 1.0)
        assert torch.allclose(gradients.of(parameter).float(), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_sums_go_on_where_they_were(dtype: torch.dtype) -> None:
    first, second = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    gradients = ParameterGradients([first, second])
    with gradients.collected():
        backward(second, 3.0)
        saved = {number: total.clone() for number, total in gradients.sums().items()}
    first, second = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    again = ParameterGradients([first, second])
    with again.collected():
        again.load(saved)
        backward(second, 0.5)
        assert torch.allclose(again.of(second).float(), torch.full((2,), 3.5))
