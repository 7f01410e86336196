"""The whole way on the Hub's staging site; asked for by `-m staging`, and nothing but skipped without a token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.architectures.models import CONFIGS, save_base
from tests.hub_server import HubServer
from tests.test_load import LABELS, fresh_process

ENDPOINT = "https://hub-ci.huggingface.co"
TOKEN = "HF_STAGING_TOKEN"

# Leaves nothing behind: whatever it has made by then, it deletes in the end.
TRIP = """
import json, uuid
from huggingface_hub import HfApi
from onestep_peft import OneStepTrainer, load
from tests.conftest import config_for
from tests.test_load import named_rows
import os, torch

del os.environ["HF_HUB_OFFLINE"]  # the tests' own; a push starts a process that loads from the Hub
api = HfApi()
user, name = api.whoami()["name"], f"onestep-{uuid.uuid4().hex[:12]}"
base, adapter = f"{user}/{name}-base", f"{user}/{name}"
try:
    api.create_repo(base, private=True)
    commit = api.upload_folder(repo_id=base, folder_path="base").oid
    options = {"direction": "sgd", "step_size": 0.5, "guard": False}
    trainer = OneStepTrainer(model=base, args=config_for("adapter", **options), train_dataset=named_rows(60, 1))
    trainer.train()
    pushed = trainer.push_to_hub(repo_id=adapter, private=True, tag="v1")
    model, tokenizer = load(adapter, revision="v1")
    tokens = tokenizer(["w1 w2 w50"], return_tensors="pt")
    with torch.no_grad():
        difference = (model(**tokens).logits - trainer.model.eval()(**tokens).logits).abs().max()
    info = api.model_info(adapter)
    answer = {
        "difference": float(difference), "labels": list(model.config.id2label.values()), "private": info.private,
        "at": info.sha == pushed.commit, "base": [info.card_data.base_model == base, info.library_name],
        "revision": model.peft_config["default"].revision == commit,
    }
finally:
    for repo in (adapter, base):
        api.delete_repo(repo, missing_ok=True)
answer["left"] = [one.id for one in api.list_models(author=user, search=name)]
print(json.dumps(answer))
"""


def there_and_back(environment: dict[str, str], space: Path) -> Any:
    """Trains on a private base, pushes, loads by the tag, and cleans up, on whichever Hub the environment names."""
    save_base(space / "base", CONFIGS["bert"])
    answer = fresh_process(TRIP, environment | {"PYTHONPATH": str(Path(__file__).parents[2])}, space)
    assert answer.pop("difference") <= 1e-6
    return answer


EXPECTED = {
    "labels": LABELS, "private": True, "at": True, "base": [True, "peft"], "revision": True, "left": [],
}  # fmt: skip


@pytest.mark.staging
def test_there_and_back_on_the_staging_site(tmp_path: Path) -> None:
    token = os.environ.get(TOKEN)
    if not token:
        pytest.skip(f"{TOKEN} is not set: it takes a token of {ENDPOINT} that may write")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    variables = {"HF_ENDPOINT": ENDPOINT, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home")}
    assert there_and_back(own | variables, tmp_path) == EXPECTED


def test_the_same_on_this_machine(tmp_path: Path) -> None:
    with HubServer(profile="xet") as hub:
        assert there_and_back(hub.environment("hf_write"), tmp_path) == EXPECTED
        assert "xet_xorb" in hub.steps() and "delete_repo" in hub.steps()


def test_the_staging_site_is_asked_on_request_only(pytestconfig: pytest.Config) -> None:
    assert "not staging" in " ".join(pytestconfig.getini("addopts"))
