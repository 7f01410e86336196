"""A push: where it goes, what it refuses, what it does when others push too."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onestep_peft.hub import probe
from tests.conftest import tiny_bert
from tests.hub.client import Client
from tests.hub.conftest import World, published, resaved
from tests.hub_server import Fault, HubServer

WRITES = {"create_repo", "create_branch", "create_tag", "preupload", "lfs_batch", "lfs_put", "commit", "validate_yaml"}


def push(client: Client, folder: Path, repo: str, **options: Any) -> dict[str, Any]:
    return client.run(f"answer = attempt({str(folder)!r}, {repo!r}, **{options!r})")


def test_a_dry_run_sends_nothing(world: World, hub: HubServer, client: Client) -> None:
    answer = client.run(f"answer = shell('push', '--dry-run', {str(world.adapter)!r}, 'user/dry')")
    assert answer["status"] == 0, answer["err"]
    assert "Nothing was sent" in answer["out"] and "README.md" in answer["out"]
    assert not WRITES & set(hub.steps()) and hub.store.find("model", "user/dry") is None


def test_a_branch_a_tag_and_again(world: World, hub: HubServer, client: Client) -> None:
    old = hub.add_repo("user/branch", {"config.json": "{}"})
    first = push(client, world.adapter, "user/branch", revision="dev/one", tag="v1")
    assert not first["error"] and first["revision"] == "dev/one", first
    assert hub.files("user/branch") == {"config.json": b"{}"}
    assert hub.head("user/branch", "dev/one").parent == old.oid
    assert hub.repo("user/branch").refs["refs/tags/v1"] == first["commit"]
    again = push(client, world.adapter, "user/branch", revision="dev/one", tag="v1")
    assert again["commit"] == first["commit"], "an unchanged folder makes no commit"
    assert first["new"] and not again["new"]
    words = ["push", str(world.adapter), "user/branch", "--revision", "dev/one"]
    told = client.run(f"answer = shell(*{words!r})")
    assert told["status"] == 0 and "Nothing to push: dev/one holds these files already: " in told["out"]
    hub.commit("user/branch", {"search.png": b"another"}, revision="dev/one")
    hub.repo("user/branch").refs["refs/tags/v2"] = old.oid
    taken = push(client, world.adapter, "user/branch", revision="dev/one", tag="v2")
    assert taken["error"] == "ValueError" and "'v2'" in taken["message"] and "another `tag`" in taken["message"]
    assert hub.files("user/branch", "dev/one")["search.png"] == b"another", "refused before anything was sent"


def test_files_of_an_earlier_push_go_and_others_stay(
    world: World, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    hub.add_repo("user/twice", {"notes.txt": "mine"})
    template = "chat_template [old]*.jinja"
    first = resaved(world.adapter, tmp_path / "first", lambda folder: (folder / template).write_text("old") and None)
    assert not push(client, first, "user/twice")["error"]
    assert template in hub.files("user/twice")
    hub.commit("user/twice", {"chat_template old.jinja": "theirs"})
    assert not push(client, world.adapter, "user/twice")["error"]
    expected = {file.name for file in world.adapter.iterdir()} | {"README.md", "notes.txt", "chat_template old.jinja"}
    assert hub.files("user/twice").keys() == expected
    assert len(list(hub.repo("user/twice").history("main"))) == 4, "one commit a push"


def test_a_report_that_names_anything_is_no_hindrance(world: World, hub: HubServer, client: Client) -> None:
    report = {"version": 1, "files": dict.fromkeys(["/etc/hostname", "../a", "*", "n" * 5000, "old.txt"], "")}
    hub.add_repo("user/odd", {"onestep.json": json.dumps(report), "notes.txt": "mine", "old.txt": "ours"})
    assert not push(client, world.adapter, "user/odd")["error"]
    assert "notes.txt" in hub.files("user/odd") and "old.txt" not in hub.files("user/odd")


def test_a_pull_request_may_come_from_a_stranger(world: World, hub: HubServer, client: Client) -> None:
    hub.add_repo("user/proposed", {"config.json": "{}"})
    refused = push(client, world.adapter, "user/proposed", token="hf_other")
    assert refused["error"] == "ValueError" and "403" in refused["message"] and "--create-pr" in refused["message"]
    made = push(client, world.adapter, "user/proposed", token="hf_other", create_pr=True)
    assert not made["error"] and made["revision"] == "refs/pr/1" and made["url"].endswith("/discussions/1")
    assert hub.files("user/proposed") == {"config.json": b"{}"}
    assert "onestep.json" in hub.files("user/proposed", "refs/pr/1")
    assert not push(client, world.adapter, "user/proposed")["error"]
    again = push(client, world.adapter, "user/proposed", token="hf_other", create_pr=True)
    assert not again["error"] and not again["new"] and again["revision"] == "main", "nothing to propose"
    both = push(client, world.adapter, "user/proposed", create_pr=True, tag="v1")
    assert both["error"] == "ValueError" and "Leave out" in both["message"]
    nothing = push(client, world.adapter, "user/nothing", create_pr=True)
    assert nothing["error"] == "ValueError" and "leave out `create_pr`" in nothing["message"]
    assert hub.store.find("model", "user/nothing") is None


def test_a_private_repository_is_seen_by_its_owner_only(world: World, hub: HubServer, client: Client) -> None:
    made = client.run(f"answer = shell('push', {str(world.adapter)!r}, 'secret', '--private')")
    assert made["status"] == 0 and hub.repo("user/secret").private, made["err"]
    script = """
    def visit(token):
        import huggingface_hub
        try:
            return len(huggingface_hub.HfApi(token=token).list_repo_files("user/secret"))
        except Exception as error:
            return type(error).__name__
    answer = [visit(token) for token in ("hf_read", "hf_other", False)]
    """
    assert client.run(script) == [
        len(hub.files("user/secret")), "RepositoryNotFoundError", "RepositoryNotFoundError"
    ]  # fmt: skip
    hub.add_repo("user/public", {"config.json": "{}"})
    refused = push(client, world.adapter, "user/public", private=True)
    assert refused["error"] == "ValueError" and "already and public" in refused["message"]
    assert hub.files("user/public") == {"config.json": b"{}"}


def test_tokens_that_will_not_do_are_told(world: World, hub: HubServer, client: Client) -> None:
    for token, said in (("hf_unknown", "hf auth login"), ("hf_read", "a token that may write|may write there")):
        refused = push(client, world.adapter, "user/refused", token=token)
        assert refused["error"] == "ValueError" and any(part in refused["message"] for part in said.split("|"))
        assert "Nothing was sent" in refused["message"] and token not in refused["message"]
    assert hub.store.find("model", "user/refused") is None


def test_a_token_may_end_in_a_line_break(world: World, hub: HubServer, client: Client) -> None:
    assert not push(client, world.adapter, "user/broken-line", token="hf_write\n")["error"]


def test_an_interrupted_push_says_what_was_sent(world: World, hub: HubServer, client: Client) -> None:
    words = ["push", str(world.adapter), "user/interrupted"]
    script = f"""
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    real, HfApi.upload_folder = HfApi.upload_folder, interrupted
    answer = shell(*{words!r})
    HfApi.upload_folder = real
    """
    told = client.run(script)
    assert told["status"] == 130 and "sent before that: the new, empty repository" in told["err"], told
    assert "Push again" in told["err"] and "no result was saved" not in told["err"]
    assert client.run(f"answer = shell(*{words!r})")["status"] == 0


def test_bad_names_and_folders_are_refused_before_any_request(
    world: World, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    assert "`user/name`" in push(client, world.adapter, "a/b/c")["message"]
    assert "holds no onestep.json" in push(client, tmp_path, "user/new")["message"]
    broken = Path(shutil.copytree(world.adapter, tmp_path / "broken"))
    (broken / "search.png").write_bytes(b"")
    answer = client.run(f"answer = shell('push', {str(broken)!r}, 'user/new')")
    assert answer["status"] == 2 and "search.png has changed" in answer["err"]
    assert "needs REPO" in client.run(f"answer = shell('push', {str(broken)!r})")["err"]
    assert not hub.requests


def test_a_local_base_needs_a_name_and_is_then_pinned(
    world: World, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    def localise(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "base", "revision": None}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    folder = resaved(world.adapter, tmp_path / "local", localise, base_model="../base", base_revision=None)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused = push(client, folder, "user/local")
    assert (
        refused["error"] == "ValueError" and "'../base'" in refused["message"] and "--base-model" in refused["message"]
    )
    missing = push(client, folder, "user/local", base_model="user/nowhere")
    assert missing["error"] == "ValueError" and "'user/nowhere'" in missing["message"] and "404" in missing["message"]
    assert "`base_model='../base'`" in push(client, folder, "user/local", base_model="../base")["message"]
    assert not WRITES & set(hub.steps())
    made = push(client, folder, "user/local", base_model="user/base")
    assert not made["error"], made["message"]
    files = hub.files("user/local")
    config, report = json.loads(files["adapter_config.json"]), json.loads(files["onestep.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("user/base", world.base_commit)
    assert (report["base_model"], report["base_revision"]) == ("user/base", world.base_commit)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before, "the folder here stays as it is"


def test_a_bases_tag_is_pinned_as_the_commit_that_it_stands_for(world: World, hub: HubServer, client: Client) -> None:
    hub.repo("user/base").refs["refs/tags/first"] = world.base_commit
    script = """
    import pathlib
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from onestep_peft import OneStepTrainer
    from tests.conftest import config_for, word_tokenizer
    from tests.test_load import named_rows

    def saved(name, model, **options):
        arguments = config_for(pathlib.Path(name), direction="sgd", step_size=0.1, guard=False)
        rows = named_rows(20, 1)
        trainer = OneStepTrainer(model, arguments, train_dataset=rows, processing_class=word_tokenizer(), **options)
        trainer.train()
        trainer.save_model()
        files = [json.load(open(f"{name}/{file}")) for file in ("adapter_config.json", "onestep.json")]
        return files[0]["revision"], files[1]["base_revision"]

    base = lambda: AutoModelForSequenceClassification.from_pretrained("user/base", revision="first", num_labels=2)
    config = LoraConfig(r=2, revision="first", task_type="SEQ_CLS")
    answer = [*saved("tagged", base(), peft_config=config), *saved("wrapped", get_peft_model(base(), config))]
    """
    assert client.run(script) == [world.base_commit] * 4


def test_what_gives_other_logits_is_not_pushed(world: World, hub: HubServer, client: Client, tmp_path: Path) -> None:
    def lose_precision(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        weights["base_model.model.classifier.weight"] *= 1.01
        save_file(weights, folder / "adapter_model.safetensors")

    other = resaved(world.adapter, tmp_path / "other", lose_precision)
    answer = client.run(f"answer = shell('push', {str(other)!r}, 'user/other', check=True)")
    assert answer["status"] == 2 and "other logits than the trained model gave" in answer["err"], answer
    assert not WRITES & set(hub.steps())
    blind = resaved(world.adapter, tmp_path / "blind", lambda folder: (folder / probe.FILE).unlink())
    answer = client.run(f"answer = shell('push', {str(blind)!r}, 'user/blind', check=True)")
    assert answer["status"] == 2 and "no probe.safetensors" in answer["err"]


def test_the_probe_holds_no_row_but_its_special_tokens(tmp_path: Path) -> None:
    ids = torch.tensor([[2, 50, 51, 52, 53, 54, 55, 3], [2, 60, 61, 3, 0, 0, 0, 0]])
    model = tiny_bert().train()
    batch = {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": torch.tensor([0, 1])}
    probe.record(model, batch, {0, 2, 3}, tmp_path / probe.FILE)
    kept = load_file(tmp_path / probe.FILE)
    assert kept.keys() == {"input_ids", "attention_mask", "logits"}
    special = torch.isin(ids, torch.tensor([0, 2, 3]))
    assert torch.equal(kept["input_ids"][special], ids[special])
    assert not torch.isin(kept["input_ids"][~special], torch.tensor([0, 2, 3])).any()
    assert (kept["input_ids"][~special] != ids[~special]).float().mean() > 0.7
    assert model.training
    with torch.no_grad():
        assert torch.equal(model.eval()(**{k: v for k, v in kept.items() if k != "logits"}).logits, kept["logits"])


@pytest.mark.parametrize("theirs", ["notes.txt", "adapter_config.json"])
def test_somebody_else_pushes_meanwhile(theirs: str, world: World, hub: HubServer, client: Client) -> None:
    repo = f"user/{theirs.replace('.', '-')}"
    hub.add_repo(repo, {"config.json": "{}", "adapter_config.json": "{}"})
    hub.faults.add(Fault("preupload", "slow:0.5"))

    def intrude() -> None:
        while "preupload" not in hub.steps():
            time.sleep(0.01)
        hub.commit(repo, {theirs: b"theirs"})

    other = threading.Thread(target=intrude)
    other.start()
    answer = push(client, world.adapter, repo)
    other.join()
    files = hub.files(repo)
    assert files[theirs] == b"theirs"
    if theirs == "notes.txt":
        assert not answer["error"] and "Somebody else has pushed notes.txt" in answer["message"]
        assert "onestep.json" in files and hub.steps().count("commit") == 2
    else:
        assert answer["error"] == "PushError" and "somebody else has changed adapter_config.json" in answer["message"]
        assert "onestep.json" not in files
        assert not push(client, world.adapter, repo)["error"]
        assert len(json.loads(published(hub.files(repo))["onestep.json"])["files"]) > 5


def test_somebody_else_who_is_faster_twice_is_not_raced(world: World, hub: HubServer, client: Client) -> None:
    hub.add_repo("user/raced", {"config.json": "{}"})
    hub.faults.add(Fault("preupload", "slow:0.5", 2))

    def intrude() -> None:
        for number in (1, 2):
            while hub.steps().count("preupload") < number:
                time.sleep(0.01)
            hub.commit("user/raced", {f"notes-{number}.txt": b"theirs"})

    other = threading.Thread(target=intrude)
    other.start()
    answer = push(client, world.adapter, "user/raced")
    other.join()
    assert answer["error"] == "PushError" and "came too late" in answer["message"] and "Push again" in answer["message"]
    assert hub.steps().count("commit") == 2
    assert hub.files("user/raced").keys() == {"config.json", "notes-1.txt", "notes-2.txt"}
    assert not push(client, world.adapter, "user/raced")["error"]


def test_the_exit_status_tells_a_refusal_from_a_failure(world: World, hub: HubServer, client: Client) -> None:
    words = ["push", str(world.adapter), "user/status"]
    for kind, status, said in (("cut", 1, "failed 3 times"), ("status:403", 2, "was refused"), ("slow:0", 0, "")):
        hub.faults.add(Fault("commit", kind, 1000))
        answer = client.run(f"answer = shell(*{words!r})")
        hub.faults.clear()
        assert answer["status"] == status and said in answer["err"], answer
        *tries, last = answer["err"].splitlines() or [""]
        assert len(tries) == (2 if kind == "cut" else 0) and all("Another try in" in line for line in tries)
        assert last.startswith("onestep: error: Pushing to 'user/status': ") or status == 0
        assert ("Pushed: " in answer["out"]) == (status == 0)
