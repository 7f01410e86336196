"""The table of Trainer's arguments: whole, told alike in README, and followed by the config."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from onestep_peft import OneStepConfig, arguments
from tests import argument_values
from tests.conftest import config_for

TABLES = {name: getattr(arguments, name) for name in ("HONOURED", "IGNORED", "REFUSED", "HARMLESS")}
FIELDS = {f.name: f for f in dataclasses.fields(TrainingArguments)}
README = Path(__file__).parents[1] / "README.md"
# TrainingArguments itself refuses these where they are not set up.
NEED_MORE = ("deepspeed", "load_best_model_at_end")


def ours(said: list[warnings.WarningMessage]) -> list[str]:
    return [text for one in said if "one step has no use" in (text := str(one.message))]


def stock(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    later = {name: options.pop(name) for name in NEED_MORE if name in options}
    args = TrainingArguments(**{**quiet, **options})
    for name, value in later.items():
        setattr(args, name, value)
    return args


# The table


def test_every_field_of_the_installed_transformers_is_in_one_table() -> None:
    rows = [name for table in TABLES.values() for name in table]
    assert len(rows) == len(set(rows))
    unclassified = sorted(FIELDS.keys() - set(rows))
    assert not unclassified, f"Try these fields out, then name them in onestep_peft/arguments.py: {unclassified}"
    assert not set(rows) - FIELDS.keys(), "transformers has these no more"


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_tried_with_a_value_that_is_not_its_default(table: str, tmp_path: Path) -> None:
    values = getattr(argument_values, table)
    assert values.keys() == TABLES[table].keys()
    same_by_force = {"output_dir", "use_cpu", "report_to", "dataloader_pin_memory"}  # tests have no network and no GPU
    for name in values.keys() - same_by_force:
        assert values[name][name] != getattr(config_for(tmp_path), name), name


def test_a_field_that_no_table_names_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arguments, "IGNORED", {})
    monkeypatch.setattr(arguments, "REFUSED", {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = config_for(tmp_path, weight_decay=0.1, neftune_noise_alpha=5.0)
    assert not ours(said) and (config.weight_decay, config.neftune_noise_alpha) == (0.1, 5.0)


def test_a_field_that_transformers_does_not_have_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(arguments.IGNORED, "gone", "it went")
    monkeypatch.setitem(arguments.REFUSED, "gone_too", "it went")
    config_for(tmp_path)


def test_readme_has_the_table() -> None:
    expected = arguments.table()
    assert expected in README.read_text(encoding="utf-8"), f"README's table should be:\n\n{expected}\n"
    assert expected.count("\n| honoured ") + expected.count("\n| harmless ") >= 15
    assert all(f"`{name}`" in expected for name in FIELDS)


# Ignored


@pytest.mark.parametrize("name", arguments.IGNORED)
@pytest.mark.parametrize("way", ["own", "plain"])
def test_an_ignored_field_gets_its_default_back_with_one_warning(name: str, way: str, tmp_path: Path) -> None:
    options = argument_values.IGNORED[name]
    plain = stock(tmp_path, **options) if way == "plain" else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = OneStepConfig.upcast(plain) if plain is not None else config_for(tmp_path, **options)
    (text,) = ours(said)
    assert f"`{name}=" in text and arguments.IGNORED[name] in text
    default = config_for(tmp_path) if plain is None else OneStepConfig.upcast(stock(tmp_path))
    assert config.to_dict() == default.to_dict()


def test_all_ignored_fields_together_are_one_warning_that_points_to_the_caller(tmp_path: Path) -> None:
    options = {key: value for one in argument_values.IGNORED.values() for key, value in one.items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        OneStepConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    (text,) = ours(said)
    assert all(f"`{name}=" in text for name in arguments.IGNORED)
    (warning,) = [one for one in said if "one step has no use" in str(one.message)]
    assert warning.filename == __file__


# Refused


@pytest.mark.parametrize("name", arguments.REFUSED)
@pytest.mark.parametrize("way", ["own", "plain"])
def test_a_refused_field_is_named_with_its_value_the_reason_and_the_fix(name: str, way: str, tmp_path: Path) -> None:
    options = argument_values.REFUSED[name]
    plain = stock(tmp_path, **options) if way == "plain" else None
    with pytest.raises(ValueError, match=r"does not go with a single step") as refused:
        OneStepConfig.upcast(plain) if plain is not None else config_for(tmp_path, **options)
    text = str(refused.value)
    assert any(f"`{key}=" in text and arguments.REFUSED[key] in text for key in _same_wish(name))
    assert "Use `" in text or "Leave " in text or "give `" in text


def _same_wish(name: str) -> list[str]:
    """TrainingArguments sets `torch_compile` itself where its mode is given."""
    return [key for key, why in arguments.REFUSED.items() if why == arguments.REFUSED[name]]


@pytest.mark.parametrize("key", ["split_batches", "dispatch_batches", "even_batches"])
@pytest.mark.parametrize("source", ["dict", "file"])
def test_the_batches_of_several_processes_are_the_steps_own(key: str, source: str, tmp_path: Path) -> None:
    value = "false" if key == "even_batches" else "true"
    given: Any = {key: value == "true"}
    if source == "file":
        given = tmp_path / "accelerator.json"
        given.write_text(f'{{"{key}": {value}}}')
    with pytest.raises(ValueError, match=rf"`accelerator_config=.*{key}={value.title()}.*Leave out"):
        config_for(tmp_path, accelerator_config=given if source == "dict" else str(given))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED='true': DeepSpeed replaces"),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP='true': a direction needs whole layers"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a direction needs whole layers"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "ACCELERATE_DYNAMO_BACKEND='INDUCTOR': the compiled pass"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision 'fp16': its loss scaler"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision 'fp8'"),
    ],
)
def test_what_accelerate_launch_asks_for_is_refused_too(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"`accelerate launch` says .*{message}"):
        config_for(tmp_path)


def test_a_plain_accelerate_launch_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in arguments.LAUNCHED:
        monkeypatch.setenv(variable, "NO" if "DYNAMO" in variable else "false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert config_for(tmp_path).mixed_precision == "bf16"


# Plain TrainingArguments


# A backend needs processes: see test_argument_steps.
@pytest.mark.parametrize("name", [*arguments.HONOURED, *sorted(arguments.HARMLESS.keys() - {"ddp_backend"})])
def test_an_upcast_keeps_what_counts_and_says_nothing(name: str, tmp_path: Path) -> None:
    table = argument_values.HONOURED if name in arguments.HONOURED else argument_values.HARMLESS
    plain = stock(tmp_path, **table[name])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = OneStepConfig.upcast(plain)
    assert not ours(said)
    assert getattr(config, name) == getattr(plain, name)


def test_evaluation_in_plain_arguments_is_not_at_a_step_that_never_comes(tmp_path: Path) -> None:
    # TrainingArguments fills `eval_steps` from its own `logging_steps`, which is 500.
    config = OneStepConfig.upcast(stock(tmp_path, eval_strategy="steps"))
    assert (config.eval_steps, config.logging_steps) == (1, 1)
    kept = OneStepConfig.upcast(stock(tmp_path, eval_strategy="steps", eval_steps=3, max_steps=6))
    assert kept.eval_steps == 3
