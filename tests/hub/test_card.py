"""The card: what it says, that it comes from the report alone, and that the Hub takes it."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from onestep_peft import StepReport
from onestep_peft.hub.card import card, markdown_table
from tests.hub_server.card import card_tags, validate_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def report(**changes: Any) -> StepReport:
    step = {
        "direction": "kfac_muon", "step_size": 0.25, "loss_before": 0.69, "loss_after": 0.31, "accepted": True,
        "reason": "accepted (99 % of resampled row sets gain)", "energy_lost": 0.021, "head_refitted": False,
        "candidates": [{"direction": "kfac_muon", "points": [[0.0, 0.69], [0.25, 0.31]]}],
    }  # fmt: skip
    fields = {
        "base_model": "user/base", "base_revision": COMMIT, "labels": ["ant", "bee"],
        "rows": {"gradient": 160, "search": 60, "guard": 60}, "seconds": {"total": 1.5, "pass": 0.5, "evaluation": 9.0},
        "peak_memory_bytes": 300 * 2**20, "steps": [step], "files": {"tokenizer_config.json": "0" * 64},
        "metrics": {"base": {"loss": 0.7, "accuracy": 0.5}, "head": None, "after": {"loss": 0.3, "accuracy": 0.875}},
        "datasets": {"train": ["user/rows"], "evaluation": ["user/rows"]},
    }  # fmt: skip
    return StepReport(**{**fields, **changes})


def test_the_metadata_is_what_the_hub_searches() -> None:
    text = card(report(), "user/adapter")
    assert validate_card(text, "model") == ([], [])
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("user/base", "peft", "text-classification")
    assert data.tags == ["onestep_peft", "lora"] and data.datasets == ["user/rows"]
    scores = {one.metric_type: (one.metric_value, one.dataset_type) for one in data.eval_results or []}
    assert scores == {"loss": (0.3, "user/rows"), "accuracy": (0.875, "user/rows")}
    assert "base_model:adapter:user/base" in card_tags(data.to_dict())


def test_it_says_what_the_step_did() -> None:
    text = card(report(), "user/adapter")
    for said in (
        COMMIT, "`ant`, `bee`", "| 1 | kfac_muon | 0.25 | 0.6900 | 0.3100 | 2.1 % | accepted (99 %",
        "160 for the gradient, 60 held out to choose by, 60 for the guard", "1.5 s (pass 0.5)", "300 MiB",
        "| base | 0.7000 | 0.5000 |", "| after | 0.3000 | 0.8750 |", "![Held-out loss against step size](search.png)",
        'load("user/adapter")', "num_labels=2", "## Limits", "train rows from [`user/rows`]",
    ):  # fmt: skip
        assert said in text, said
    assert "None" not in text and "nan" not in text


def test_scores_of_held_out_rows_are_told_as_such() -> None:
    text = card(report(), "user/adapter")
    assert "took no part in the choice" in text and "held-out rows, which" not in text
    held = {"scored_on": "held-out rows", "datasets": {"train": ["user/rows"]}}
    text = card(report(**held), "user/adapter")
    assert "took no part in the choice" not in text and "which also chose the step" in text
    assert {one.dataset_name for one in ModelCard(text).data.eval_results or []} == {"held-out rows"}
    assert "fitted to them after that" not in text
    taught = {**report().steps[0], "last_fit": {"rows": 60, "loss": 0.4}}
    text = card(report(**held, steps=[taught]), "user/adapter")
    assert "the head was fitted to them after that" in text and "fitted to the held-out rows, too" in text


def test_from_where_on_it_says_yes_is_told() -> None:
    assert "says yes" not in card(report(), "user/adapter")
    tuned = {"threshold": {"metric": "f1", "value": 0.2, "expected": 0.4}}
    text = card(report(**tuned), "user/adapter")
    assert "says yes from a probability of 0.2 on (0.40 is to be expected)" in text and "its threshold" not in text
    text = card(report(**tuned, scored_on="held-out rows"), "user/adapter")
    assert "these scores are from before the head got its threshold" in text


def test_it_comes_from_the_json_alone() -> None:
    assert card(StepReport.from_json(report().to_json()), "user/adapter") == card(report(), "user/adapter")


def test_a_refused_step_is_told_as_such() -> None:
    (step,) = report().steps
    text = card(report(steps=[{**step, "accepted": False, "reason": "refused: held-out rows lose"}]), "user/adapter")
    assert "| refused: held-out rows lose; the parameters are as before the step |" in text
    text = card(report(steps=[{**step, "head_refitted": True}]), "user/adapter")
    assert "gain); the head was fitted again after it |" in text


def test_scores_on_rows_of_ones_own_are_not_told_as_those_of_the_training_set() -> None:
    text = card(report(datasets={"train": ["user/rows"]}), "user/adapter")
    (result, _) = ModelCard(text).data.eval_results or []
    assert (result.dataset_type, result.dataset_name) == ("unknown", "evaluation rows")
    assert validate_card(text, "model") == ([], [])


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": "../base", "base_revision": None},  # a folder: the Hub refuses a card that names it
        {"metrics": {"base": None, "head": None, "after": None}, "datasets": {}},
        {"metrics": {"base": {"loss": None}, "head": None, "after": {"loss": float("nan"), "f1": 0.5}}},
        {"steps": [], "rows": {}, "seconds": {}, "labels": []},
        {"labels": ["a|b", "`x`\n# Title", "---", *map(str, range(100))]},
    ],
)
def test_cards_with_gaps_pass_too(changes: dict[str, Any]) -> None:
    text = card(report(**changes), "user/adapter")
    assert validate_card(text, "model") == ([], [])
    assert "../base" not in text and "\n# Title" not in text and "None" not in text
    card(report(**changes))


def test_the_table_is_markdown() -> None:
    scores = {"base": {"loss": 1.0}, "head": {"loss": 0.5, "f1": 0.25}, "after": {"f1": 1.0}}
    assert markdown_table(report(metrics=scores)).splitlines() == [
        "| | loss | f1 |",
        "|---|---:|---:|",
        "| base | 1.0000 | – |",
        "| head | 0.5000 | 0.2500 |",
        "| after | – | 1.0000 |",
    ]
