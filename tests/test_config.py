"""OneStepConfig: bad values are refused with the fix, stock fields are honoured, ignored with a warning, or refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from onestep_peft import OneStepConfig
from onestep_peft.config import AUTO
from tests.conftest import config_for


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("direction", "kfak", r"`direction='kfak'`.*Did you mean 'kfac'"),
        ("direction", ["kfac", "adam"], r"'adam'.*auto, sgd, sign"),
        ("direction", [], "one or more"),
        ("direction", ["kfac", "kfac"], "different names"),
        ("direction", ["auto", "kfac"], '"auto", or one or more'),
        ("step_size", "serach", r"`step_size='serach'`.*\"search\""),
        ("step_size", None, r"`step_size=None`.*\"search\""),
        ("step_size", 0.0, r"`step_size=0.0` must be above 0"),
        ("step_size", -0.1, r"`step_size=-0.1` must be above 0"),
        ("step_size", math.nan, r"`step_size=nan` must be above 0"),
        ("step_size", math.inf, r"`step_size=inf` must be above 0"),
        ("max_steps", 0, r"`max_steps=0`.*at least 1"),
        ("max_steps", -1, r"`max_steps=-1`.*at least 1"),
        ("damping", -0.1, r"`damping=-0.1` must be at least 0; the default is 0.1"),
        ("damping", math.nan, r"`damping=nan` must be"),
        ("damping", math.inf, r"`damping=inf` must be"),
        ("damping", "much", r"`damping='much'` must be"),
        ("rank", 0, r"`rank=0` must be at least 1; the default is 8"),
        ("rank", 2.5, r"`rank=2.5` must be"),
        ("fit_head", "perhaps", r"`fit_head='perhaps'`.*\"auto\", True or False"),
        ("head_folds", 0, r"`head_folds=0` must be at least 1; the default is 5"),
        ("head_folds", "x", r"`head_folds='x'` must be a whole number; the default is 5"),
        ("head_folds", 2.5, r"`head_folds=2.5` must be .*; the default is 5"),
        ("search_fraction", -0.1, r"`search_fraction=-0.1` must be between 0 and 0.9"),
        ("search_fraction", 1.0, r"`search_fraction=1.0` must be between 0 and 0.9"),
        ("search_rows_max", 0, r"`search_rows_max=0` must be at least 1; the default is 512"),
        ("search_rows_max", 10.5, r"`search_rows_max=10.5` must be"),
        ("search_tokens_max", -1, r"`search_tokens_max=-1` must be at least 0; the default is 10000"),
        ("guard_confidence", 0.4, r"`guard_confidence=0.4` must be between 0.5 and 1"),
        ("guard_confidence", 1.1, r"`guard_confidence=1.1` must be between 0.5 and 1"),
        ("fp16", True, r"`fp16=True`.*`bf16=True`"),
        ("deepspeed", "zero.json", r"`deepspeed='zero.json'`.*accelerate launch"),
        ("neftune_noise_alpha", 5.0, r"`neftune_noise_alpha=5.0`.*Leave it out"),
    ],
)
def test_a_bad_value_is_refused_with_the_fix(name: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config_for(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 3e-4),
        ("num_train_epochs", 5),
        ("gradient_accumulation_steps", 4),
        ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 10),
        ("weight_decay", 0.01),
        ("max_grad_norm", 1.0),
        ("optim", "sgd"),
        ("dataloader_drop_last", True),
    ],
)
def test_a_stock_field_without_a_use_is_ignored_with_one_warning(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="one step has no use") as said:
        config = config_for(tmp_path, **{name: value})
    ours = [warning for warning in said if "one step has no use" in str(warning.message)]
    assert len(ours) == 1
    assert f"`{name}={value!r}`" in str(ours[0].message)
    assert getattr(config, name) == getattr(config_for(tmp_path), name)


def test_several_ignored_fields_are_one_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as said:
        config_for(tmp_path, learning_rate=3e-4, weight_decay=0.1)
    (ours,) = [str(warning.message) for warning in said if "one step has no use" in str(warning.message)]
    assert "learning_rate" in ours and "weight_decay" in ours


def test_the_defaults_and_an_upcast_of_the_stock_defaults_do_not_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config_for(tmp_path)
        OneStepConfig.upcast(TrainingArguments(output_dir=str(tmp_path), report_to="none"))


def test_the_step_uses_none_of_the_ignored_fields(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    assert config.max_steps == 1
    assert config.max_grad_norm == 0.0
    assert config.weight_decay == 0.0
    assert config.warmup_steps == 0
    assert config.save_strategy == "no"


@pytest.mark.parametrize(
    ("given", "directions"),
    [
        ("auto", (AUTO,)),
        ("sgd", ("sgd",)),
        (["kfac", "sgd"], ("kfac", "sgd")),
        (["auto"], (AUTO,)),
    ],
)
def test_directions(given: Any, directions: tuple[str, ...], tmp_path: Path) -> None:
    assert config_for(tmp_path, direction=given).directions == directions


def test_values_from_a_shell_are_read(tmp_path: Path) -> None:
    config = config_for(tmp_path, step_size="0.1", fit_head="False")
    assert config.fixed_step_size == 0.1
    assert config.fit_head is False
    assert config_for(tmp_path).fixed_step_size is None


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"direction": "sgd", "step_size": 0.1}, True),
        ({"direction": "sgd"}, False),
        ({"direction": "kfac", "step_size": 0.1}, False),
    ],
)
def test_the_plain_step_is_sgd_at_a_fixed_step_size(options: dict[str, Any], plain: bool, tmp_path: Path) -> None:
    assert config_for(tmp_path, **options).is_plain is plain


def test_upcast_keeps_what_was_given_and_the_steps_own_defaults(tmp_path: Path) -> None:
    stock = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=5, seed=11, report_to="none", bf16=False, use_cpu=True,
        run_name="mine", gradient_checkpointing=True,
    )  # fmt: skip
    config = OneStepConfig.upcast(stock)
    assert isinstance(config, OneStepConfig)
    assert (config.output_dir, config.per_device_train_batch_size, config.seed) == (str(tmp_path), 5, 11)
    assert (config.run_name, config.gradient_checkpointing, config.use_cpu) == ("mine", True, True)
    # Left at the stock default, so the step's own holds.
    assert (config.max_steps, config.max_grad_norm, config.save_strategy) == (1, 0.0, "no")
    assert config.directions == (AUTO,)


def test_upcast_honours_max_steps(tmp_path: Path) -> None:
    assert OneStepConfig.upcast(TrainingArguments(output_dir=str(tmp_path), max_steps=3)).max_steps == 3


def test_upcast_copies_a_one_step_config_that_two_trainers_may_share(tmp_path: Path) -> None:
    config = config_for(tmp_path, damping=0.3)
    taken = OneStepConfig.upcast(config)
    assert taken is not config and taken.to_dict() == config.to_dict()
    assert isinstance(OneStepConfig.upcast(None), OneStepConfig)
