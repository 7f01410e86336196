"""Every fault of the Hub at every request of a push: old or new, never between; and pushing again succeeds.

`pytest -s` shows the tables of faults and outcomes, with what a user reads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onestep_peft.hub.remote import FIXES
from onestep_peft.saving import read_whole
from tests.hub.client import Client
from tests.hub.conftest import Profile, World, published, resaved, revive
from tests.hub_server import Fault, HubServer

KINDS = ("status:503", "status:403", "slow:0.02", "cut", "cut-body", "cut-after", "crash", "crash-after")
PAST_ALL_TRIES = 1000


def test_every_fault_at_every_request_of_a_push_by_lfs(
    world: World, hub: HubServer, clients: Callable[[Profile], Client], tmp_path: Path
) -> None:
    client = clients("lfs")
    steps = requests_of(hub, client, renewed(world.adapter, tmp_path / "sound"), "user/sound")
    assert set(steps) == {
        "repo_info", "create_repo", "create_branch", "refs", "validate_yaml", "preupload", "lfs_batch", "lfs_put",
        "lfs_verify", "commit", "create_tag", "resolve_head",
    }  # fmt: skip
    cases = [(step, kind, 1) for step in steps for kind in KINDS]
    cases += [("commit", "status:500", 1), ("commit", "status:429", 1), ("commit", "status:503", PAST_ALL_TRIES)]
    cases += [(step, "cut", PAST_ALL_TRIES) for step in steps]
    assert_all_survive(hub, client, world.adapter, cases, tmp_path)


def test_every_fault_at_every_request_of_a_second_push_by_lfs(
    world: World, hub: HubServer, clients: Callable[[Profile], Client], tmp_path: Path
) -> None:
    client = clients("lfs")
    repo = with_an_earlier_push(hub, world, "user/sound-again", tmp_path / "earlier")
    steps = requests_of(hub, client, renewed(world.adapter, tmp_path / "sound"), repo)
    own = [step for step in steps if step in ("resolve_head", "preupload", "commit") or step.startswith("lfs")]
    assert len(own) == 6 and "create_repo" not in steps
    cases = [(step, kind, 1) for step in own for kind in ("status:503", "cut-after", "crash", "crash-after")]
    assert_all_survive(hub, client, world.adapter, cases, tmp_path, again=world)


def test_every_fault_at_the_requests_of_a_second_push_by_xet(
    world: World, hub: HubServer, clients: Callable[[Profile], Client], tmp_path: Path
) -> None:
    client = clients("xet")
    repo = with_an_earlier_push(hub, world, "user/sound-xet", tmp_path / "earlier")
    steps = requests_of(hub, client, renewed(world.adapter, tmp_path / "sound"), repo)
    own = [step for step in steps if step.startswith("xet") or step == "commit"]
    assert {"xet_write_token", "xet_xorb", "xet_shard"} <= set(own)
    cases = [(step, kind, 1) for step in own for kind in KINDS]
    assert_all_survive(hub, client, world.adapter, cases, tmp_path, again=world)


def with_an_earlier_push(hub: HubServer, world: World, repo: str, folder: Path) -> str:
    """A repository that holds another adapter of ours, on main."""
    renewed(world.adapter, folder)
    hub.add_repo(repo, folder)
    return repo


def renewed(source: Path, target: Path) -> Path:
    """A copy with other weights: what the Hub, or the client's cache, has seen before is not uploaded again."""

    def draw(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(zlib.crc32(str(target).encode()))
        drawn = {name: torch.rand(value.shape, generator=generator) for name, value in weights.items()}
        save_file(drawn, folder / "adapter_model.safetensors")

    return resaved(source, target, draw)


def push(client: Client, folder: Path, repo: str) -> dict[str, Any]:
    return client.run(f"answer = attempt({str(folder)!r}, {repo!r}, revision='dev', tag='v1')")


def requests_of(hub: HubServer, client: Client, folder: Path, repo: str) -> list[str]:
    answer = push(client, folder, repo)
    assert not answer["error"], answer
    return list(dict.fromkeys(hub.steps()))


def assert_all_survive(
    hub: HubServer,
    client: Client,
    adapter: Path,
    cases: list[tuple[str, str, int]],
    space: Path,
    again: World | None = None,
) -> None:
    """Runs each case with new weights in a repository of its own, and prints the table fault × outcome.

    Args:
        again: For repositories that hold an earlier push.
    """
    lines = [f"{'request':17} {'fault':12} {'lasts':7} {'repository':11} said"]
    for number, (step, kind, times) in enumerate(cases):
        repo = f"user/{hub.profile}{'-again' if again else ''}-case-{number}"
        if again is not None:
            with_an_earlier_push(hub, again, repo, space / f"earlier-{number}")
        old = dict(hub.files(repo)) if again is not None else {}
        folder = renewed(adapter, space / f"case-{number}")
        before = contents(folder)
        fault = Fault(step, kind, times)
        hub.faults.add(fault)
        answer = push(client, folder, repo)
        hub.faults.clear()
        revive(hub)
        state = state_of(hub, folder, repo, old)
        lasts = "once" if times == 1 else "always"
        lines.append(f"{step:17} {kind:12} {lasts:7} {state:11} {shortened(answer, repo)}")
        assert fault.times < times, f"{lines[-1]}: the fault did not come to pass"
        assert_told(answer, state, lines[-1], new_repository=again is None)
        assert contents(folder) == before and read_whole(folder), lines[-1]
        second = push(client, folder, repo)
        assert not second["error"], (lines[-1], second)
        assert state_of(hub, folder, repo, old) == "new", lines[-1]
        assert hub.repo(repo).refs["refs/tags/v1"] == hub.head(repo, "dev").oid
    print("\n" + "\n".join(lines))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def shortened(answer: dict[str, Any], repo: str) -> str:
    """What the user reads, without what all of these messages have in common."""
    if not answer["error"]:
        return "pushed"
    common = (
        f"Pushing to {repo!r}: ",
        "The folder here is as it was. ",
        "Push again when the network and the Hub are ",
    )
    message = answer["message"]
    for part in (*common, "well; what has arrived is not sent twice."):
        message = message.replace(part, "")
    return f"{answer['error']}: {' '.join(message.split())}"


def state_of(hub: HubServer, folder: Path, repo: str, old: dict[str, bytes]) -> str:
    """What a reader of the branch finds: "none" (no repository), "old" (the files of before) or "new" (all files)."""
    found = hub.store.find("model", repo)
    if found is None or "refs/heads/dev" not in found.refs:
        return "none" if found is None else "old"
    files = published(hub.files(repo, "dev"))
    if files == old:
        return "old"
    local = contents(folder)
    assert files.keys() == local.keys() | {"README.md"}, "half of a push"
    assert files["adapter_model.safetensors"] == local["adapter_model.safetensors"], "the old weights"
    assert len(list(found.history("dev"))) == 2, "more than one commit"
    return "new"


def assert_told(answer: dict[str, Any], state: str, line: str, new_repository: bool) -> None:
    if not answer["error"]:
        assert state == "new", line
        return
    message = answer["message"]
    if answer["error"] == "ValueError":  # the Hub is well, and says no
        assert "was refused (HTTP 403: " in message and FIXES[403] in message, (line, message)
        assert "status:403" in line and (state == "new") == ("with all files" in message), line
    else:
        assert answer["error"] == "PushError", (line, answer)
        assert "Push again when the network and the Hub are well" in message, (line, message)
        assert "The folder here is as it was" in message, (line, message)
    assert "requested files in the local cache" not in message and "https://developer" not in message, (line, message)
    assert "Sent before that: " in message or "Nothing was sent before that." in message, message
    assert ("the new, empty repository" in message) == (new_repository and state != "none"), (line, message)
    if "are as they were" in message:
        assert state == "old", (line, message)
    if "with all files" in message:
        assert state == "new", (line, message)


@pytest.mark.parametrize("kind", ["cut-after", "status:503"])
def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(
    kind: str, world: World, hub: HubServer, client: Client
) -> None:
    repo = f"user/pulls-{kind[:3]}"
    hub.add_repo(repo, {"config.json": "{}"})
    hub.faults.add(Fault("commit", kind))
    answer = client.run(f"answer = attempt({str(world.adapter)!r}, {repo!r}, create_pr=True)")
    assert [ref for ref in hub.repo(repo).refs if "/pr/" in ref] == ["refs/pr/1"]
    if kind == "cut-after":
        assert answer["error"] == "PushError" and f"{repo}/discussions first" in answer["message"]
    else:
        assert not answer["error"]
