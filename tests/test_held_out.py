"""Losses of held-out rows that follow from what is known, against a forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from transformers import TrainerCallback

from onestep_peft import OneStepTrainer, head, held_out
from onestep_peft.held_out import HeldOut, listed, split_rows
from onestep_peft.tasks import (
    MULTI_LABEL_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    TEXT_REGRESSION,
    TOKEN_CLASSIFICATION,
    Task,
)
from tests.conftest import SPECIAL, config_for, tiny_bert, tiny_llama, toy_rows, trainer_for, word_tokenizer
from tests.tasks.small import tiny_tagger

ROWS = toy_rows(80, seed=2)


def forwards_of(model: nn.Module) -> list[int]:
    """A list that gets the number of rows of each forward of the model."""
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    return rows


def random_head(layer: nn.Linear) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()


def batches(labels: Any, *, pad: str = "right", sizes: tuple[int, ...] = (4, 4, 2)) -> list[dict[str, Tensor]]:
    """Batches of ten rows of words, each padded by itself."""
    tokenizer, texts, found, start = word_tokenizer(pad), [row["text"] for row in ROWS[:10]], [], 0
    for size in sizes:
        part = slice(start, start + size)
        found.append({**tokenizer(texts[part], padding=True, return_tensors="pt"), "labels": labels[part]})
        start += size
    return found


def token_batches() -> list[dict[str, Tensor]]:
    """Labels beside tokens, -100 on padding, on the first token of each row, and on all of one row."""
    found = batches(torch.zeros(10))
    draw = torch.Generator().manual_seed(0)
    for batch in found:
        labels = torch.randint(5, batch["input_ids"].shape, generator=draw)
        labels[batch["attention_mask"] == 0] = -100
        labels[:, 0] = -100
        batch["labels"] = labels
    found[0]["labels"][1] = -100
    return found


CLASSES = torch.tensor([0, 1, 1, 0, 1, 0, 0, -100, 1, 0])
CASES: dict[str, tuple[Task, Any, str, Any]] = {
    "classes": (TEXT_CLASSIFICATION, tiny_bert, "classifier", lambda: batches(CLASSES)),
    "decoder": (TEXT_CLASSIFICATION, tiny_llama, "score", lambda: batches(CLASSES, pad="left")),
    "decoder, padded on the right": (TEXT_CLASSIFICATION, tiny_llama, "score", lambda: batches(CLASSES)),
    "labels": (MULTI_LABEL_CLASSIFICATION, tiny_bert, "classifier", lambda: batches(torch.eye(2)[CLASSES % 2])),
    "numbers": (TEXT_REGRESSION, tiny_bert, "classifier", lambda: batches(torch.randn(10, 2))),
    "tokens": (TOKEN_CLASSIFICATION, tiny_tagger, "classifier", token_batches),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_losses_after_another_head_are_those_of_a_forward(case: str) -> None:
    task, make, name, rows = CASES[case]
    model, collated = make(), rows()
    layer = head.active(model, name)
    # The last batch is padded by a row that is not in the set; content order is not that of the batches.
    held_out = HeldOut(collated, [[3, 1, 7, 0], [2, 8, 4, 5], [6]], 9, task)
    calls = forwards_of(model)
    found = held_out.features(model, layer)
    assert calls == [4, 4, 2]
    assert torch.equal(found.x, head.features(model, layer, collated).x)
    before = held_out.losses(model)
    random_head(layer)
    held_out.settle(model, layer)
    calls.clear()
    after = held_out.losses(model)
    assert not calls
    fresh = HeldOut(collated, [[3, 1, 7, 0], [2, 8, 4, 5], [6]], 9, task).losses(model)
    assert calls == [4, 4, 2]
    assert not torch.allclose(before, after, rtol=1e-2)
    assert torch.allclose(after, fresh, rtol=1e-5, atol=1e-6)


def test_any_parameter_that_is_written_asks_for_a_forward() -> None:
    task, make, name, rows = CASES["classes"]
    model = make()
    held_out, layer, calls = HeldOut(rows(), [[3, 1, 7, 0], [2, 8, 4, 5], [6, 9]], 10, task), None, forwards_of(model)
    layer = head.active(model, name)
    known = held_out.losses(model)
    calls.clear()
    assert torch.equal(held_out.losses(model), known) and not calls
    for parameter in list(model.parameters())[-6:]:
        with torch.no_grad():
            parameter.mul_(1.5)
        moved = held_out.losses(model)
        assert calls == [4, 4, 2]
        assert not torch.equal(moved, known)
        calls.clear()
    # Features of a body that has moved say nothing of it.
    held_out.features(model, layer)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    held_out.settle(model, layer)
    calls.clear()
    held_out.losses(model)
    assert calls == [4, 4, 2]


def test_what_was_seen_at_the_best_parameters_is_known_when_they_come_back() -> None:
    task, make, name, rows = CASES["classes"]
    model = make()
    layer, calls = head.active(model, name), forwards_of(model)
    random_head(layer)
    held_out = HeldOut(rows(), [[3, 1, 7, 0], [2, 8, 4, 5], [6, 9]], 10, task)
    held_out.features(model, layer)
    held_out.settle(model, layer)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    draw = torch.Generator().manual_seed(0)
    moves = [[0.02 * torch.randn(one.shape, generator=draw) for one in start] for _ in range(5)]

    @torch.no_grad()
    def go(move: list[Tensor]) -> None:
        for parameter, was, there in zip(model.parameters(), start, move, strict=True):
            parameter.copy_(was + there)

    seen = []
    for move in moves:
        go(move)
        seen.append((float(held_out.losses(model).mean()), held_out.losses(model), move))
    best, worst = (choose(seen, key=lambda one: one[0]) for choose in (min, max))
    calls.clear()
    go(best[2])
    found = held_out.features(model, layer)
    assert not calls
    fresh = HeldOut(held_out.batches, [[3, 1, 7, 0], [2, 8, 4, 5], [6, 9]], 10, task)
    assert torch.equal(found.x, fresh.features(model, layer).x)
    calls.clear()
    assert torch.equal(held_out.losses(model), best[1]) and not calls
    # At other parameters, if only one number differs, a forward is asked for.
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert not torch.equal(held_out.losses(model), best[1]) and calls
    calls.clear()
    go(worst[2])
    held_out.features(model, layer)
    assert calls


class Cooled(nn.Module):
    """A model whose logits are not its last layer's outputs, though they look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_bert()
        random_head(self.inner.classifier)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(**inputs).logits / 2}


def test_losses_that_do_not_follow_from_the_features_are_taken_by_a_forward() -> None:
    model = Cooled()
    held_out = HeldOut(batches(CLASSES), [[3, 1, 7, 0], [2, 8, 4, 5], [6, 9]], 10, TEXT_CLASSIFICATION)
    held_out.features(model, model.inner.classifier)
    random_head(model.inner.classifier)
    held_out.settle(model, model.inner.classifier)
    fresh = HeldOut(held_out.batches, [[3, 1, 7, 0], [2, 8, 4, 5], [6, 9]], 10, TEXT_CLASSIFICATION)
    assert torch.equal(held_out.losses(model), fresh.losses(model))


def run(folder: Path, **options: Any) -> tuple[OneStepTrainer, int]:
    """A run in one batch of all rows each, and how often the held-out rows went forward."""
    trainer = trainer_for(
        folder, ROWS, search_dataset=toy_rows(31, seed=3), eval_dataset=toy_rows(10, seed=4),
        per_device_eval_batch_size=100, per_device_train_batch_size=100, **options,
    )  # fmt: skip
    calls = forwards_of(trainer.model)
    trainer.train()
    return trainer, calls.count(31)


def points(trainer: OneStepTrainer) -> int:
    """How many points the searches looked at, without those at zero."""
    return sum(len(c["points"]) - 1 for step in trainer.report.steps for c in step["candidates"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refit_on_held_out": False},
        {"peft_config": PromptTuningConfig(num_virtual_tokens=2), "method": "prompt_tuning"},
    ],
)
def test_held_out_rows_go_forward_once_before_the_search_and_not_after_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    trainer, forwards = run(tmp_path, **options)
    (step,) = trainer.report.steps
    assert step["accepted"] or "method" in options
    assert (step["last_fit"] is not None) == (step["accepted"] and "refit_on_held_out" not in options)
    assert forwards == 1 + points(trainer)
    # What is known at the end is what a forward finds.
    known = trainer.held_out_losses()
    trainer.held_out._known = None
    assert torch.allclose(trainer.held_out_losses(), known, rtol=1e-5, atol=1e-6)
    if step["head_refitted"] and not step["last_fit"]:
        assert float(known.mean()) == pytest.approx(step["loss_after"], rel=1e-5)


def test_the_head_goes_as_far_to_its_new_fit_as_helps_held_out_rows(tmp_path: Path) -> None:
    """Against a search of scipy's between the head as the search left it and a fit of its own to the moved features."""
    before: list[head.HeadFit] = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            before.append(head.current(trainer.head_layer()))

    torch.manual_seed(0)
    trainer = trainer_for(
        tmp_path, toy_rows(60, seed=1), search_dataset=toy_rows(60, seed=3), head_folds=1, refit_on_held_out=False,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    assert trainer.report.steps[0]["accepted"] and trainer.report.steps[0]["head_refitted"]
    layer = trainer.head_layer()
    train, held = (
        head.features(trainer.bare_model, layer, trainer.get_test_dataloader(rows))
        for rows in (trainer.train_dataset, trainer.held_rows)
    )
    fitted = head.fit(train.x, train.labels, held_out=(held.x, held.labels), outputs=2, bias=True)

    def loss(share: float) -> float:
        weight = torch.lerp(before[0].weight.double(), fitted.weight.double(), share)
        bias = torch.lerp(before[0].bias.double(), fitted.bias.double(), share)
        return float(nn.functional.cross_entropy(held.x.double() @ weight.T + bias, held.labels))

    best = minimize_scalar(loss, bounds=(0, 1), method="bounded")
    assert 0.1 < best.x < 0.9
    way = fitted.weight.double() - before[0].weight.double()
    share = float(((layer.weight.detach().double() - before[0].weight.double()) * way).sum() / way.square().sum())
    assert abs(share - best.x) < 0.03
    assert float(trainer.held_out_losses().mean()) == pytest.approx(best.fun, rel=1e-3)


def test_a_head_that_is_not_fitted_costs_one_check(tmp_path: Path) -> None:
    trainer, forwards = run(tmp_path, fit_head=False)
    assert forwards == 1 + points(trainer)


@pytest.mark.parametrize("where", ["search_dataset", "train_dataset"])
def test_a_decoders_row_that_is_not_finite_is_named(where: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), word_tokenizer("left")
    with torch.no_grad():
        model.model.embed_tokens.weight[len(SPECIAL) + 50] = float("nan")
    clean = [{**row, "text": row["text"].replace("w50", "w51")} for row in ROWS]
    sets = {"search_dataset": clean[:20], "train_dataset": clean}
    sets[where] = [*sets[where][:7], {**clean[7], "text": "w50 w20"}, *sets[where][8:]]
    trainer = trainer_for(
        tmp_path, sets["train_dataset"], search_dataset=sets["search_dataset"], model=model, processing_class=tokenizer
    )
    with pytest.raises(ValueError, match=f"The loss is nan for rows 7 of {where}"):
        trainer.train()


# How many tokens are looked at


def rows_of_tokens(number: int) -> list[dict[str, Any]]:
    """Rows of three to twelve tokens, all but the first of them learnt, each fourth row twice."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(number):
        ids = torch.randint(10, 60, (3 + i % 10,), generator=draw).tolist()
        rows += [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}] * (2 if i % 4 == 0 else 1)
    return rows


def learnt(rows: Any) -> list[int]:
    """Labelled tokens of each row, counted by hand: the first has nothing before it."""
    return [sum(label != -100 for label in row["labels"][1:]) for row in listed(rows)]


@pytest.mark.parametrize("own_set", [True, False])
def test_of_held_out_rows_as_many_are_looked_at_as_have_so_many_tokens(
    own_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "ENOUGH", 5)
    rows, most = rows_of_tokens(200), 150
    splits = []
    for order in (rows, rows[::-1]):
        config = config_for(Path("unused"), search_fraction=0.5, search_tokens_max=most)
        train = rows_of_tokens(3) if own_set else order
        splits.append(split_rows(train, order if own_set else None, config, TEXT_GENERATION))
        held, passed = splits[-1].held_rows, splits[-1].pass_rows
        # The last of them may come twice, and has at most eleven tokens.
        assert most <= sum(learnt(held)) < most + 2 * 11
        assert [listed(order if own_set else train)[i] for i in splits[-1].held_numbers] == listed(held)
        contents = [row["input_ids"] for row in listed(held)]
        assert all(contents.count(one) == [row["input_ids"] for row in rows].count(one) for one in contents)
        if not own_set:  # what is not looked at is learnt from
            assert sorted([*passed, *splits[-1].held_numbers]) == list(range(len(rows)))
    first, second = (sorted(row["input_ids"] for row in listed(split.held_rows)) for split in splits)
    assert first == second, "whatever the order"
    every = split_rows(rows_of_tokens(3), rows, config_for(Path("unused"), search_tokens_max=0), TEXT_GENERATION)
    assert len(every.held_rows) == len(rows)


def test_however_long_they_are_a_hundred_rows_that_differ_are_looked_at() -> None:
    rows, config = rows_of_tokens(300), config_for(Path("unused"), search_tokens_max=1)
    held = listed(split_rows(rows_of_tokens(3), rows, config, TEXT_GENERATION).held_rows)
    assert len({tuple(row["input_ids"]) for row in held}) == held_out.ENOUGH < len(held)
    classified = [{**row, "labels": 1} for row in rows]
    assert len(split_rows(classified, classified, config, TEXT_CLASSIFICATION).held_rows) == len(rows)
