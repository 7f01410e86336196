"""A merged model on the Hub: a plain model, with its base named and its labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from onestep_peft.saving import read_whole
from tests.hub.client import Client
from tests.hub.conftest import World, published, texts
from tests.hub_server import HubServer
from tests.hub_server.card import validate_card
from tests.test_load import LABELS, fresh_process

READ = """
import json, torch
from transformers import AutoModelForSequenceClassification
from onestep_peft import load

def logits(model):
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist()

model, tokenizer = load("user/whole")
plain = AutoModelForSequenceClassification.from_pretrained("user/whole")
exec(snippet)
print(json.dumps({"ours": logits(model), "plain": logits(plain), "labels": list(plain.config.id2label.values())}))
"""


def test_a_merged_model_goes_to_the_hub_and_comes_back(
    world: World, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    whole = str(tmp_path / "whole")
    merged = client.run(f"answer = shell('merge', {str(world.adapter)!r}, {whole!r})")
    assert merged["status"] == 0, merged["err"]
    pushed = client.run(f"answer = shell('push', {whole!r}, 'user/whole', check=True)")
    assert pushed["status"] == 0, pushed["err"]
    files = published(hub.files("user/whole"))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    report = read_whole(tmp_path)
    assert (report.method, report.merged_from, report.base_model) == ("full", "lora", "user/base")
    assert report.base_revision == world.base_commit
    assert "adapter_config.json" not in files and str(tmp_path) not in json.dumps(json.loads(files["config.json"]))
    card = files["README.md"].decode()
    assert validate_card(card, "model") == ([], []) and ModelCard(card).data.library_name == "transformers"
    assert "A LoRA adapter merged into [`user/base`]" in card
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "peft" not in snippet.replace("onestep_peft", "")
    env = hub.environment("hf_read") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = f"texts, snippet = {texts()!r}, {snippet!r}\n{READ}"
    found = fresh_process(script, env, tmp_path / "whole")
    expected = torch.tensor(world.logits)
    for way in ("ours", "plain"):
        assert float((torch.tensor(found[way]) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert found["labels"] == LABELS
