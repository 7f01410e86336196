"""The trainer's own way to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onestep_peft import OneStepTrainer
from onestep_peft.saving import read_whole
from tests.conftest import tiny_bert, toy_rows, trainer_for
from tests.hub.client import Client
from tests.hub.conftest import published
from tests.hub_server import Fault, HubServer
from tests.test_load import named_rows

TRAINER = """
from onestep_peft import OneStepTrainer
from tests.conftest import config_for
from tests.test_load import named_rows

pushing.check_in_fresh_process = lambda *args, **kwargs: 0.0

def trainer_for(folder, **options):
    return OneStepTrainer(
        model=options.pop("model", "user/base"),
        args=config_for(folder, direction="sgd", step_size=0.1, **options), train_dataset=named_rows(60, 1),
    )
"""


def run(client: Client, script: str) -> object:
    return client.run(TRAINER + script)


def test_a_config_that_says_so_pushes_what_is_saved(hub: HubServer, client: Client) -> None:
    client_said = run(
        client,
        """
trainer = trainer_for(
    "mine", push_to_hub=True, hub_model_id="of-config", hub_private_repo=True, hub_revision="dev",
    save_strategy="steps", save_steps=1,
)
trainer.train()
trainer.save_model()
result = trainer.push_to_hub(commit_message="Again", tag="v1")
answer = [trainer.hub_model_id, result.commit]
""",
    )
    assert client_said == ["user/of-config", hub.head("user/of-config", "dev").oid]
    assert hub.repo("user/of-config").private and not published(hub.files("user/of-config"))
    files = published(hub.files("user/of-config", "dev"))
    local = {path.name for path in (client.folder / "mine").iterdir() if path.is_file()}
    assert files.keys() == local | {"README.md"}, "no checkpoint and no training_args.bin"
    assert (client.folder / "mine" / "checkpoint-1").is_dir()
    assert hub.repo("user/of-config").refs["refs/tags/v1"] == hub.head("user/of-config", "dev").oid
    assert len(list(hub.repo("user/of-config").history("dev"))) == 2, "one push; the same files again are no commit"


def test_a_push_that_fails_raises_and_leaves_the_folder_whole(hub: HubServer, client: Client) -> None:
    hub.faults.add(Fault("commit", "cut", 1000))
    said = run(
        client,
        """
trainer = trainer_for("failed")
trainer.train()
answer = []
for options in ({}, {"blocking": False}):
    try:
        trainer.push_to_hub(**options)
    except (RuntimeError, ValueError) as error:
        answer.append(f"{type(error).__name__}: {error}")
load("failed")
""",
    )
    assert isinstance(said, list) and len(said) == 2
    assert said[0].startswith("PushError: Pushing to 'user/failed'") and "are as they were" in said[0]
    assert said[1].startswith("ValueError: `blocking=False`")
    hub.faults.clear()
    answer = client.run("answer = attempt('failed', 'user/failed')")
    assert not answer["error"] and "onestep.json" in hub.files("user/failed")


@pytest.mark.parametrize("fault", ["", "cut"])
def test_the_command_pushes_last_and_says_where_to(fault: str, hub: HubServer, client: Client, tmp_path: Path) -> None:
    rows, out, repo = tmp_path / "rows.jsonl", tmp_path / "out", f"user/of-train{fault}"
    rows.write_text("".join(json.dumps(row) + "\n" for row in named_rows(60, 1)))
    if fault:
        hub.faults.add(Fault("commit", fault, 1000))
    words = ["train", "--model", "user/base", "--dataset", str(rows), "--output-dir", str(out), "--direction", "sgd"]
    options = ["--use-cpu", "true", "--disable-tqdm", "true", "--push-to-hub", "true", "--hub-model-id", repo]
    answer = client.run(f"answer = shell(*{words + options!r})")
    assert answer["status"] == (1 if fault else 0), answer["err"]
    assert f"Saved to {out}" in answer["out"] and "step 1: sgd" in answer["out"], "whatever becomes of the push"
    assert read_whole(out).base_model == "user/base"
    if fault:
        assert f"error: Pushing to '{repo}'" in answer["err"] and "Pushed" not in answer["out"]
    else:
        assert f"Pushed: {hub.endpoint}/{repo}/commit/{hub.head(repo).oid}" in answer["out"]


def test_what_could_never_be_pushed_is_told_before_any_work(hub: HubServer, client: Client) -> None:
    said = run(
        client,
        """
from tests.conftest import tiny_bert, word_tokenizer
tiny_bert().bert.save_pretrained("local")
word_tokenizer().save_pretrained("local")
answer = []
for options in ({"model": "local"}, {"hub_token": "hf_unknown", "hub_model_id": "x"}):
    try:
        trainer_for("never", push_to_hub=True, **options)
    except ValueError as error:
        answer.append(str(error))
""",
    )
    assert isinstance(said, list) and len(said) == 2
    assert "'local' is no model on the Hub" in said[0] and "push_to_hub(base_model=...)" in said[0]
    assert "hf auth login" in said[1]
    assert "create_repo" not in hub.steps()


def test_trainers_without_the_hub_ask_nothing_of_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "out", toy_rows(60, 1), model=tiny_bert(), direction="sgd", step_size=0.1)
    assert isinstance(trainer, OneStepTrainer) and trainer.hub_model_id is None
