"""The fresh head: which modules it is, its features, and its fit against scikit-learn."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorForTokenClassification,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)

from onestep_peft import head
from onestep_peft.tasks import (
    MULTI_LABEL_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_REGRESSION,
    TOKEN_CLASSIFICATION,
    Task,
)
from tests.conftest import SMALL, VOCABULARY, relative_difference, tiny_bert, tiny_llama, toy_rows, word_tokenizer
from tests.tasks.small import tiny_tagger

CONFIGS = {
    "bert": (BertConfig(**SMALL), ["classifier"], "classifier"),
    "distilbert": (
        DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
        ["classifier", "pre_classifier"],
        "classifier",
    ),
    "deberta-v2": (DebertaV2Config(**SMALL), ["classifier", "pooler"], "classifier"),
    "modernbert": (
        ModernBertConfig(
            **{k: v for k, v in SMALL.items() if k != "initializer_range"}, pad_token_id=0, bos_token_id=2,
            eos_token_id=3, cls_token_id=2, sep_token_id=3,
        ),
        ["classifier", "head"],
        "classifier",
    ),
    "roberta": (RobertaConfig(**SMALL, pad_token_id=0), ["classifier"], "classifier.out_proj"),
    "llama": (LlamaConfig(**SMALL, pad_token_id=0), ["score"], "score"),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS, ids=CONFIGS.keys())
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A backbone saved without a head, the fresh modules to expect, and the last layer."""
    config, fresh, last = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder, fresh, last


def test_the_fresh_modules_are_those_no_checkpoint_filled(saved: tuple[Path, list[str], str], tmp_path: Path) -> None:
    folder, fresh, last = saved
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert sorted(head.fresh_modules(model)) == fresh
    assert head.last_layer(model, fresh, 3) == last
    # As built from a configuration: nothing was loaded, and the head is what stands beside the backbone.
    built = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=3))
    assert sorted(head.fresh_modules(built)) == fresh
    # Saved whole: nothing is fresh.
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert head.fresh_modules(whole) == []
    assert head.last_layer(whole, [], 3) is None


def test_a_copy_counts_as_fresh_and_says_so(tmp_path: Path) -> None:
    # A copied parameter has lost the mark of having been loaded, and a fresh head that is copied must be fitted.
    tiny_bert().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fit_head=False"):
        assert head.fresh_modules(copy.deepcopy(model)) == ["classifier"]


def test_a_head_of_another_size_is_fresh(tmp_path: Path) -> None:
    tiny_bert(num_labels=2).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    assert head.fresh_modules(model) == ["classifier"]


def clusters(rows: int, seed: int, classes: int = 3, d: int = 5) -> tuple[Tensor, Tensor]:
    """Overlapping clusters; features of different scales, far from zero."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=draw)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    x = centres[labels] + 1.5 * torch.randn(rows, d, generator=draw)
    return x * torch.logspace(-1, 1, d) + 3, labels


def scikit_learn(x: Tensor, labels: Tensor, penalty: float, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias by scikit-learn in the same standardised coordinates, taken back."""
    features = x.double().numpy()
    mean = features.mean(0) if bias else np.zeros(features.shape[1])
    scale = np.sqrt(((features - mean) ** 2).mean(0))
    # scikit-learn: ½‖w‖² + C Σ loss; here the mean of the losses + penalty/2 ‖w‖².
    model = LogisticRegression(C=1 / (penalty * len(features)), fit_intercept=bias, tol=1e-10, max_iter=10_000)
    model.fit((features - mean) / scale, labels.numpy())
    weight = model.coef_ / scale
    return weight, model.intercept_ - weight @ mean


def newton(x: Tensor, labels: Tensor, penalty: float, bias: bool, task: Task, *, outputs: int) -> tuple[Tensor, Tensor]:
    """Weight and offset of the fit in float64, differentiable in `x`: Newton steps with the Hessian as a matrix.

    At the minimum the derivative of one more such step with the Hessian held is that of the minimum.
    """
    mean = x.mean(0) if bias else torch.zeros_like(x[0])
    z = (x - mean) / (x - mean).square().mean(0).sqrt()
    if bias:
        z = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
    ridge = torch.full((z.shape[1],), penalty, dtype=z.dtype)
    ridge[x.shape[1] :] = 1e-9  # the offset is free; with several classes only its differences tell

    def objective(solution: Tensor, z: Tensor) -> Tensor:
        weight = solution.view(outputs, -1)
        return task.row_losses(z @ weight.T, labels).mean() + (ridge * weight.square()).sum() / 2

    solution = torch.zeros(outputs * z.shape[1], dtype=z.dtype)
    for _ in range(30):
        hessian: Any = torch.autograd.functional.hessian(lambda s: objective(s, z.detach()), solution)
        slope: Any = torch.autograd.functional.jacobian(lambda s: objective(s, z.detach()), solution)
        solution = solution - torch.linalg.solve(hessian, slope)
    assert float(slope.abs().max()) < 1e-8
    start = solution.requires_grad_()
    (slope,) = torch.autograd.grad(objective(start, z), start, create_graph=True)
    moved = (solution.detach() - torch.linalg.solve(hessian, slope)).view(outputs, -1)
    weight = moved[:, : x.shape[1]] / (x - mean).square().mean(0).sqrt()
    offset = moved[:, -1] if bias else torch.zeros(outputs, dtype=x.dtype)
    return weight, offset - weight @ mean


@pytest.mark.parametrize("bias", [True, False])
def test_fit_matches_scikit_learn(bias: bool) -> None:
    x, labels = clusters(120, seed=0)
    found = head.fit(x, labels, held_out=None, outputs=3, bias=bias)
    assert found.penalty == 1 / 120
    weight, offset = scikit_learn(x, labels, found.penalty, bias)
    assert np.allclose(found.weight.numpy(), weight, atol=1e-4)
    if bias:
        # A softmax does not see what all its biases share.
        ours = found.bias.numpy()
        assert np.allclose(ours - ours.mean(), offset - offset.mean(), atol=1e-3)
    else:
        assert found.bias is None


@pytest.mark.parametrize("bias", [True, False])
def test_the_penalty_is_the_one_the_held_out_rows_prefer(bias: bool) -> None:
    # Few rows, many features: a weak penalty overfits, so the strongest and the weakest both lose.
    x, labels = clusters(25, seed=1, d=12)
    held = clusters(400, seed=2, d=12)
    found = head.fit(x, labels, held_out=held, outputs=3, bias=bias)
    losses = {}
    for penalty in head.PENALTIES:
        weight, offset = scikit_learn(x, labels, penalty, bias)
        logits = held[0].double() @ torch.tensor(weight).T + torch.tensor(offset)
        losses[penalty] = float(nn.functional.cross_entropy(logits, held[1]))
    best = min(losses, key=losses.__getitem__)
    assert found.penalty == best
    assert best not in (head.PENALTIES[0], head.PENALTIES[-1])
    assert found.held_out_loss == pytest.approx(losses[best], rel=1e-4)


def test_rows_without_a_label_do_not_count() -> None:
    x, labels = clusters(60, seed=0)
    held, held_labels = clusters(40, seed=1)
    some = head.fit(x[:40], labels[:40], held_out=(held[:30], held_labels[:30]), outputs=3, bias=True)
    labels[40:], held_labels[30:] = -100, -100
    marked = head.fit(x, labels, held_out=(held, held_labels), outputs=3, bias=True)
    assert torch.equal(some.weight, marked.weight) and torch.equal(some.bias, marked.bias)


def test_a_feature_that_never_varies_does_no_harm() -> None:
    x, labels = clusters(60, seed=0)
    x[:, 2] = 7.0
    found = head.fit(x, labels, held_out=None, outputs=3, bias=True)
    assert torch.isfinite(found.weight).all() and torch.isfinite(found.bias).all()


def batches(padding_side: str) -> tuple[list[dict[str, Any]], list[str]]:
    tokenizer = word_tokenizer(padding_side)
    rows = toy_rows(11, seed=0)
    texts = [row["text"] for row in rows]
    result = []
    for start in range(0, 11, 4):
        part = dict(tokenizer(texts[start : start + 4], padding=True, return_tensors="pt"))
        result.append({**part, "labels": torch.tensor([row["label"] for row in rows[start : start + 4]])})
    return result, texts


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_of_a_decoder_are_its_last_real_tokens(side: str) -> None:
    model = tiny_llama()
    found = head.features(model, model.score, batches(side)[0])
    assert found.labels.tolist() == [row["label"] for row in toy_rows(11, seed=0)]
    with torch.no_grad():
        for text, feature in zip(batches(side)[1], found.x, strict=True):
            one = word_tokenizer()(text, return_tensors="pt")
            hidden = model.model(**one).last_hidden_state[0, -1]
            assert torch.allclose(feature, hidden, atol=1e-4)


def test_features_of_an_encoder_are_the_heads_input_without_dropout() -> None:
    model: PreTrainedModel = tiny_bert(classifier_dropout=0.5).train()
    found = head.features(model, model.classifier, batches("right")[0])
    assert model.training
    model.eval()
    with torch.no_grad():
        for text, feature in zip(batches("right")[1], found.x, strict=True):
            pooled = model.bert(**word_tokenizer()(text, return_tensors="pt")).pooler_output[0]
            assert torch.allclose(feature, pooled, atol=1e-5)


def test_an_installed_head_gives_the_logits_of_the_fit() -> None:
    model = tiny_bert(num_labels=3)
    x, labels = clusters(60, seed=0, d=32)
    fitted = head.fit(x, labels, held_out=None, outputs=3, bias=True)
    head.install(model.classifier, fitted)
    assert torch.allclose(model.classifier(x).double(), x.double() @ fitted.weight.T + fitted.bias, atol=1e-3)


# Other tasks


def test_several_labels_are_independent_logistic_regressions() -> None:
    x, labels = clusters(120, seed=0)
    targets = torch.stack([labels == 0, labels > 0, x[:, 0] > 3], 1).float()
    targets[5] = -100
    found = head.fit(x, targets, held_out=None, outputs=3, bias=True, task=MULTI_LABEL_CLASSIFICATION)
    keep = targets[:, 0] >= 0
    for i in range(3):
        # The loss of a row is the mean over three classes, so a class alone stands under thrice the penalty.
        weight, offset = scikit_learn(x[keep], targets[keep, i], 3 * found.penalty, True)
        assert np.allclose(found.weight[i].numpy(), weight[0], atol=1e-3)
        assert np.allclose(found.bias[i].numpy(), offset[0], atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_numbers_are_fitted_by_ridge_regression(bias: bool) -> None:
    x, _ = clusters(120, seed=0)
    y = 1000 + 50 * (x @ torch.randn(5, generator=torch.Generator().manual_seed(1)))
    y[7] = float("nan")
    found = head.fit(x, y, held_out=None, outputs=1, bias=bias, task=TEXT_REGRESSION)
    features, targets = x[~y.isnan()].double().numpy(), y[~y.isnan()].double().numpy()
    mean = features.mean(0) if bias else np.zeros(5)
    scale = np.sqrt(((features - mean) ** 2).mean(0))
    # scikit-learn: Σ error² + alpha ‖w‖²; here the mean of the errors² + penalty/2 ‖w‖².
    ridge = Ridge(alpha=len(targets) * found.penalty / 2, fit_intercept=bias).fit((features - mean) / scale, targets)
    assert np.allclose(found.weight[0].numpy(), ridge.coef_ / scale, rtol=1e-4)
    if bias:
        assert float(found.bias[0]) == pytest.approx(float(ridge.intercept_ - (ridge.coef_ / scale) @ mean), rel=1e-4)


def test_features_of_tokens_are_those_with_a_label() -> None:
    model = tiny_tagger().eval()
    rows = [dict(word_tokenizer()(row["text"])) for row in toy_rows(5, seed=0)]
    for row in rows:
        row["labels"] = [-100 if i % 3 == 0 else i % 5 for i in range(len(row["input_ids"]))]
    collate = DataCollatorForTokenClassification(word_tokenizer())
    found = head.features(model, model.classifier, [collate(rows[:3]), collate(rows[3:])])
    expected = [(i, label) for i, row in enumerate(rows) for label in row["labels"] if label != -100]
    assert list(zip(found.rows.tolist(), found.labels.tolist(), strict=True)) == expected
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    known = torch.tensor([label != -100 for row in rows for label in row["labels"]])
    assert torch.allclose(model.classifier(found.x), logits[known], atol=1e-5)
    fitted = head.fit(found.x, found.labels, held_out=None, outputs=5, bias=True, task=TOKEN_CLASSIFICATION)
    plain = head.fit(found.x, found.labels, held_out=None, outputs=5, bias=True)
    assert torch.equal(fitted.weight, plain.weight)


PULLING = [TEXT_CLASSIFICATION, TEXT_REGRESSION, MULTI_LABEL_CLASSIFICATION]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 1e-3])
@pytest.mark.parametrize("task", PULLING, ids=lambda task: str(task.problem_type))
def test_the_pull_of_items_on_others_is_autograds_through_the_fit(task: Task, penalty: float, bias: bool) -> None:
    x, labels = clusters(50, seed=0)
    other_x, other_labels = clusters(20, seed=1)
    outputs = {TEXT_CLASSIFICATION: 3, TEXT_REGRESSION: 1, MULTI_LABEL_CLASSIFICATION: 3}[task]
    if task is TEXT_REGRESSION:
        labels, other_labels = labels * 2.5 + 1, other_labels * 2.5 + 1
    elif task is MULTI_LABEL_CLASSIFICATION:
        labels, other_labels = ((one[:, None] >= torch.arange(3)).float() for one in (labels, other_labels))
    start = head.fit(x, labels, held_out=None, outputs=outputs, bias=bias, task=task)
    start = dataclasses.replace(start, penalty=penalty)
    found = head.pull(x, labels, head.refit(x, labels, start, task), (other_x, other_labels), task)

    wide = x.double().requires_grad_()
    weight, offset = newton(wide, labels, penalty, bias, task, outputs=outputs)
    loss = task.row_losses(other_x.double() @ weight.T + offset, other_labels).sum()
    (expected,) = torch.autograd.grad(loss, wide)
    assert found.dtype == torch.float32 and relative_difference(found, expected) < 1e-3


def test_items_without_a_label_do_not_pull_and_are_not_pulled_at() -> None:
    x, labels = clusters(50, seed=0)
    others = clusters(20, seed=1)
    whole = head.fit(x, labels, held_out=None, outputs=3, bias=True)
    fitted = head.refit(x[4:], labels[4:], whole)
    expected = head.pull(x[4:], labels[4:], fitted, (others[0][2:], others[1][2:]))
    labels[:4], others[1][:2] = -100, -100
    found = head.pull(x, labels, fitted, others)
    assert not found[:4].any() and relative_difference(found[4:], expected) < 1e-5
    assert not head.pull(x, labels, fitted, (others[0], torch.full_like(others[1], -100))).any()


def test_a_feature_that_is_constant_but_for_one_row_does_not_outweigh_the_others() -> None:
    x, labels = clusters(100, seed=0)
    other_x, other_labels = clusters(20, seed=1)
    plain = head.pull(x, labels, head.fit(x, labels, held_out=None, outputs=3, bias=True), (other_x, other_labels))
    x[:, 3] = other_x[:, 3] = 0.5
    other_x[7, 3] = 0.6
    found = head.pull(x, labels, head.fit(x, labels, held_out=None, outputs=3, bias=True), (other_x, other_labels))
    assert not found[:, 3].any()
    assert float(found.abs().max()) < 10 * float(plain.abs().max())


def test_a_token_at_the_padding_is_not_taken_for_the_rows_last_one() -> None:
    # In 16 bits what a decoder makes of a pad may be what it makes of the last token.
    x = torch.arange(24.0).view(2, 4, 3)
    output = torch.tensor([[[1.0], [2.0], [2.0], [2.0]], [[2.0], [3.0], [2.0], [5.0]]])
    logits = torch.tensor([[2.0], [2.0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert head.items_of(x, output, logits, mask).tolist() == [x[0, 1].tolist(), x[1, 2].tolist()]
    assert head.items_of(x, output, logits, None).tolist() == [x[0, 3].tolist(), x[1, 2].tolist()]
    # Two virtual tokens before the row's own.
    assert head.items_of(x, output, logits, mask[:, :2]).tolist() == [x[0, 3].tolist(), x[1, 2].tolist()]
