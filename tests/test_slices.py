"""A walk through the rows in slices: which rows are where, and that each step is the one that its rows would make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import TrainerCallback

from onestep_peft import OneStepTrainer, head
from onestep_peft import slices as slices_module
from onestep_peft.held_out import by_content, listed
from onestep_peft.out_of_fold import fold_of_each
from onestep_peft.slices import (
    PartedRows,
    SlicedRows,
    dealt,
    number_of_shares,
    number_of_slices,
    of_small_steps,
    pace,
    rows_of_the_lead,
)
from onestep_peft.step import optimizer as optimizer_module
from onestep_peft.step import walk
from onestep_peft.step.guard import Verdict
from onestep_peft.step.walk import Walk
from onestep_peft.tasks import TEXT_CLASSIFICATION, TEXT_GENERATION, Task
from onestep_peft.tasks.task import UNLABELLED
from tests.conftest import (
    assert_same_bits,
    bits,
    config_for,
    relative_difference,
    same_bits,
    tiny_bert,
    tokenised,
    toy_rows,
    trainer_for,
    updates,
)

ROWS = toy_rows(70, seed=1)
FIXED: dict[str, Any] = {"direction": "kfac", "step_size": 5e-4, "guard": False, "head_folds": 1}


def sliced(rows: list[dict[str, Any]], slices: int = 3, batch_size: int = 8) -> SlicedRows:
    by_length = Dataset.from_list(sorted(listed(tokenised(rows)), key=lambda row: -len(row["input_ids"])))
    return SlicedRows(by_length, slices, batch_size)


def contents(rows: SlicedRows) -> list[list[tuple[int, ...]]]:
    """By slice, the token numbers of the rows that count."""
    found = []
    for rows.current in range(3):
        each = [rows[i] for i in range(len(rows))]
        found.append([tuple(row["input_ids"]) for row in each if row["labels"] != UNLABELLED])
    return found


def test_every_row_is_in_one_slice_whatever_the_order() -> None:
    found = contents(sliced(ROWS))
    assert sorted(len(part) for part in found) == [23, 23, 24]
    assert sorted(sum(found, [])) == sorted(tuple(row["input_ids"]) for row in tokenised(ROWS))
    assert [sorted(part) for part in contents(sliced(ROWS[::-1]))] == [sorted(part) for part in found]
    assert all([len(row) for row in part] == sorted((len(row) for row in part), reverse=True) for part in found)


def test_one_process_has_slices_as_they_are() -> None:
    rows = sliced(ROWS, batch_size=5)
    for rows.current, part in enumerate(contents(sliced(ROWS))):
        assert len(rows) == len(part) and all(rows[i]["labels"] != UNLABELLED for i in range(len(part)))


def test_slices_of_several_are_filled_up_with_rows_that_have_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_module.processes, "number", lambda: 5)
    rows = sliced(ROWS, batch_size=1)
    for rows.current, part in enumerate(contents(sliced(ROWS, batch_size=1))):
        assert len(rows) == 25
        assert [rows[i]["labels"] == UNLABELLED for i in range(25)] == [i >= len(part) for i in range(25)]
        assert rows.row(24) == rows.row(len(part) - 1)
        with pytest.raises(IndexError):
            rows[25]


def rows_by_slice(rows: list[dict[str, Any]], slices: int, first: int = 0) -> list[list[int]]:
    """Row numbers by slice: of all, or of a walk's behind the first so many in content order."""
    each = listed(tokenised(rows))
    lengths = None if first else [len(row["input_ids"]) for row in each]
    return dealt(by_content(each)[first:], slices, lengths)


@pytest.mark.parametrize(("number", "slices"), [(480, 10), (471, 10), (48, 1), (45, 9), (7, 7), (31, 16)])
def test_slices_are_as_large_as_each_other(number: int, slices: int) -> None:
    order = torch.randperm(number, generator=torch.Generator().manual_seed(4)).tolist()
    found = dealt(order, slices)
    assert sorted(sum(found, [])) == list(range(number)) and all(part == sorted(part) for part in found)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_slices_without_a_lead_have_long_rows_and_short_ones() -> None:
    lengths = torch.randint(4, 120, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(4)).tolist()
    pairs = dealt(order, 200, lengths)
    assert all(min(lengths[a], lengths[b]) <= sorted(lengths)[200] <= max(lengths[a], lengths[b]) for a, b in pairs)
    totals = [lengths[a] + lengths[b] for a, b in pairs]
    at_random = [lengths[a] + lengths[b] for a, b in dealt(order, 200)]
    assert max(totals) - min(totals) < (max(at_random) - min(at_random)) / 2


def test_equal_rows_go_to_different_slices_that_are_no_neighbours() -> None:
    found = dealt(range(160), 80)
    of_row = [next(place for place, part in enumerate(found) if row in part) for row in range(160)]
    apart = [abs(of_row[i] - of_row[i + 1]) for i in range(159)]
    assert min(apart) > 0 and sum(one == 1 for one in apart) < 10


def run(folder: Path, rows: list[dict[str, Any]], **options: Any) -> OneStepTrainer:
    torch.manual_seed(7)
    model = options.pop("model", None) or tiny_bert()
    trainer = trainer_for(
        folder, rows, model=model, **{"peft_config": LoraConfig(r=32, lora_alpha=32), **FIXED, **options}
    )
    trainer.train()
    return trainer


def test_each_step_is_the_one_that_a_run_on_its_rows_would_make(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", ROWS, slices=2, fit_head=False)
    assert len(whole.report.steps) == 2 and whole.report.rows["gradient"] == len(ROWS)
    of_first, of_second = rows_by_slice(ROWS, 2)
    first = run(tmp_path / "first", [ROWS[i] for i in of_first], fit_head=False)
    done = updates(first.model)
    # The second run begins where the first has ended.
    second = run(
        tmp_path / "second",
        [ROWS[i] for i in of_second],
        model=first.model.merge_and_unload(),
        fit_head=False,
    )
    for name, update in updates(whole.model).items():
        assert relative_difference(update, done[name] + updates(second.model)[name]) < 1e-3, name


@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 3}, {"rows": ROWS[::-1]}])
def test_neither_batches_nor_order_matter(change: dict[str, Any], tmp_path: Path) -> None:
    rows = change.pop("rows", ROWS)
    one = run(tmp_path / "one", ROWS, slices=3, head_folds=5)
    other = run(tmp_path / "other", rows, slices=3, head_folds=5, **change)
    for name, update in updates(one.model).items():
        assert relative_difference(updates(other.model)[name], update) < 1e-4, name


def test_the_first_slice_of_a_walk_is_the_longest() -> None:
    by_length = Dataset.from_list(sorted(listed(tokenised(ROWS)), key=lambda row: -len(row["input_ids"])))
    rows, lengths, seen = SlicedRows(by_length, 6, 4, lead=35), [], []
    for rows.current in range(6):
        each = [rows[i] for i in range(len(rows))]
        lengths.append((len(each), sum(row["labels"] != UNLABELLED for row in each)))
        seen += [tuple(row["input_ids"]) for row in each if row["labels"] != UNLABELLED]
    assert lengths == [(35, 35), *[(7, 7)] * 5]
    assert sorted(seen) == sorted(tuple(row["input_ids"]) for row in tokenised(ROWS))


@pytest.mark.parametrize(
    ("rows", "slices", "task", "outputs", "expected"),
    [
        (1_500, 31, TEXT_CLASSIFICATION, 2, 300), (3_000, 61, TEXT_CLASSIFICATION, 2, 600),
        (6_000, 101, TEXT_CLASSIFICATION, 2, 600), (60_000, 101, TEXT_CLASSIFICATION, 2, 600),
        (6_000, 101, TEXT_CLASSIFICATION, 75, 1_200), (60_000, 101, TEXT_CLASSIFICATION, 75, 16 * 75),
        (60_000, 101, TEXT_GENERATION, 2, 12_000), (6_000, 4, TEXT_CLASSIFICATION, 2, 1_500),
        (100, 99, TEXT_CLASSIFICATION, 2, 2), (100, 100, TEXT_CLASSIFICATION, 2, 1),
    ],
)  # fmt: skip
def test_the_first_slice_has_a_fifth_of_few_rows_and_600_of_many(
    rows: int, slices: int, task: Task, outputs: int, expected: int
) -> None:
    labelled = [{"labels": i % outputs} for i in range(rows)]
    assert rows_of_the_lead(labelled, slices, task, outputs) == expected


@pytest.mark.parametrize(("rare", "expected"), [(1_000, 600), (200, 1_600), (100, 3_200), (1, 4_000), (0, 600)])
def test_the_first_slice_has_16_rows_of_a_rare_class(rare: int, expected: int) -> None:
    labelled = [{"labels": int(i < rare)} for i in range(19_900)] + [{"labels": UNLABELLED}] * 100
    assert rows_of_the_lead(labelled, 101, TEXT_CLASSIFICATION, 2) == expected
    several = [{"labels": [0.0, 1.0]}] * 20_000  # several labels each: by the number of outputs alone
    assert rows_of_the_lead(several, 101, TEXT_CLASSIFICATION, 2) == 600


def test_a_run_goes_by_the_rows_of_its_first_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_module, "LEAD_MOST", 50)
    monkeypatch.setattr(slices_module, "LEAD_ROWS_BY_CLASS", 1)
    trainer = trainer_for(tmp_path, WALK_ROWS_HERE, search_dataset=toy_rows(100, 2), slices=11)
    trainer.train()
    assert trainer.lead_rows == len(trainer._sliced.lead) == 50
    settings = trainer.one_step.settings
    assert settings.slice_rows == 35 and settings.pace == pytest.approx(pace(35))
    assert trainer.plan().forwards["head"] == 50 + 400
    alone = trainer_for(tmp_path / "alone", WALK_ROWS_HERE, search_dataset=toy_rows(100, 2), slices=1)
    assert alone.lead_rows == 400 and alone.plan().forwards["head"] == 400 + 400


def test_tokens_are_too_many_for_chance() -> None:
    assert of_small_steps(400, 13, TEXT_CLASSIFICATION) == (pace(400 / 12), pytest.approx(400 / 12))
    assert of_small_steps(400, 13, TEXT_GENERATION) == (pace(400 / 12), float("inf"))
    assert of_small_steps(0, 1, TEXT_CLASSIFICATION) == (0, 0)


def test_the_pace_grows_with_the_root_of_a_slices_rows() -> None:
    assert pace(400 / 12) == pytest.approx(slices_module.PACE * (400 / 12) ** 0.5)
    assert pace(80) == pytest.approx(2 * pace(20)) and pace(10**9) == 1.0 and pace(0) == 0


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_every_slice_of_a_walk_has_a_row(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_module, "LEAD", share)
    lead = rows_of_the_lead(ROWS, len(ROWS), TEXT_GENERATION, 2)
    by_length = Dataset.from_list(sorted(listed(tokenised(ROWS)), key=lambda row: -len(row["input_ids"])))
    rows, counts = SlicedRows(by_length, len(ROWS), 1, lead=lead), []
    for rows.current in range(len(ROWS)):
        counts.append(len(rows))
    assert counts == [1] * len(ROWS)


WALK_ROWS_HERE = toy_rows(400, seed=1)


def walked(folder: Path, rows: list[dict[str, Any]] = WALK_ROWS_HERE, **options: Any) -> OneStepTrainer:
    torch.manual_seed(7)
    trainer = trainer_for(
        folder,
        rows,
        **{"model": tiny_bert(), "search_dataset": toy_rows(100, 2), "slices": 6, "fit_head": False, **options},
    )
    trainer.train()
    return trainer


def test_a_walk_searches_once_and_goes_on_from_there(tmp_path: Path) -> None:
    trainer = walked(tmp_path, guard=False)
    step, small = trainer.report.steps
    assert step["accepted"] and len(step["candidates"]) == 2 and step["share_moved"] > 0
    assert small["direction"] == "walk" and not small["candidates"] and small["accepted"]
    assert trainer.state.global_step == 6 and trainer.report.rows["gradient"] == 400
    assert trainer.one_step.settings.slice_rows == 64 and trainer.one_step.settings.pace == pytest.approx(0.4)
    assert step["loss_after"] == small["loss_before"] != small["loss_after"]
    assert "step 2: walk, step size" in trainer.report.summary()


def test_a_first_step_without_gain_ends_the_walk_and_nothing_has_moved(tmp_path: Path) -> None:
    held = [{**row, "label": 1 - row["label"]} for row in toy_rows(60, seed=3)]
    torch.manual_seed(7)
    trainer = trainer_for(tmp_path, ROWS, search_dataset=held, slices=3, fit_head=False)
    before = bits(trainer.model)
    trainer.train()
    assert [step["accepted"] for step in trainer.report.steps] == [False] and trainer.state.global_step == 1
    assert_same_bits(trainer.model, before)


class Gradients:
    """What small steps were made of: the model as it was, the gradient of one layer, and the slice's mean loss."""

    def __init__(self, trainer: OneStepTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[dict[str, torch.Tensor], torch.Tensor, float]] = []
        advance = Walk.advance

        def noting(walk: Walk, statistics: Any, gradients: Any, *, left: float, loss: float) -> None:
            name = next(name for name in statistics if "query" in name)
            state = {key: value.clone() for key, value in trainer.bare_model.state_dict().items()}
            self.seen.append((state, statistics[name].gradient.clone(), loss))
            advance(walk, statistics, gradients, left=left, loss=loss)

        monkeypatch.setattr(Walk, "advance", noting)


def test_each_small_step_has_the_gradient_of_its_slice_at_the_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one big batch in autograd, with the head that is there, not those of the folds."""
    torch.manual_seed(7)
    trainer = trainer_for(
        tmp_path, WALK_ROWS_HERE, model=tiny_bert(), method="full", search_dataset=toy_rows(100, 2), slices=6
    )
    noted = Gradients(trainer, monkeypatch)
    trainer.train()
    assert len(noted.seen) == 5
    model, parts = tiny_bert(), rows_by_slice(WALK_ROWS_HERE, 5, first=80)
    for part, (state, gradient, loss) in zip(parts, noted.seen, strict=True):
        model.load_state_dict(state)
        batch = trainer.data_collator([tokenised(WALK_ROWS_HERE)[i] for i in part])
        model.zero_grad()
        expected = model.eval()(**batch).loss
        expected.backward()
        layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
        assert relative_difference(gradient, layer.weight.grad) < 1e-4
        assert abs(loss - float(expected)) < 1e-5


class HeadBefore(TrainerCallback):
    """The head as it is when the first pass begins."""

    def __init__(self) -> None:
        self.weight = torch.zeros(0)

    def on_step_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        if not len(self.weight):
            (self.weight,) = (p.detach().clone() for n, p in model.named_parameters() if n == "classifier.weight")


def test_a_walk_begins_with_a_head_that_knows_its_first_slice_only(tmp_path: Path) -> None:
    """The same head as in a run on those rows alone."""
    order = by_content(listed(tokenised(WALK_ROWS_HERE)))
    heads = []
    for rows, slices in ((WALK_ROWS_HERE, 6), ([WALK_ROWS_HERE[i] for i in order[:80]], 1), (WALK_ROWS_HERE, 1)):
        watch = HeadBefore()
        options: dict[str, Any] = {"method": "full", "slices": slices, "fit_head": True, "callbacks": [watch]}
        walked(tmp_path / str(len(heads)), rows, **options)
        heads.append(watch.weight)
    assert relative_difference(heads[0], heads[1]) < 1e-4 < 1e-2 < relative_difference(heads[0], heads[2])


def test_a_refused_walk_has_the_head_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "judge", lambda *_, **__: Verdict(False, "refused: for the test", 0.0, 0.0))
    fitted, fit = [], head.fit

    def noting(x: torch.Tensor, *args: Any, **options: Any) -> head.HeadFit:
        fitted.append(len(x))
        return fit(x, *args, **options)

    monkeypatch.setattr(head, "fit", noting)
    trainer = walked(tmp_path, fit_head=True)
    (step,) = trainer.report.steps
    assert not step["accepted"] and step["head_refitted"] and fitted == [80, 400]
    assert float(trainer.held_out_losses().mean()) < step["loss_before"]


def test_what_comes_once_an_epoch_comes_once_a_walk(tmp_path: Path) -> None:
    trainer = walked(tmp_path, guard=False, save_strategy="epoch")
    assert trainer.state.global_step == 6 and trainer.state.epoch == 1
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 3}, {"rows": WALK_ROWS_HERE[::-1]}])
def test_neither_batches_nor_order_matter_to_a_walk(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half as fast: these few rows are soon known by heart, and then steps of a given length follow the rounding.
    monkeypatch.setattr(slices_module, "PACE", 0.025)
    one, other = walked(tmp_path / "one"), walked(tmp_path / "other", **change)
    for name, update in updates(one.model).items():
        assert relative_difference(updates(other.model)[name], update) < 2e-2, name


def test_a_walk_that_does_not_help_leaves_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a pace far too large the small steps are refused, and the model has the bits of the first one."""
    monkeypatch.setattr(slices_module, "PACE", -0.1)  # uphill
    monkeypatch.setattr(walk, "ASTRAY", float("inf"))
    started = []
    begin = Walk.begin

    def noting(self: Walk, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        started.append({name: value.clone() for name, value in self.tensors().items() if name.startswith("start/")})

    monkeypatch.setattr(Walk, "begin", noting)
    trainer = walked(tmp_path)
    assert [step["accepted"] for step in trainer.report.steps] == [True, False]
    for parameter, value in zip(trainer.trainable(), started[0].values(), strict=True):
        assert same_bits(parameter.detach(), value)


@pytest.mark.parametrize(("method", "direction"), [("prompt_tuning", "kfac"), ("full", "auto"), ("full", "sgd")])
def test_every_method_walks(method: str, direction: str, tmp_path: Path) -> None:
    fit_head: bool | str = "auto" if method == "prompt_tuning" else False
    options: dict[str, Any] = {"search_dataset": WALK_ROWS_HERE[:100], "guard": False, "fit_head": fit_head}
    trainer = walked(tmp_path, method=method, direction=direction, **options)
    step, small = trainer.report.steps
    assert small["direction"] == "walk" and small["step_size"] > 0
    assert step["loss_after"] == small["loss_before"] != small["loss_after"] < 1.1 * step["loss_before"]


@pytest.mark.parametrize(
    ("rows", "tokens_each", "options", "expected"),
    [
        (3, 20_000, {}, 1), (4, 20_000, {}, 4), (40, 20_000, {}, 33), (130, 20_000, {}, 101), (800, 100, {}, 22),
        (1_600, 100, {}, 43),
        (6, 20_000, {"slices": 2}, 2), (6, 20_000, {"slices": "2"}, 2), (6, 20_000, {"step_size": 0.1}, 1),
        (130, 20_000, {"max_steps": 2}, 101),
    ],
)  # fmt: skip
def test_auto_asks_how_many_tokens_a_language_model_learns(
    rows: int, tokens_each: int, options: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    tokens = [{"labels": [UNLABELLED] + [1] * tokens_each} for _ in range(rows)]
    found = number_of_slices(config_for(tmp_path, **options), tokens, TEXT_GENERATION, 0)
    assert found == expected
    if found > 2:  # chosen by auto: the first slice has its fifth
        assert rows_of_the_lead(tokens, found, TEXT_GENERATION, 2) == max(1, rows // 5)


@pytest.mark.parametrize(
    ("rows", "outputs", "max_steps", "expected"),
    [(1_499, 2, 1, 1), (1_500, 2, 1, 31), (1_500, 18, 1, 31), (1_500, 19, 1, 1), (6_160, 77, 1, 101), (1_500, 2, 2, 1)],
)
def test_auto_asks_how_many_rows_there_are_by_class(
    rows: int, outputs: int, max_steps: int, expected: int, tmp_path: Path
) -> None:
    config = config_for(tmp_path, max_steps=max_steps)
    assert number_of_slices(config, [{"labels": 0}] * rows, TEXT_CLASSIFICATION, outputs) == expected


def test_a_run_tells_its_slices(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, ROWS, slices=3, max_steps=2)
    assert (trainer.args.slices, trainer.args.max_steps) == (3, 6)
    assert "steps      at most 6: the rows are walked through in 3 slices" in trainer.plan().text()


def test_more_slices_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`slices=100`, but the pass has \d+ rows"):
        trainer_for(tmp_path, ROWS, slices=100)


# Shares: a sample of the rows gives the covariances


def shared_out(parts: int, shares: int, batch_size: int = 8) -> PartedRows:
    rows = sorted(listed(tokenised(ROWS)), key=lambda row: -len(row["input_ids"]))
    return PartedRows(Dataset.from_list(rows), parts, shares, batch_size)


@pytest.mark.parametrize(("parts", "shares"), [(1, 3), (2, 2), (2, 3), (3, 1)])
def test_a_share_of_each_part_comes_first_and_counts_for_covariances(parts: int, shares: int) -> None:
    rows = shared_out(parts, shares)
    places = [i for i in range(len(rows)) if rows[i]["labels"] != UNLABELLED]
    assert sorted(map(rows.row, places)) == list(range(len(ROWS)))
    whole = listed(rows._rows)
    folds = fold_of_each(whole, parts)
    assert all(rows.part(i)[0] == folds[rows.row(i)] for i in range(len(rows)))
    starts = range(0, len(rows), 8)
    sections = [rows.part(start) for start in starts]
    assert all({rows.part(i) for i in range(start, start + 8)} == {rows.part(start)} for start in starts)
    assert sections == sorted(sections, key=lambda section: (section[0], not section[1]))
    covered = [rows.row(i) for i in places if rows.part(i)[1]]
    assert abs(len(covered) - len(ROWS) / shares) < parts
    by_class = [sum(whole[row]["labels"] == label for row in covered) for label in (0, 1)]
    of_all = [sum(row["labels"] == label for row in whole) for label in (0, 1)]
    assert all(abs(some - every / shares) <= parts for some, every in zip(by_class, of_all, strict=True))


@pytest.mark.parametrize("rows", range(1_500, 20_000, 1_500))
def test_rows_of_every_fold_of_the_head_are_in_the_sample(rows: int, tmp_path: Path) -> None:
    shares = number_of_shares(config_for(tmp_path, slices=1), rows)
    assert rows // 1_500 - 1 <= shares <= rows // 1_500
    assert {i % 5 for i in range(0, rows, shares)} == set(range(5))


class AfterPass(TrainerCallback):
    """Keeps what a pass has left."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, torch.Tensor]] = {}

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        names = ("gradient", "input_covariance", "output_grad_covariance")
        statistics = getattr(optimizer, "optimizer", optimizer).statistics
        self.found = {
            layer: {name: getattr(record, name).clone() for name in names} for layer, record in statistics.items()
        }


def left_by_a_pass(folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, dict[str, torch.Tensor]]:
    watch = AfterPass()
    run(folder, rows, fit_head=False, callbacks=[watch], **options)
    return watch.found


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To rounding; the gradient of a key's bias is nothing else."""
    return float((one - other).norm()) < max(1e-4 * float(other.norm()), 1e-8)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_covariances_are_those_of_the_sample_and_the_gradient_that_of_all_rows(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if method == "lora" else {"method": "full", "peft_config": None}
    found = left_by_a_pass(tmp_path / "found", ROWS, covariance_rows=30, **options)
    every = left_by_a_pass(tmp_path / "every", ROWS, **options)
    folds = fold_of_each(listed(tokenised(ROWS)), 2)
    sample = [row for row, fold in zip(ROWS, folds.tolist(), strict=True) if fold == 0]
    some = left_by_a_pass(tmp_path / "some", sample, **options)
    whole = 0
    for layer, record in found.items():
        matrices = {name for name, one in record.items() if name != "gradient" and one.dim() == 2 and len(one) > 1}
        whole += len(matrices)
        for name, one in record.items():
            oracle = some if name in matrices else every
            assert alike(one, oracle[layer][name]), (layer, name)
            if name in matrices:
                assert relative_difference(one, every[layer][name]) > 1e-3
    assert whole >= 2 * 12
    finer = left_by_a_pass(tmp_path / "finer", ROWS, covariance_rows=30, per_device_train_batch_size=5, **options)
    for layer, record in found.items():
        assert all(alike(one, finer[layer][name]) for name, one in record.items())


def test_few_rows_all_count_and_a_bad_number_is_refused(tmp_path: Path) -> None:
    def trainer(**options: Any) -> OneStepTrainer:
        return trainer_for(tmp_path, ROWS, **{"search_dataset": ROWS[:20], "direction": "kfac", **options})

    assert trainer().shares == 1
    assert [trainer(covariance_rows=number).shares for number in (36, 35, 20, 7)] == [1, 2, 3, 9]
    assert trainer(covariance_rows=7, head_folds=1).shares == 10
    prompt = {"peft_config": PromptTuningConfig(num_virtual_tokens=2), "method": "prompt_tuning"}
    assert trainer(covariance_rows=7, **prompt).shares == 1
    assert trainer(covariance_rows=7, max_steps=2).shares == 4  # 35 rows a part, and 5 shares would be the 5 folds
    assert trainer(covariance_rows=7, direction="sgd").shares == 1
    assert trainer(covariance_rows=7, slices=2).shares == 1
    with pytest.raises(ValueError, match="covariance_rows"):
        trainer(covariance_rows=0)
