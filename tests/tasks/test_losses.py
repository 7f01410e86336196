"""Each task's losses against the model's own loss, row by row; counts of classes against a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onestep_peft.tasks import TASKS, TEXT_CLASSIFICATION, Task, logits_of, named, task_of
from tests.conftest import VOCABULARY, tiny_bert
from tests.tasks.small import TAGS, tiny_causal_llama, tiny_gpt2, tiny_tagger

ROWS, TOKENS = 5, 9


def ids(seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def gaps(labels: Tensor, share: float = 0.3) -> Tensor:
    """Some labels taken away."""
    gone = torch.rand(labels.shape, generator=torch.Generator().manual_seed(7)) < share
    return labels.masked_fill(gone, -100)


CASES: dict[str, tuple[PreTrainedModel, Tensor]] = {
    "single": (tiny_bert(num_labels=3), torch.tensor([0, 2, -100, 1, 1])),
    "multi": (
        tiny_bert(num_labels=4, problem_type="multi_label_classification"),
        (torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float(),
    ),
    "regression": (tiny_bert(num_labels=1), torch.tensor([0.5, -100.0, 3.0, 0.0, 2.5])),
    "two numbers": (tiny_bert(num_labels=2, problem_type="regression"), torch.arange(10.0).view(ROWS, 2) / 4),
    "tokens": (tiny_tagger(), gaps(ids(3) % len(TAGS))),
    "llama": (tiny_causal_llama(), gaps(ids())),
    "gpt2": (tiny_gpt2(), gaps(ids())),
}


@pytest.fixture(params=CASES, ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> tuple[Task, PreTrainedModel, Tensor, Tensor]:
    model, labels = CASES[request.param]
    model.eval()
    with torch.no_grad():
        return task_of(model), model, labels, logits_of(model(input_ids=ids()))


def test_the_losses_over_the_items_are_the_models_own_loss(case: tuple[Task, PreTrainedModel, Tensor, Tensor]) -> None:
    task, model, labels, logits = case
    losses, items = task.row_losses(logits, labels), task.row_items(labels)
    assert losses.shape == items.shape == (ROWS,)
    with torch.no_grad():
        own = model(input_ids=ids(), labels=labels).loss
        assert float(losses.sum() / items.sum()) == pytest.approx(float(own), rel=1e-6)
        for i in range(ROWS):
            if items[i]:
                alone = model(input_ids=ids()[i : i + 1], labels=labels[i : i + 1]).loss
                assert float(losses[i] / items[i]) == pytest.approx(float(alone), rel=1e-5)


def test_a_row_without_labels_has_no_items_and_no_loss(case: tuple[Task, PreTrainedModel, Tensor, Tensor]) -> None:
    task, _, labels, logits = case
    nothing = float("nan") if labels.is_floating_point() else -100
    labels = labels.clone()
    labels[2] = nothing
    assert float(task.row_losses(logits, labels)[2]) == 0 and int(task.row_items(labels)[2]) == 0
    # So does a gradient: NaN in the labels must not reach it.
    logits = logits.clone().requires_grad_()
    task.row_losses(logits, labels).sum().backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[2].any()


def test_losses_of_16_bit_logits_are_taken_in_32(case: tuple[Task, PreTrainedModel, Tensor, Tensor]) -> None:
    task, _, labels, logits = case
    narrow = logits.bfloat16()
    assert torch.equal(task.row_losses(narrow, labels), task.row_losses(narrow.float(), labels))


def test_classes_are_counted(case: tuple[Task, PreTrainedModel, Tensor, Tensor]) -> None:
    task, _, labels, logits = case
    if task.class_counts is None:
        assert not task.has_classes
        return
    there, found = task.class_counts(logits, labels)
    for row in range(ROWS):
        for label in range(logits.shape[-1]):
            if task.problem_type == "multi_label_classification":
                true, predicted = labels[row, label] == 1, logits[row, label] > 0
            else:
                true, predicted = labels[row] == label, logits[row].argmax(-1) == label
            assert int(there[row, label]) == int(true.sum())
            assert int(found[row, label]) == int((true & predicted).sum())


def test_several_labels_a_row_may_be_known_in_part() -> None:
    task = named("text-classification", "multi_label_classification")
    logits, labels = torch.randn(2, 3), torch.tensor([[1.0, -100, 0], [0, 1, 1]])
    known = nn.functional.binary_cross_entropy_with_logits(logits[0, [0, 2]], labels[0, [0, 2]])
    assert float(task.row_losses(logits, labels)[0]) == pytest.approx(float(known))
    assert task.row_items(labels).tolist() == [1, 1]


def test_every_task_is_found_by_its_name() -> None:
    for task in TASKS:
        assert named(task.name, task.problem_type) is task
    assert named("text-classification") is TEXT_CLASSIFICATION
    with pytest.raises(ValueError, match="`task='text-clasification'` is none of.*Did you mean 'text-classification'"):
        named("text-clasification")
