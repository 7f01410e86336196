"""Six architectures × three methods, there and back by the Hub: whoever loads what was pushed gets what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.hub.trips import base_of
from tests.hub_server import HubServer
from tests.test_load import LABELS

ROOT = str(Path(__file__).parents[2])
BASES = ("bert", "deberta-v2", "modernbert", "t5", "llama", "llama-chat")
# With a prompt, their heads cannot tell a row's last token; `tests/architectures` has that they are refused.
REFUSED = {("t5", "prompt_tuning"), ("llama", "prompt_tuning")}
PAIRS = [(b, m) for b in BASES for m in ("lora", "prompt_tuning", "full") if (b, m) not in REFUSED]


@dataclass
class End:
    """What one end of the trip has to say, by `base:method`, and its models' logits by `base:method way`."""

    said: dict[str, dict[str, Any]]
    logits: dict[str, Tensor]


@dataclass
class Trip:
    commits: dict[str, str]
    pushed: End
    online: End
    offline: End
    offline_requests: int


def process(what: str, env: dict[str, str], folder: Path) -> End:
    folder.mkdir()
    pairs = [f"{base}:{method}" for base, method in PAIRS]
    command = [sys.executable, "-W", "ignore", "-m", "tests.hub.trips", what, *pairs]
    env = env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return End(json.loads((folder / f"{what}.json").read_text()), load_file(folder / f"{what}.safetensors"))


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trip]:
    root = tmp_path_factory.mktemp("trip")
    with HubServer(profile="xet") as hub:
        commits = {name: hub.add_repo(f"user/{name}", base_of(name, root / name)).oid for name in BASES}
        pushed = process("push", hub.environment("hf_write"), root / "pushing")
        # Bases move on; an adapter belongs to the commit that it was made on.
        for name in BASES:
            hub.commit(f"user/{name}", {"config.json": "{}", "tokenizer.json": "{}"})
        reader = hub.environment("hf_read")
        online = process("read", reader, root / "online")
        hub.requests.clear()
        offline = process("read", reader | {"HF_HUB_OFFLINE": "1"}, root / "offline")
        yield Trip(commits, pushed, online, offline, len(hub.requests))


@pytest.mark.parametrize(("base", "method"), PAIRS)
def test_all_ways_of_loading_give_the_logits_that_memory_gave(base: str, method: str, trip: Trip) -> None:
    pair = f"{base}:{method}"
    expected = trip.pushed.logits[f"{pair} memory"]
    scale = float(expected.abs().max())
    assert scale > 0.1
    ways = {"load", "card", "card alone"} | ({"PeftModel"} if method != "full" else set())
    for end in (trip.online, trip.offline):
        found = {name.partition(" ")[2]: logits for name, logits in end.logits.items() if name.startswith(f"{pair} ")}
        assert found.keys() == ways
        for way, logits in found.items():
            assert float((logits - expected).abs().max()) <= 1e-6 * scale, way
    if method != "full":
        erased = trip.pushed.logits[f"{pair} erased"]
        assert float((erased - expected).abs().max()) > 1e-5 * scale, "there is something to lose"


@pytest.mark.parametrize(("base", "method"), PAIRS)
def test_what_belongs_to_a_model_comes_along(base: str, method: str, trip: Trip) -> None:
    pair = f"{base}:{method}"
    before = trip.pushed.said[pair]
    assert before["base"] == trip.commits[base]
    assert before["labels"] == ([] if base == "llama-chat" else LABELS)
    assert (before["talk"] is not None) == (base == "llama-chat")
    for end in (trip.online, trip.offline):
        after = end.said[pair]
        for what in ("base", "labels", "ids", "talk", "predict"):
            assert after[what] == before[what], what
        for ours, theirs in zip(before["pipeline"], after["pipeline"], strict=True):
            assert [strings(one) for one in theirs] == [strings(one) for one in ours]
            scores, expected = ([one.get("score", 0.0) for one in found] for found in (theirs, ours))
            assert scores == pytest.approx(expected, abs=1e-6 * max(map(abs, expected)))


def test_offline_nothing_is_asked(trip: Trip) -> None:
    assert trip.offline_requests == 0


def strings(answer: dict[str, Any]) -> dict[str, str]:
    """A pipeline's answer without the score."""
    return {name: value for name, value in answer.items() if name != "score"}
