"""There and back, in both profiles: what was trained is what others load, online and offline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onestep_peft.saving import read_whole
from tests.hub.client import Client
from tests.hub.conftest import Profile, World, published, texts
from tests.hub_server.card import validate_card
from tests.test_load import LABELS, fresh_process

READ = """
import contextlib, io, json, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
from onestep_peft import load
from onestep_peft.cli import main

def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist()

def read(repo, snippets):
    model, tokenizer = load(repo)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(repo, num_labels=2)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["predict", repo, *texts]) == 0
        scopes = [{} for _ in snippets]
        for snippet, scope in zip(snippets, scopes):
            exec(snippet, scope)
    return {
        "load": logits(model, tokenizer),
        "plain": logits(plain, AutoTokenizer.from_pretrained(repo)),
        "revision": model.peft_config["default"].revision,
        "pipeline": [one["label"] for one in pipeline("text-classification", model=model, tokenizer=tokenizer)(texts)],
        "predict": [line.split()[0] for line in said.getvalue().splitlines()[:len(texts)]],
        "snippets": said.getvalue().splitlines()[len(texts):],
    }
"""


@pytest.fixture(scope="module")
def pushed(world: World, clients: Callable[[Profile], Client]) -> dict[Profile, dict[str, Any]]:
    """`user/of-lfs` and `user/of-xet`, each pushed by the command, which checks in a fresh process."""
    world.hub.faults.clear()
    said: dict[Profile, dict[str, Any]] = {}
    for profile in ("lfs", "xet"):
        client = clients(profile)  # type: ignore[arg-type]
        world.hub.requests.clear()
        words = ["push", str(world.adapter), f"user/of-{profile}", "--tag", "v1"]
        answer = client.run(f"answer = shell(*{words!r}, check=True)")
        said[profile] = answer | {"steps": world.hub.steps()}  # type: ignore[index]
    return said


@pytest.mark.parametrize("profile", ["lfs", "xet"])
def test_the_command_pushes_one_whole_folder_with_a_card(
    profile: Profile, pushed: dict[Profile, dict[str, Any]], world: World, tmp_path: Path
) -> None:
    answer, repo = pushed[profile], f"user/of-{profile}"
    assert answer["status"] == 0, answer["err"]
    head = world.hub.head(repo)
    assert f"Pushed: {world.hub.endpoint}/{repo}/commit/{head.oid} (tag v1)" in answer["out"]
    assert "logits, to" in answer["out"]
    assert answer["steps"].count("commit") == 1 and ("xet_xorb" in answer["steps"]) == (profile == "xet")
    assert world.hub.repo(repo).refs["refs/tags/v1"] == head.oid
    files = published(world.hub.files(repo))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    report = read_whole(tmp_path)
    assert {*report.files, "onestep.json"} == files.keys()
    assert files.keys() - {"README.md"} == {file.name for file in world.adapter.iterdir()}
    assert {name.rpartition(".")[2] for name in files} <= {"json", "safetensors", "png", "md", "txt", "jinja"}
    assert (report.base_model, report.base_revision) == ("user/base", world.base_commit)
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("user/base", world.base_commit)
    text = files["README.md"].decode()
    assert validate_card(text, "model") == ([], []) and world.base_commit in text and "search.png" in text


def test_others_load_what_was_trained_online_and_offline(
    pushed: dict[Profile, dict[str, Any]], world: World, tmp_path: Path
) -> None:
    hub, environments, online, scripts = world.hub, {}, {}, {}
    repository = str(Path(__file__).parents[2])
    for profile in ("lfs", "xet"):
        hub.profile = profile
        text = hub.files(f"user/of-{profile}")["README.md"].decode()
        snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(snippets) == 2
        scripts[profile] = f"texts = {texts()!r}\n{READ}\n"
        scripts[profile] += f'print(json.dumps(read("user/of-{profile}", {snippets!r})))'
        environments[profile] = hub.environment("hf_read") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": repository}
        online[profile] = fresh_process(scripts[profile], environments[profile], tmp_path)
    # What one profile has brought into its cache is no different from the other's: one of them is enough.
    hub.requests.clear()
    offline = fresh_process(scripts["lfs"], environments["lfs"] | {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert not hub.requests
    expected = torch.tensor(world.logits)
    for read in (*online.values(), offline):
        for way in ("load", "plain"):
            assert float((torch.tensor(read[way]) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
        assert read["pipeline"] == read["predict"] == [LABELS[row.index(max(row))] for row in world.logits]
        assert "'label': " in read["snippets"][0] and "tensor" in read["snippets"][1]
