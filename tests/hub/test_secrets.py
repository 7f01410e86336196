"""Tokens, however the client came to know them, and the machine's own names: in no file, no commit and no log."""

from __future__ import annotations

import base64
import getpass
import json
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from onestep_peft.errors import without_secrets
from tests.hub.client import Client
from tests.hub.conftest import World
from tests.hub.test_sharing import TRAINER
from tests.hub_server import Fault, HubServer
from tests.hub_server.auth import Account
from tests.test_load import named_rows

WAYS = ("variable", "old-variable", "login", "config", "argument", "option", "file", "path", "endpoint")
SECRET = {way: "hf_" + f"Q{i}zK" * 9 for i, way in enumerate((*WAYS, "git"))}
SENTINEL = "sentinel-5f0c1e7b"

# A run that saves, checkpoints and pushes; then what goes wrong, in every way that has words of its own.
RUN = """
import contextlib, io, os
os.environ.update({variables!r})
said = []
with contextlib.redirect_stdout(io.StringIO()) as out:
    trainer = trainer_for(
        "{way}", save_strategy="steps", save_steps=1, push_to_hub={pushes!r}, hub_model_id="user/secret-{way}",
        hub_token={config!r},
    )
    trainer.train()
    trainer.save_model()
    print(trainer.args, repr(trainer.args), trainer.args.to_json_string(), trainer.report)
said.append(out.getvalue())
said.append(attempt("{way}", "user/secret-{way}", token={argument!r} or {config!r}))
said.append(attempt("{way}", "other/not-mine", token={argument!r} or {config!r}))
for name in ("user/nowhere", "hf_no/name/at/all"):
    try:
        load(name)
    except ValueError as error:
        said.append(str(error))
for name in {variables!r}:
    del os.environ[name]
answer = said
"""
SHELL = """
words = {words!r}
answer = [shell("train", *words), shell("push", "{way}", "other/not-mine"), shell("train", *words, "--stop-at=x")]
"""
ROWS = "".join(json.dumps(row) + "\n" for row in named_rows(60, 1))


def forms(token: str) -> Iterator[bytes]:
    """How a token may be written."""
    yield token.encode()
    yield quote(token, safe="").encode()
    yield token.encode().hex().encode()
    for shift in range(3):  # base64 of any text that it is a part of
        coded = base64.b64encode(b"x" * shift + token.encode())
        yield coded[4 if shift else 0 : -4]


def assert_nowhere(contents: Iterable[tuple[Any, bytes]]) -> None:
    wanted = [form for token in SECRET.values() for form in forms(token)]
    for where, content in contents:
        assert not any(form in content for form in wanted), where


@pytest.fixture
def keys(hub: HubServer) -> Iterator[None]:
    """The Hub knows all of the tokens."""
    before, hub.profile = hub.tokens, "lfs"
    basic = base64.b64encode(f"user:{SECRET['endpoint']}".encode()).decode()
    accounts = dict.fromkeys([*SECRET.values(), f"Basic {basic}"], Account("user", "write"))
    hub.tokens = {**before, **accounts}
    yield
    hub.tokens = before


def run(client: Client, hub: HubServer, way: str, **given: Any) -> None:
    """A run with a token that is given in one way: what it says, what it pushes."""
    hub.faults.add(Fault("commit", "status:503"))
    options = {"variables": {}, "config": None, "argument": None, "pushes": way != "argument"} | given
    said = client.run(TRAINER + RUN.format(way=way, **options))
    assert_nowhere([(way, json.dumps(said).encode())])
    assert not said[1]["error"], said[1]
    assert said[2]["error"] == "ValueError" and "403" in said[2]["message"]
    assert len(said) == 5
    assert_pushed(hub, way)


def assert_pushed(hub: HubServer, way: str) -> None:
    files = hub.files(f"user/secret-{way}")
    assert "onestep.json" in files and not any("checkpoint" in name for name in files)
    assert_nowhere(files.items())
    told = [repr(vars(commit)) for commit in hub.repo(f"user/secret-{way}").history("main")]
    assert_nowhere([(f"commits of {way}", " ".join(told).encode())])


def client_of(hub: HubServer, folder: Path, **variables: str) -> Client:
    """A client with a home of its own, in which git knows a password too."""
    home = folder / "home"
    home.mkdir(parents=True)
    (home / ".gitconfig").write_text("[credential]\n\thelper = store\n")
    (home / ".git-credentials").write_text(f"{hub.endpoint.replace('//', '//user:' + SECRET['git'] + '@')}\n")
    (folder / "tmp").mkdir()
    own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(folder / "tmp")}
    return Client(hub, folder / "work", "", **{"ONESTEP_TEST_SENTINEL": SENTINEL, **own, **variables})


def assert_left_nothing(client: Client, *sources: Path) -> None:
    """Looks through all that a client has left: its folder, its cache, its log, its temporary files."""
    root, home = client.folder.parent, client.folder.parent / "home"
    known = {home / ".git-credentials", home / "hf" / "token", home / "hf" / "stored_tokens", *sources}
    written = [path for path in root.rglob("*") if path.is_file() and path not in known]
    assert client.log in written and any("checkpoint-1" in path.parts for path in written)
    assert_nowhere((path, path.read_bytes()) for path in written)


def test_a_token_that_the_client_is_told_is_nowhere(world: World, hub: HubServer, keys: None, tmp_path: Path) -> None:
    debug = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}  # every request is logged, with its headers
    client, home = client_of(hub, tmp_path / "told", **debug), tmp_path / "told" / "home" / "hf"
    options = tmp_path / "told" / "work" / "options.yaml"
    try:
        run(client, hub, "variable", variables={"HF_TOKEN": SECRET["variable"]})
        run(client, hub, "old-variable", variables={"HUGGING_FACE_HUB_TOKEN": SECRET["old-variable"]})
        run(client, hub, "config", config=SECRET["config"])
        run(client, hub, "argument", argument=SECRET["argument"])
        client.run(f"from huggingface_hub import login\nlogin(token={SECRET['login']!r})\nanswer = True")
        assert (home / "token").read_text() == SECRET["login"] and (home / "stored_tokens").is_file()
        run(client, hub, "login")
        (client.folder / "rows.jsonl").write_text(ROWS)
        options.write_text(f"hub_token: {SECRET['file']}\n")
        for way, words in (("option", ["--hub-token", SECRET["option"]]), ("file", ["--config", options.name])):
            shared = [
                "--model", "user/base", "--dataset", "rows.jsonl", "--output-dir", way, "--direction", "sgd",
                "--step-size", "0.1", "--save-strategy", "steps", "--save-steps", "1", "--use-cpu", "true",
                "--push-to-hub", "--hub-model-id", f"user/secret-{way}",
            ]  # fmt: skip
            said = client.run(SHELL.format(way=way, words=[*shared, *words]))
            assert_nowhere([(way, json.dumps(said).encode())])
            assert said[0]["status"] == 0 and [one["status"] for one in said[1:]] == [2, 2], said
            assert_pushed(hub, way)
    finally:
        client.close()
    log = client.log.read_text()
    assert "503" in log and "authorization: <TOKEN>" in log, "there is something to look at"
    assert_left_nothing(client, options)


@pytest.mark.parametrize("way", ["path", "endpoint"])
def test_a_token_in_a_file_or_in_the_hubs_address_is_nowhere(
    way: str, world: World, hub: HubServer, keys: None, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(SECRET["path"])
    variables = {
        "path": {"HF_TOKEN_PATH": str(tmp_path / "token")},
        "endpoint": {"HF_ENDPOINT": hub.endpoint.replace("//", f"//user:{SECRET['endpoint']}@")},
    }
    client = client_of(hub, tmp_path / way, **variables[way])
    try:
        run(client, hub, way)
        hub.faults.add(Fault("commit", "cut", 1000))
        said = client.run(f"answer = [attempt({way!r}, 'user/cut'), shell('push', {way!r}, 'user/cut')]")
        assert said[0]["error"] == "PushError" and said[1]["status"] == 1
        dry = client.run(f"answer = shell('push', '--dry-run', {way!r}, 'user/dry')")
        assert dry["status"] == 0 and "user/dry" in dry["out"]
        assert_nowhere([(way, json.dumps([said, dry]).encode())])
    finally:
        client.close()
    assert_left_nothing(client)
    assert_of_no_machine(hub, client, way)


def assert_of_no_machine(hub: HubServer, client: Client, way: str) -> None:
    """Neither what is saved nor what is pushed tells where it was made, or in which environment."""
    saved = {path.name: path.read_bytes() for path in (client.folder / way).iterdir() if path.is_file()}
    names = [str(client.folder.parent), str(Path.home()), SENTINEL, hub.endpoint.split("//")[1]]
    names += [socket.gethostname(), getpass.getuser()]
    for name, content in [*saved.items(), *hub.files(f"user/secret-{way}").items()]:
        found = [text for text in names if len(text) > 5 and text.encode() in content]
        assert not found, (name, found)


def test_messages_lose_tokens_and_passwords() -> None:
    token = SECRET["variable"]
    for text, expected in (
        (f"GET https://user:{token}@host:80/a?b=c failed", "GET https://host:80/a?b=c failed"),
        (f"no file {token}.", "no file hf_...."),
        ("https://host/user/name@main, hf_hub and me@host", "https://host/user/name@main, hf_hub and me@host"),
    ):
        assert without_secrets(text) == expected
