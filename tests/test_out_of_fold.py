"""Heads that have not seen the rows they answer for: the folds, the hook, the fits, and the gradient of a pass."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onestep_peft import OneStepTrainer, head, head_trainer, out_of_fold
from onestep_peft.head import Features, HeadFit
from onestep_peft.held_out import listed
from onestep_peft.out_of_fold import FoldHeads, fold_of_each
from onestep_peft.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION, TOKEN_CLASSIFICATION, Task
from tests.conftest import (
    config_for,
    relative_difference,
    same_bits,
    tiny_bert,
    tiny_llama,
    toy_rows,
    trainer_for,
    word_tokenizer,
)
from tests.tasks.small import tagged_rows, tiny_tagger
from tests.test_head import clusters, newton, scikit_learn

# Folds


def tokens_of(number: int, classes: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that all differ, with classes of different sizes."""
    draw = random.Random(seed)
    labels = [min(draw.randrange(classes + 2), classes - 1) for _ in range(number)]
    return [{"input_ids": [2, i, draw.randrange(96), 3], "labels": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_a_rows_fold_follows_from_its_content_alone(folds: int) -> None:
    rows = tokens_of(60, 3)
    numbers = random.Random(1).sample(range(60), 60)
    assert fold_of_each([rows[i] for i in numbers], folds).tolist() == fold_of_each(rows, folds)[numbers].tolist()
    # As arrays, and with their columns in another order.
    others = [{"labels": np.int64(row["labels"]).item(), "input_ids": np.array(row["input_ids"])} for row in rows]
    assert fold_of_each(others, folds).tolist() == fold_of_each(rows, folds).tolist()


def test_padding_in_the_data_does_not_move_a_row_to_another_fold() -> None:
    rows = [{**row, "attention_mask": [1] * 4} for row in tokens_of(40, 3)]
    padded = [
        {"input_ids": [0] * i + row["input_ids"] + [0, 0], "attention_mask": [0] * i + [1] * 4 + [0, 0], **label}
        for i, row in enumerate(rows)
        for label in [{"labels": row["labels"]}]
    ]
    assert fold_of_each(padded, 5).tolist() == fold_of_each(rows, 5).tolist()
    # A label for each token goes with its token.
    for row, wide in zip(rows, padded, strict=True):
        row["labels"] = [-100, row["labels"], 1, -100]
        wide["labels"] = [-100 if not real else row["labels"].pop(0) for real in wide["attention_mask"]]
        row["labels"] = [one for one, real in zip(wide["labels"], wide["attention_mask"], strict=True) if real]
    assert fold_of_each(padded, 5).tolist() == fold_of_each(rows, 5).tolist()


def test_equal_rows_share_a_fold_and_do_not_move_the_others() -> None:
    rows = tokens_of(40, 3)
    alone = fold_of_each(rows, 5).tolist()
    twice = fold_of_each([*rows, *rows[:25]], 5).tolist()
    assert twice == alone + alone[:25]


@pytest.mark.parametrize("folds", [2, 3, 5, 7])
def test_rows_and_those_of_each_class_are_spread_evenly(folds: int) -> None:
    rows = tokens_of(83, 4)
    found = fold_of_each(rows, folds).tolist()
    for label in (None, 0, 1, 2, 3):
        sizes = Counter(fold for row, fold in zip(rows, found, strict=True) if label in (None, row["labels"]))
        counts = [sizes[fold] for fold in range(folds)]
        assert max(counts) - min(counts) <= 1, label
    assert sum(sizes.values()) > folds


def test_there_are_no_more_folds_than_different_rows() -> None:
    rows = tokens_of(3, 2)
    assert sorted(fold_of_each(rows, 5).tolist()) == [0, 1, 2]
    assert fold_of_each([rows[0]] * 4, 5).tolist() == [0] * 4


# The hook


def heads_for(folds: int, outputs: int, d: int, bias: bool) -> FoldHeads:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(folds, outputs, d, generator=draw)
    return FoldHeads(weight, torch.randn(folds, outputs, generator=draw) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (7, 4)])
def test_each_row_is_answered_by_the_head_of_its_fold(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    outputs, d = 3, 6
    heads, layer = heads_for(4, outputs, d, bias), nn.Linear(d, outputs, bias=bias).to(dtype)
    folds = torch.tensor([0, 3, 1, 1, 2, 0, 3])
    x = torch.randn(*shape, d, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    own = layer(x)
    with heads.answering(layer, folds, torch.arange(7)):
        found = layer(x)
    assert found.dtype == dtype and found.shape == own.shape
    # A row at a time, in float64, from weights that the layer's precision can hold.
    expected = torch.zeros(found.shape, dtype=torch.float64)
    gradient = torch.zeros(x.shape, dtype=torch.float64)
    for row, fold in enumerate(folds.tolist()):
        weight = heads.weight[fold].to(dtype).double()
        expected[row] = x[row].detach().double() @ weight.T
        gradient[row] = weight.sum(0)
        if heads.bias is not None:
            expected[row] += heads.bias[fold].to(dtype).double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(found.double(), expected, atol=tolerance)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(slope.double(), gradient, atol=tolerance)
    # Afterwards the layer speaks for itself again.
    assert not layer._forward_hooks and same_bits(layer(x).detach(), own.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [None, 4])
def test_a_rows_pull_is_the_gradient_of_a_zero(tokens: int | None, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    heads = dataclasses.replace(heads_for(2, 3, 6, True), pulls=torch.randn(9, 6, generator=draw))
    layer, places = nn.Linear(6, 3).to(dtype), torch.tensor([8, 0, 3, 3, 5])
    x = torch.randn(5, *[tokens][: tokens is not None], 6, generator=draw).to(dtype).requires_grad_()
    read = torch.tensor([3, 0, 2, 3, 1])  # the token that a decoder classifies a row by
    with heads.answering(layer, places % 2, places) as pulling:
        output = layer(x)
        logits = output if tokens is None else output[torch.arange(5), read]
        added = pulling(logits, None)
    assert added.shape == (5,) and not added.any()
    (slope,) = torch.autograd.grad(added.sum(), x)
    there = slope if tokens is None else slope[torch.arange(5), read]
    assert same_bits(there, heads.pulls[places].to(dtype))
    assert float(slope.abs().sum()) == float(there.abs().sum())  # and nothing at the other tokens
    without = dataclasses.replace(heads, pulls=None)
    with without.answering(layer, places % 2, places) as pulling:
        assert not pulling(layer(x), None).any()


def test_an_error_takes_the_hook_away_too() -> None:
    heads, layer = heads_for(2, 3, 6, True), nn.Linear(6, 3)
    with pytest.raises(RuntimeError, match="out of memory"), heads.answering(layer, *torch.zeros(2, 2).long()):
        assert layer._forward_hooks
        raise RuntimeError("out of memory")
    assert not layer._forward_hooks


@pytest.mark.parametrize("bias", [True, False])
def test_heads_come_back_from_the_tensors_that_a_file_holds(bias: bool) -> None:
    heads = heads_for(3, 2, 4, bias)
    again = FoldHeads.among({"loss": torch.zeros(()), **heads.tensors()})
    assert again is not None and same_bits(again.weight, heads.weight)
    assert again.bias is None if heads.bias is None else same_bits(again.bias, heads.bias)
    assert again.pulls is None
    pulled = FoldHeads.among(dataclasses.replace(heads, pulls=torch.ones(5, 4)).tensors())
    assert pulled is not None and pulled.pulls is not None and same_bits(pulled.pulls, torch.ones(5, 4))
    assert FoldHeads.among({"loss": torch.zeros(())}) is None


# The fits


def features_of(x: Tensor, labels: Tensor) -> Features:
    return Features(x, labels, torch.arange(len(x)))


def fitted(found: Features, folds_of_rows: Tensor, folds: int, whole: HeadFit, task: Task) -> FoldHeads | None:
    """The heads for items that are one row each, in the rows' order."""
    return out_of_fold.fit(found, torch.arange(len(found.x)), folds_of_rows, folds, whole, task, pulls=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_a_folds_head_is_scikit_learns_on_the_rows_of_all_others(bias: bool, held: bool) -> None:
    x, labels = clusters(120, seed=0)
    folds = torch.arange(120) % 4
    held_out = clusters(60, seed=1) if held else None
    whole = head.fit(x, labels, held_out=held_out, outputs=3, bias=bias)
    assert (whole.penalty == 1 / 120) != held
    found = fitted(features_of(x, labels), folds, 4, whole, TEXT_CLASSIFICATION)
    assert found is not None and found.weight.shape == (4, 3, 5)
    for fold in range(4):
        others = folds != fold
        weight, offset = scikit_learn(x[others], labels[others], whole.penalty, bias)
        assert np.allclose(found.weight[fold].numpy(), weight, atol=2e-3)
        # Nearer to it than the head of all rows by far.
        assert np.abs(whole.weight.numpy() - weight).max() > 10 * np.abs(found.weight[fold].numpy() - weight).max()
        if found.bias is not None:
            ours = found.bias[fold].numpy()
            assert np.allclose(ours - ours.mean(), offset - offset.mean(), atol=1e-2)
    assert (found.bias is None) != bias


def test_a_head_that_knows_its_rows_by_heart_forgets_those_of_a_fold() -> None:
    # Under a weak penalty the head of all rows has next to no gradient on any part of them; a fit from it on that stops
    # early would stay there, and the loss of rows that it has seen would pass for that of others.
    x, labels = clusters(60, seed=1, classes=4, d=60)
    labels[::3] = (labels[::3] + 1) % 4  # what can be learnt by heart only
    whole = dataclasses.replace(head.fit(x, labels, held_out=None, outputs=4, bias=True), penalty=1e-4)
    whole = head.refit(x, labels, whole)
    folds = torch.arange(60) % 5
    found = fitted(features_of(x, labels), folds, 5, whole, TEXT_CLASSIFICATION)
    assert found is not None and found.bias is not None
    logits = torch.einsum("nod,nd->no", found.weight[folds], x) + found.bias[folds]
    expected = torch.empty(60, 4, dtype=torch.float64)
    for fold in range(5):
        others = folds != fold
        weight, offset = (torch.tensor(part) for part in scikit_learn(x[others], labels[others], 1e-4, True))
        expected[~others] = x[~others].double() @ weight.T + offset
    unseen = float(nn.functional.cross_entropy(expected, labels))
    assert float(nn.functional.cross_entropy(logits, labels)) == pytest.approx(unseen, rel=0.02)
    assert float(nn.functional.cross_entropy(x.double() @ whole.weight.T + whole.bias, labels)) < 0.02 < 1 < unseen


def test_numbers_are_fitted_out_of_fold_by_ridge_regression() -> None:
    x, _ = clusters(80, seed=0)
    y = 100 + 5 * (x @ torch.randn(5, generator=torch.Generator().manual_seed(1)))
    y[7] = float("nan")
    whole = head.fit(x, y, held_out=None, outputs=1, bias=True, task=TEXT_REGRESSION)
    folds = torch.arange(80) % 3
    found = fitted(features_of(x, y), folds, 3, whole, TEXT_REGRESSION)
    assert found is not None and found.bias is not None
    for fold in range(3):
        rows = (folds != fold) & ~y.isnan()
        z, targets = x[rows].double(), y[rows].double()
        mean, scale = z.mean(0), z.std(0, correction=0)
        z, centre = (z - mean) / scale, targets.mean()
        # ∂/∂w of mean (zw − y)² + penalty/2 ‖w‖², in closed form.
        gram = z.T @ z / len(z) + whole.penalty / 2 * torch.eye(5, dtype=torch.float64)
        weight = torch.linalg.solve(gram, z.T @ (targets - centre) / len(z)) / scale
        assert torch.allclose(found.weight[fold, 0].double(), weight, rtol=1e-3)
        assert float(found.bias[fold, 0]) == pytest.approx(float(centre - weight @ mean), rel=1e-3)


def test_where_one_fold_holds_everything_there_are_no_heads() -> None:
    x, labels = clusters(20, seed=0)
    whole = head.fit(x, labels, held_out=None, outputs=3, bias=True)
    for fold in (0, 1):
        folds = torch.full((20,), fold)
        assert fitted(features_of(x, labels), folds, 2, whole, TEXT_CLASSIFICATION) is None


def test_a_fold_without_items_has_the_head_of_all_of_them() -> None:
    # The items may be a sample of the rows, and the pass has rows of every fold.
    x, labels = clusters(60, seed=0)
    whole = head.fit(x, labels, held_out=None, outputs=3, bias=True)
    found = fitted(features_of(x, labels), torch.arange(60) % 2, 4, whole, TEXT_CLASSIFICATION)
    assert found is not None and len(found.weight) == 4
    for fold in (2, 3):
        assert torch.allclose(found.weight[fold].double(), whole.weight, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_rows_pull_is_what_it_changes_in_the_loss_of_the_rows_that_heads_have_not_seen(bias: bool) -> None:
    # By hand, all heads fitted anew and differentiable; two items stand behind the last row.
    x, labels = clusters(40, seed=0)
    labels[[0, 1, 5]] = -100
    places = torch.cat([torch.arange(38), torch.tensor([37, 37])]).flip(0)
    folds = torch.arange(38) % 3
    whole = head.fit(x, labels, held_out=None, outputs=3, bias=bias)
    everything = features_of(x, labels), places, folds, 3, whole, TEXT_CLASSIFICATION
    found, without = (out_of_fold.fit(*everything, pulls=wanted) for wanted in (True, False))
    assert without is not None and without.pulls is None
    assert found is not None and found.pulls is not None and found.pulls.shape == (38, 5)

    wide = x.double().requires_grad_()
    known, total = labels != -100, torch.zeros((), dtype=torch.float64)
    for fold in range(3):
        inside = folds[places] == fold
        rows, others = inside & known, ~inside & known
        weight, offset = newton(wide[others], labels[others], whole.penalty, bias, TEXT_CLASSIFICATION, outputs=3)
        # The rows' own features are held: what they change by themselves is the residual's part of the gradient.
        logits = wide[rows].detach() @ weight.T + offset
        total = total + TEXT_CLASSIFICATION.row_losses(logits, labels[rows]).sum()
    (expected,) = torch.autograd.grad(total, wide)
    by_place = torch.zeros(38, 5, dtype=torch.float64)
    by_place[places[known]] = expected[known] / 2  # half of it counts
    assert relative_difference(found.pulls, by_place) < 1e-3
    assert float(expected.norm()) > 0.1 and not found.pulls[places[5]].any()


def test_rows_that_fill_up_a_batch_do_not_pull_for_the_one_they_copy(tmp_path: Path) -> None:
    # With covariances from a sample the rows are dealt into shares, each of them filled up to whole micro-batches.
    found = {}
    for sample in (1500, 12):
        options = {**WHOLE_PASS, "guard": True, "search_dataset": toy_rows(30, seed=2), "covariance_rows": sample}
        trainer = trainer_for(tmp_path / str(sample), toy_rows(43, seed=1), **options)
        trainer.train()
        assert (trainer.shares > 1) == (sample == 12)
        assert trainer._fold_heads is not None and trainer._fold_heads.pulls is not None
        found[sample] = {name: one.gradient for name, one in trainer.one_step.statistics.items()}
    for name, gradient in found[1500].items():
        if float(gradient.norm()) > 1e-5:
            assert relative_difference(found[12][name], gradient) < 1e-4, name


def test_where_the_head_stays_through_slices_no_row_pulls_at_it(tmp_path: Path) -> None:
    for slices in (1, 2):
        options = {**WHOLE_PASS, "guard": True, "slices": slices, "search_dataset": toy_rows(30, seed=2)}
        trainer = trainer_for(tmp_path / str(slices), toy_rows(40, seed=1), **options)
        trainer.train()
        assert trainer._fold_heads is not None and (trainer._fold_heads.pulls is None) == (slices == 2)


def test_tokens_have_no_pulls(tmp_path: Path) -> None:
    trainer = OneStepTrainer(
        model=tiny_tagger(), args=config_for(tmp_path, direction="kfac", step_size=0.05),
        train_dataset=tagged_rows(20, 1), search_dataset=tagged_rows(20, 2), processing_class=word_tokenizer(),
    )  # fmt: skip
    assert trainer.task is TOKEN_CLASSIFICATION
    trainer.train()
    assert trainer._head_follows  # as in a task by rows
    assert trainer._fold_heads is not None and trainer._fold_heads.pulls is None


def test_rows_beyond_a_sample_of_many_tokens_have_a_head_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_trainer, "TOKENS_MAX", 40)
    trainer = OneStepTrainer(
        model=tiny_tagger(), args=config_for(tmp_path, direction="kfac", step_size=0.05, guard=False, head_folds=30),
        train_dataset=tagged_rows(60, 1), processing_class=word_tokenizer(),
    )  # fmt: skip
    assert len(trainer._head_rows(lead=False)) < 30
    trainer.train()
    assert trainer._fold_heads is not None and len(trainer._fold_heads.weight) == 30


# The gradient of a pass

CLASSES = 3
MODELS = {"bert": (tiny_bert, "right"), "llama": (tiny_llama, "left")}
WHOLE_PASS = {"direction": "kfac", "step_size": 0.05, "guard": False, "per_device_train_batch_size": 8}


def one_batch(trainer: OneStepTrainer, dataset: Any) -> tuple[dict[str, Tensor], Tensor, list[Any]]:
    """All rows of a set at once: the inputs, their labels, and the rows."""
    rows = listed(dataset)
    batch = dict(trainer.data_collator(rows))
    return batch, batch.pop("labels"), rows


def head_input(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What the head reads of each row, `(rows, d)`, from the backbone itself."""
    base: Any = model.get_base_model()
    if hasattr(base, "bert"):
        return base.bert(**batch).pooler_output
    hidden = base.model(**batch).last_hidden_state
    return hidden[:, -1]  # padded on the left


def gradients_by_autograd(model: Any, names: list[str], losses: Any) -> dict[str, Tensor]:
    """∂ mean loss / ∂W of the adapted layers' base weights; B is zero, so that is the gradient of the product."""
    weights = [model.get_submodule(name).get_base_layer().weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    found = torch.autograd.grad(losses().mean(), weights, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("folds", "held"), [(1, False), (1, True), (3, False), (3, True)])
def test_the_gradient_of_a_pass_is_autograds_through_the_fits_of_the_heads_that_have_not_seen_a_row(
    kind: str, folds: int, held: bool, tmp_path: Path
) -> None:
    # With rows held out the head is fitted again after the step; without, it stays, and so do those of the folds.
    make, side = MODELS[kind]
    rows = toy_rows(43, seed=1, classes=CLASSES)  # 43 = 5 · 8 + 3: an uneven tail
    options = {**WHOLE_PASS, "guard": held, "search_dataset": toy_rows(30, seed=2, classes=CLASSES) if held else None}
    trainer = trainer_for(
        tmp_path, rows, model=make(num_labels=CLASSES), processing_class=word_tokenizer(side), head_folds=folds,
        **options,
    )  # fmt: skip
    oracle: Any = copy.deepcopy(trainer.model).eval()
    batch, labels, tokens = one_batch(trainer, trainer.train_dataset)
    chooses = None
    if held:
        held_batch, held_labels, _ = one_batch(trainer, trainer.held_rows)
        with torch.no_grad():
            chooses = head_input(oracle, held_batch), held_labels
    output = trainer.train()

    # By hand: features, the whole head, and for each fold one that follows the features of the other rows.
    with torch.no_grad():
        x = head_input(oracle, batch)
    bias = kind == "bert"
    whole = head.fit(x, labels, held_out=chooses, outputs=CLASSES, bias=bias)
    fold_of = fold_of_each(tokens, folds)

    def losses(follow: bool) -> Tensor:
        features = head_input(oracle, batch).double()
        result = []
        for fold in range(folds):
            rows, others = fold_of == fold, fold_of != fold
            if folds > 1:
                others_x = features[others] if follow else features[others].detach()
                weight, offset = newton(
                    others_x, labels[others], whole.penalty, bias, TEXT_CLASSIFICATION, outputs=CLASSES
                )
            else:
                weight, offset = whole.weight, whole.bias if whole.bias is not None else torch.zeros(CLASSES)
            result.append(
                nn.functional.cross_entropy(features[rows] @ weight.T + offset, labels[rows], reduction="none")
            )
        return torch.cat(result)

    statistics = trainer.one_step.statistics
    both = [gradients_by_autograd(oracle, list(statistics), lambda f=follow: losses(f)) for follow in (held, False)]
    expected = {name: (both[0][name] + both[1][name]) / 2 for name in statistics}
    moving = [name for name, gradient in expected.items() if float(gradient.norm()) > 1e-5]
    assert len(moving) > 10
    for name in moving:
        assert relative_difference(statistics[name].gradient, expected[name]) < 5e-4, name
    assert output.training_loss == pytest.approx(float(losses(held).mean().detach()), rel=1e-4)
    assert (trainer._fold_heads is None) == (folds == 1)
    if not held:  # the head that is installed is the one of all rows, whatever the folds
        assert trainer.adapted.head is not None
        installed = head.active(trainer.model, trainer.adapted.head).weight.detach()
        assert relative_difference(installed, whole.weight) < 1e-4


def test_the_loss_of_the_pass_is_that_of_rows_a_head_has_not_seen(tmp_path: Path) -> None:
    # As many features as rows: the head of all of them knows each by heart.
    rows = toy_rows(40, seed=1)
    found = {}
    for folds in (1, 5):
        trainer = trainer_for(tmp_path / str(folds), rows, head_folds=folds, **WHOLE_PASS)
        found[folds] = trainer.train().training_loss
    assert found[5] > 3 * found[1]


@pytest.mark.parametrize("fit_head", [False, "auto"])
def test_without_a_fitted_head_there_are_no_folds(fit_head: Any, tmp_path: Path) -> None:
    plain = {"direction": "sgd", "step_size": 0.1} if fit_head == "auto" else {**WHOLE_PASS, "fit_head": False}
    trainer = trainer_for(tmp_path, toy_rows(30, seed=1), **plain)
    trainer.train()
    assert trainer._fold_heads is None


def test_the_second_run_of_a_trainer_knows_nothing_of_the_firsts_folds(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, toy_rows(40, seed=1), **WHOLE_PASS)
    trainer.train()
    assert trainer._fold_heads is not None
    trainer.args.fit_head = False
    trainer.train()
    assert trainer._fold_heads is None
