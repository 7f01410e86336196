"""The head's last fit, to the held-out rows, too: against scikit-learn, fold by fold, and in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from onestep_peft import OneStepTrainer, head, last_fit
from onestep_peft.head import Features, HeadFit
from onestep_peft.held_out import by_content, listed, select
from onestep_peft.last_fit import Known
from onestep_peft.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION, TOKEN_CLASSIFICATION
from tests.conftest import (
    assert_same_bits,
    bits,
    config_for,
    relative_difference,
    tiny_bert,
    toy_rows,
    trainer_for,
    word_tokenizer,
)
from tests.tasks.small import tagged_rows, tiny_tagger
from tests.test_head import clusters, scikit_learn

PENALTY = 0.05


def features_of(x: Tensor, labels: Tensor) -> Features:
    return Features(x, labels, torch.arange(len(x)))


def small_set() -> tuple[Features, Features, HeadFit]:
    """Few rows of the pass, rows held out, and a head that knows as many others."""
    own, held, others = (clusters(rows, seed) for rows, seed in ((30, 0), (60, 1), (60, 2)))
    weight, bias = (torch.tensor(part.tolist()) for part in scikit_learn(*others, 0.1, True))
    return features_of(*own), features_of(*held), HeadFit(weight, bias, PENALTY, None)


def by_scikit_learn(own: Features, held: Features, which: Tensor) -> HeadFit:
    x, labels = torch.cat([own.x, held.x[which]]), torch.cat([own.labels, held.labels[which]])
    weight, bias = (torch.tensor(part.tolist(), dtype=torch.float64) for part in scikit_learn(x, labels, PENALTY, True))
    return HeadFit(weight, bias, PENALTY, None)


def loss_on_the_way(since: HeadFit, to: HeadFit, share: float, x: Tensor, labels: Tensor) -> float:
    """Summed."""
    assert since.bias is not None and to.bias is not None
    weight = torch.lerp(since.weight.double(), to.weight.double(), share)
    bias = torch.lerp(since.bias.double(), to.bias.double(), share)
    return float(nn.functional.cross_entropy(x.double() @ weight.T + bias, labels, reduction="sum"))


def share_of(found: HeadFit, since: HeadFit, to: HeadFit) -> float:
    """How far a head is on the way, and a check that it is on it."""
    way, gone = (one.weight.double() - since.weight.double() for one in (to, found))
    share = float((way * gone).sum() / way.square().sum())
    assert relative_difference(gone, share * way) < 5e-3
    return share


def test_it_goes_as_far_to_the_head_of_all_rows_as_folds_gain_that_are_left_out() -> None:
    own, held, since = small_set()
    folds = torch.arange(60) % 4
    fitted = last_fit.fit(Known(own, held, since), folds, TEXT_CLASSIFICATION)
    assert fitted is not None
    found, loss = fitted.head, fitted.loss
    left_out = [by_scikit_learn(own, held, folds != fold) for fold in range(4)]

    def mean(share: float) -> float:
        parts = [(one, folds == fold) for fold, one in enumerate(left_out)]
        return sum(loss_on_the_way(since, to, share, held.x[own], held.labels[own]) for to, own in parts) / 60

    best = minimize_scalar(mean, bounds=(0, 1), method="bounded")
    share = share_of(found, since, by_scikit_learn(own, held, folds >= 0))
    assert 0.1 < best.x < 0.95 and abs(share - best.x) < 0.03
    assert loss == pytest.approx(best.fun, rel=2e-3) and loss < mean(0)
    by_fold = nn.functional.cross_entropy(fitted.logits, held.labels)
    assert float(by_fold) == pytest.approx(loss, rel=1e-9), "each row's logits are those of the head of its fold"
    # Rows that the head knows would say more.
    whole = by_scikit_learn(own, held, folds >= 0)
    assert loss_on_the_way(since, whole, share, held.x, held.labels) / 60 < loss - 1e-3


def test_where_left_out_rows_lose_by_it_the_head_stays() -> None:
    own, held, _ = small_set()
    since = by_scikit_learn(own, held, torch.arange(60) >= 0)
    wrong = Features(own.x, (own.labels + 1) % 3, own.rows)
    assert last_fit.fit(Known(wrong, held, since), torch.arange(60) % 5, TEXT_CLASSIFICATION) is None


def test_items_of_one_row_are_left_out_together_and_those_without_a_label_say_nothing() -> None:
    own, held, since = small_set()
    # Twenty rows of three tokens; their folds are told by row.
    tokens = Features(held.x, held.labels, torch.arange(60) // 3)
    folds = torch.arange(20) % 2
    nothing = Features(torch.full((7, 5), 9.0), torch.full((7,), -100), torch.arange(7))
    with_it = Features.joined([tokens, nothing])
    found = last_fit.fit(Known(own, with_it, since), folds, TOKEN_CLASSIFICATION)
    by_token = last_fit.fit(
        Known(own, features_of(held.x, held.labels), since), folds.repeat_interleave(3), TEXT_CLASSIFICATION
    )
    assert found is not None and by_token is not None and found.loss == pytest.approx(by_token.loss, rel=1e-9)
    assert torch.allclose(found.head.weight, by_token.head.weight)
    assert torch.allclose(found.logits[:60], by_token.logits)


def test_numbers_go_to_the_closed_form() -> None:
    draw = torch.Generator().manual_seed(0)
    x, slope = torch.randn(80, 4, generator=draw, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    y = (x @ slope + 0.3 * torch.randn(80, generator=draw, dtype=torch.float64))[:, None]
    own, held = (features_of(x[some], y[some]) for some in (slice(0, 50), slice(50, 80)))
    since = HeadFit(torch.zeros(1, 4), torch.zeros(1), 1e-6, None)
    fitted = last_fit.fit(Known(own, held, since), torch.arange(30) % 5, TEXT_REGRESSION)
    assert fitted is not None
    found = fitted.head
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(80, 1).double()], 1), y).solution[:, 0]
    assert torch.allclose(found.weight[0], exact[:4], atol=1e-3) and float(found.bias) == pytest.approx(
        float(exact[4]), abs=1e-3
    )


# In a run


def run(folder: Path, **options: Any) -> OneStepTrainer:
    torch.manual_seed(0)
    options = {"search_dataset": toy_rows(60, seed=3), "eval_dataset": toy_rows(40, seed=5), **options}
    trainer = trainer_for(folder, toy_rows(60, seed=1), **options)
    trainer.train()
    return trainer


def head_of(trainer: OneStepTrainer) -> HeadFit:
    return head.current(trainer.head_layer())


def features(trainer: OneStepTrainer, rows: Any) -> Features:
    return head.features(trainer.bare_model, trainer.head_layer(), trainer.get_test_dataloader(rows))


def test_the_saved_head_is_on_the_way_to_the_fit_to_all_rows(tmp_path: Path) -> None:
    before: list[HeadFit] = []
    original, plain = last_fit.fit, run(tmp_path / "plain", refit_on_held_out=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_fit, "fit", lambda known, *rest: (before.append(known.since), original(known, *rest))[1])
        trainer = run(tmp_path / "all")
    (step,), (other) = trainer.report.steps, plain.report.steps[0]
    assert step["accepted"] and other["last_fit"] is None and step["last_fit"]["rows"] == 60
    assert {**step, "last_fit": None} == other, "all that was chosen and judged is what it is without"
    assert_same_bits(plain.bare_model, bits(trainer.bare_model), only=lambda name: "classifier" not in name)
    own, held = (features(trainer, rows) for rows in (trainer.train_dataset, trainer.held_rows))
    # Two classes: only the difference of their weights is free; scikit-learn has one row for them, penalised once.
    penalty = before[0].penalty / 2
    weight, _ = scikit_learn(torch.cat([own.x, held.x]), torch.cat([own.labels, held.labels]), penalty, True)
    found, since = (one.weight[1] - one.weight[0] for one in (head_of(trainer), before[0]))
    way, gone = torch.tensor(weight[0]) - since.double(), found.double() - since.double()
    share = float((way * gone).sum() / way.square().sum())
    assert 0.05 < share <= 1.001 and relative_difference(gone, share * way) < 0.02


def known_in(folder: Path, **options: Any) -> tuple[OneStepTrainer, Known]:
    """A run, and what its last fit went by."""
    seen: list[Known] = []
    original = last_fit.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_fit, "fit", lambda known, *rest: (seen.append(known), original(known, *rest))[1])
        trainer = run(folder, **options)
    (known,) = seen
    return trainer, known


def test_every_held_out_row_is_known_by_its_own_features(tmp_path: Path) -> None:
    # Of different lengths, so that batches are in another order than contents; the last batch is not full.
    search = toy_rows(45, seed=3)
    for i, row in enumerate(search):
        row["text"] = " ".join([row["text"]] * (1 + i % 4))
    trainer, known = known_in(tmp_path, search_dataset=search, per_device_eval_batch_size=8)
    rows = listed(trainer.held_rows)
    content = [rows[i] for i in by_content(rows)]
    assert sorted(known.held.rows.tolist()) == list(range(45))
    alone = torch.cat([features(trainer, select(trainer.held_rows, [i])).x for i in by_content(rows)])
    assert torch.allclose(known.held.x, alone[known.held.rows], atol=1e-5)
    assert known.held.labels.tolist() == [content[i]["labels"] for i in known.held.rows.tolist()]


@pytest.mark.parametrize("how", ["raw", "tokenised, padded, with a column more"])
def test_rows_that_are_evaluated_do_not_teach_the_head(how: str, tmp_path: Path) -> None:
    search = toy_rows(60, seed=3)
    evaluated: Any = search[:20]
    if how != "raw":
        tokenizer = word_tokenizer()
        evaluated = [
            {**tokenizer(row["text"], padding="max_length", max_length=40), "labels": 1 - row["label"], "number": i}
            for i, row in enumerate(evaluated)
        ]
    sets = {"a": evaluated, "b": toy_rows(40, seed=5)}
    some, known = known_in(tmp_path / "some", search_dataset=search, eval_dataset=sets)
    texts = {row["text"] for row in search[:20]}
    rows = sum(row["text"] not in texts for row in search)
    assert some.report.steps[0]["last_fit"]["rows"] == len(known.held.x) == rows <= 40
    there = features(some, [row for row in search if row["text"] in texts]).x
    assert not bool((known.held.x[:, None] - there).abs().amax(-1).lt(1e-5).any())
    none = run(tmp_path / "none", search_dataset=search, eval_dataset=search)
    assert none.report.steps[0]["accepted"] and none.report.steps[0]["last_fit"] is None
    plain = run(tmp_path / "plain", search_dataset=search, eval_dataset=search, refit_on_held_out=False)
    assert torch.equal(head_of(none).weight, head_of(plain).weight)


def test_without_an_evaluation_set_the_held_out_rows_are_scored_before(tmp_path: Path) -> None:
    trainer = run(tmp_path / "all", eval_dataset=None)
    plain = run(tmp_path / "plain", eval_dataset=None, refit_on_held_out=False)
    assert trainer.report.steps[0]["last_fit"] and trainer.report.scored_on == "held-out rows"
    assert trainer.report.metrics["after"] == plain.report.metrics["after"]
    assert trainer.report.metrics["after"]["loss"] == pytest.approx(trainer.report.steps[0]["loss_after"], rel=1e-5)
    assert not torch.equal(head_of(trainer).weight, head_of(plain).weight)


def test_a_refused_step_leaves_the_head_as_it_was(tmp_path: Path) -> None:
    random_labels = [{**row, "label": i % 2} for i, row in enumerate(toy_rows(60, seed=3))]
    trainer = run(tmp_path, search_dataset=random_labels, step_size=30.0, direction="kfac")
    plain = run(tmp_path, search_dataset=random_labels, step_size=30.0, direction="kfac", refit_on_held_out=False)
    assert not trainer.report.steps[0]["accepted"] and trainer.report.steps[0]["last_fit"] is None
    assert_same_bits(trainer.bare_model, bits(plain.bare_model))


def test_of_several_steps_the_last_that_was_accepted_is_followed_by_it(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=4)
    accepted = [step["accepted"] for step in trainer.report.steps]
    told = [step["last_fit"] is not None for step in trainer.report.steps]
    assert sum(told) == 1 and told[len(accepted) - 1 - accepted[::-1].index(True)]


def test_more_steps_after_it_begin_with_a_head_that_does_not_know_the_held_out_rows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "body_folds": 1}
    first = run(tmp_path / "first", **options)
    assert first.report.steps[0]["last_fit"]
    again = resumed(tmp_path, max_steps=2, **options)
    assert again.report.steps[-1]["loss_before"] == pytest.approx(first.report.steps[0]["loss_after"], rel=1e-5)


def resumed(folder: Path, **options: Any) -> OneStepTrainer:
    """From the checkpoint after the first step of the run in `first`."""
    torch.manual_seed(0)
    options = {"search_dataset": toy_rows(60, seed=3), **options}
    again = trainer_for(folder / "again", toy_rows(60, seed=1), **options)
    again.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-1"))
    return again


def test_without_the_optimizers_state_more_steps_begin_with_a_head_of_the_rows_of_the_pass(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 1, "body_folds": 1, "save_only_model": True,
    }  # fmt: skip
    first = run(tmp_path / "first", **options)
    own, held = (features(first, rows) for rows in (first.train_dataset, first.held_rows))
    fitted = head.fit(own.x, own.labels, held_out=(held.x, held.labels), outputs=2, bias=True)
    again = resumed(tmp_path, max_steps=2, **options)
    assert again.report.steps[-1]["loss_before"] == pytest.approx(fitted.held_out_loss, rel=1e-4)


def test_a_finished_run_that_is_taken_up_again_keeps_its_head_and_does_not_score_what_it_knows(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    first = run(tmp_path / "first", **options)
    again = resumed(tmp_path, **options)
    assert torch.equal(head_of(again).weight, head_of(first).weight)
    assert again.report.metrics["after"] is None
    third = resumed(tmp_path, eval_dataset=toy_rows(40, seed=5), **options)
    assert third.report.metrics["after"] == first.report.metrics["after"]


def test_where_memory_is_short_for_it_the_step_stands_with_the_head_that_was_chosen(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", refit_on_held_out=False)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="not fitted to the held-out rows"):

        def short(*_: Any) -> None:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

        patch.setattr(last_fit, "fit", short)
        trainer = run(tmp_path / "short", auto_find_batch_size=True)
    assert trainer.state.global_step == len(trainer.report.steps) == 1
    assert torch.equal(head_of(trainer).weight, head_of(plain).weight)


def test_a_frozen_head_can_be_fitted_and_saved(tmp_path: Path) -> None:
    model = tiny_bert()
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(False)
    trainer = run(tmp_path, model=model, method="full", save_strategy="steps", save_steps=1)
    assert trainer.report.steps[0]["last_fit"] and (tmp_path / "checkpoint-1" / "optimizer.pt").exists()


def test_tokens_of_held_out_rows_teach_a_tagger(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = OneStepTrainer(
        model=tiny_tagger(), args=config_for(tmp_path), train_dataset=tagged_rows(60, seed=1),
        search_dataset=tagged_rows(30, seed=2), eval_dataset=tagged_rows(30, seed=4),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    trainer.train()
    step = trainer.report.steps[-1]
    assert step["accepted"] and step["last_fit"]["rows"] == 30
    assert step["last_fit"]["loss"] < step["loss_before"]
