"""One Hub, one trained adapter and one client per profile for all tests of this folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from onestep_peft.report import StepReport
from onestep_peft.saving import save_whole
from tests.architectures.models import save_base
from tests.hub.client import Client
from tests.hub_server import HubServer
from tests.test_load import configurations, fresh_process, named_rows

Profile = Literal["lfs", "xet"]

TRAIN = """
import json
from peft import LoraConfig
from onestep_peft import OneStepTrainer
from tests.conftest import config_for
from tests.test_load import logits_of, named_rows

trainer = OneStepTrainer(
    model="user/base", args=config_for("adapter"), train_dataset=named_rows(160, 1), search_dataset=named_rows(60, 2),
    eval_dataset=named_rows(60, 4), peft_config=LoraConfig(r=4),
)
trainer.train()
trainer.report.datasets = {"train": ["user/rows"], "evaluation": ["user/rows"]}
trainer.save_model()
print(json.dumps(logits_of(trainer)))
"""


@dataclass
class World:
    """A Hub with `user/base`, a folder `adapter` trained on it, and the logits that it had in memory."""

    hub: HubServer
    base_commit: str
    adapter: Path
    logits: list[list[float]]


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("hub")
    base = save_base(root / "base", configurations()["bert"])
    with HubServer() as hub:
        commit = hub.add_repo("user/base", base)
        repository = str(Path(__file__).parents[2])
        env = hub.environment("hf_read") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": repository}
        logits = fresh_process(TRAIN, env, root)
        yield World(hub, commit.oid, root / "adapter", logits)


@pytest.fixture(scope="package")
def clients(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Profile], Client]]:
    """The client of a profile, started when first asked for; the Hub then speaks that profile."""
    running: dict[str, Client] = {}

    def client(profile: Profile) -> Client:
        world.hub.profile = profile
        if profile not in running:
            running[profile] = Client(world.hub, tmp_path_factory.mktemp(profile) / "work")
        return running[profile]

    yield client
    for one in running.values():
        one.close()


@pytest.fixture
def hub(world: World) -> Iterator[HubServer]:
    """The Hub, without the faults and the log of the test before."""
    world.hub.faults.clear()
    world.hub.requests.clear()
    yield world.hub
    revive(world.hub)


def revive(hub: HubServer) -> None:
    """Starts the Hub again where it is down: its threads may take a moment to let go of its ports."""
    while hub.down:
        try:
            hub.revive()
        except OSError:
            time.sleep(0.01)


@pytest.fixture
def client(hub: HubServer, clients: Callable[[Profile], Client]) -> Client:
    return clients("lfs")


def texts() -> list[str]:
    return [row["text"] for row in named_rows(8, 3)]


def published(files: dict[str, Any]) -> dict[str, Any]:
    """A repository's files without the one that the Hub adds."""
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def resaved(source: Path, target: Path, change: Callable[[Path], None], **fields: Any) -> Path:
    """A copy of a saved folder with other files or another report, and whole again."""
    shutil.copytree(source, target)
    report = StepReport.from_json((target / "onestep.json").read_text())
    (target / "onestep.json").unlink()
    change(target)

    def write(staging: Path) -> StepReport:
        shutil.copytree(target, staging, dirs_exist_ok=True)
        return StepReport(**{**vars(report), **fields})

    save_whole(target, write)
    return target
