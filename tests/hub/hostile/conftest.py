"""A trained folder for each method, and copies that are tampered with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from onestep_peft import OneStepTrainer
from tests.architectures.models import CONFIGS, save_base
from tests.conftest import config_for
from tests.hub.conftest import resaved
from tests.hub.hostile.tampering import Change
from tests.test_load import named_rows


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and one folder for each method that was trained on it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("folders")
    base = save_base(root / "base", CONFIGS["bert"])
    for method in ("lora", "prompt_tuning", "full"):
        trainer = OneStepTrainer(
            model=str(base),
            args=config_for(root / method, method=method, direction="sgd", step_size=0.1),
            train_dataset=named_rows(60, 1),
            peft_config=LoraConfig(r=4, target_modules=["query", "value"]) if method == "lora" else None,
        )
        trainer.train()
        trainer.save_model()
    return root


@pytest.fixture
def hostile(folders: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a trained folder with a change and checksums that fit it.

    It lies beside a base of which there is the configuration only: what is refused is refused before any weight of it
    is read.
    """
    shutil.copytree(folders / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))

    def make(change: Change = lambda folder: None, method: str = "lora", **fields: Any) -> Path:
        return resaved(folders / method, tmp_path / "hostile", change, **fields)

    return make
