"""A prompt's small steps, against torch.optim.Adam, and what makes their length one for all tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onestep_peft.step import prompt_steps
from onestep_peft.step.layers import Prompt
from onestep_peft.step.parameter_gradients import ParameterGradients
from onestep_peft.step.statistics import statistics_of
from onestep_peft.step.walk import Walk
from tests.conftest import relative_difference

STEPS, SHAPE = 7, (3, 5)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def walk_of(prompt: nn.Parameter) -> Walk:
    layer = Prompt("prompt", nn.Linear(1, 1), SHAPE, lambda: prompt)
    walk = Walk([layer], [prompt])
    walk.begin_at_once(slices=STEPS, losses=torch.ones(4))
    return walk


def advance(walk: Walk, prompt: nn.Parameter, gradient: Tensor, left: float, loss: float = 1.0) -> None:
    record = statistics_of(Prompt("prompt", nn.Linear(1, 1), SHAPE, lambda: prompt))
    record.gradient = gradient
    walk.advance({"prompt": record}, ParameterGradients([prompt]), left=left, loss=loss)


def test_steps_are_adams_along_gradients_by_their_mean_length_so_far() -> None:
    start, gradients = drawn(*SHAPE), drawn(STEPS, *SHAPE)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.double().clone())
    walk = walk_of(ours)
    rate = prompt_steps.PACE * float(start.double().square().mean().sqrt())
    adam = torch.optim.Adam([theirs], lr=rate)
    for i, gradient in enumerate(gradients):
        left = 1 - i / STEPS
        advance(walk, ours, gradient, left)
        lengths = gradients[: i + 1].double().norm(dim=2, keepdim=True)  # (steps, tokens, 1)
        theirs.grad = gradient.double() / torch.maximum(lengths[-1], lengths.mean(0))
        for group in adam.param_groups:
            group["lr"] = rate * left
        adam.step()
        assert relative_difference(ours, theirs) < 1e-5


def test_steps_are_as_long_as_real_tokens_say() -> None:
    prompt, words = nn.Parameter(drawn(*SHAPE)), 0.5 * drawn(50, 5)
    layer = Prompt("prompt", nn.Linear(1, 1), SHAPE, lambda: prompt, lambda: words)
    walk = Walk([layer], [prompt])
    walk.begin_at_once(slices=STEPS, losses=torch.ones(4))
    advance(walk, prompt, torch.ones(*SHAPE), 1.0)
    expected = prompt_steps.PACE * float(words.square().mean().sqrt())
    assert torch.allclose(prompt, drawn(*SHAPE) - expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_neither_the_scale_of_the_prompt_nor_that_of_the_losses_matters(scale: float) -> None:
    one, other = nn.Parameter(drawn(*SHAPE)), nn.Parameter(scale * drawn(*SHAPE))
    walks = walk_of(one), walk_of(other)
    for i, gradient in enumerate(drawn(STEPS, *SHAPE)):
        advance(walks[0], one, gradient, 1 - i / STEPS)
        advance(walks[1], other, gradient / scale**2, 1 - i / STEPS)
    assert relative_difference(other / scale, one) < 1e-4


def test_a_token_that_no_row_reaches_stays() -> None:
    prompt = nn.Parameter(drawn(*SHAPE))
    walk = walk_of(prompt)
    gradient = drawn(*SHAPE)
    gradient[1] = 0
    advance(walk, prompt, gradient, 1.0)
    assert torch.equal(prompt[1], drawn(*SHAPE)[1]) and not torch.isclose(prompt[0], drawn(*SHAPE)[0]).any()


def test_small_steps_in_16_bits_add_up_in_fp32() -> None:
    start, gradients = drawn(*SHAPE).bfloat16(), drawn(STEPS, *SHAPE)
    short, long = nn.Parameter(start.clone()), nn.Parameter(start.float())
    walks = walk_of(short), walk_of(long)
    for i, gradient in enumerate(gradients):
        for walk, prompt in zip(walks, (short, long), strict=True):
            advance(walk, prompt, gradient, 1 - i / STEPS)
    assert torch.equal(short, long.bfloat16())


def test_a_walk_is_taken_up_again_with_what_adam_knows() -> None:
    gradients = drawn(STEPS, *SHAPE)
    whole, parted = nn.Parameter(drawn(*SHAPE)), nn.Parameter(drawn(*SHAPE))
    walks = walk_of(whole), walk_of(parted)
    for i, gradient in enumerate(gradients):
        if i == 3:
            other = Walk([Prompt("prompt", nn.Linear(1, 1), SHAPE, lambda: parted)], [parted])
            other.load({name: tensor.clone() for name, tensor in walks[1].tensors().items()})
            walks = walks[0], other
        for walk, prompt in zip(walks, (whole, parted), strict=True):
            advance(walk, prompt, gradient, 1 - i / STEPS)
    assert torch.equal(whole, parted)


def test_a_loss_that_is_not_a_number_sends_it_back_to_begin_anew_at_half_the_pace() -> None:
    prompt = nn.Parameter(drawn(*SHAPE))
    walk = walk_of(prompt)
    gradients = drawn(STEPS, *SHAPE)
    for i in range(3):
        advance(walk, prompt, gradients[i], 1 - i / STEPS)
    advance(walk, prompt, gradients[3], 0.5, loss=float("nan"))
    assert torch.equal(prompt, drawn(*SHAPE)) and walk.pace == prompt_steps.PACE / 2
    fresh = nn.Parameter(drawn(*SHAPE))
    anew = walk_of(fresh)
    advance(walk, prompt, gradients[4], 0.5)
    advance(anew, fresh, gradients[4], 0.25)
    assert relative_difference(prompt, fresh) < 1e-6


def test_losses_far_above_where_it_began_do_not_stop_it() -> None:
    """The head has not followed yet: what the rows lose says little."""
    prompt = nn.Parameter(drawn(*SHAPE))
    walk = walk_of(prompt)
    for i in range(3):
        before = prompt.detach().clone()
        advance(walk, prompt, drawn(*SHAPE), 1 - i / STEPS, loss=100.0)
        assert not torch.equal(prompt, before)
