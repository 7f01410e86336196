"""What is saved and what is pushed holds no pickle, by any name; what lies beside it in the folder stays there."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from onestep_peft.saving import read_whole
from tests.hub.client import Client
from tests.hub.conftest import World, published
from tests.hub.test_sharing import TRAINER
from tests.hub_server import HubServer

METHODS = ("lora", "prompt_tuning", "full")
# With a name and a sum of their own, Trainer's checkpoints are full of pickles; so may be what a user puts there.
TRAIN = """
trainer = trainer_for("{method}", method="{method}", save_strategy="steps", save_steps=1)
trainer.train()
trainer.save_model()
answer = True
"""


def is_pickle(content: bytes) -> bool:
    """Whether any of the usual programs would unpickle it: torch's zip files, numpy's objects, bare pickles."""
    if zipfile.is_zipfile(io.BytesIO(content)) or content.startswith(b"\x93NUMPY"):
        return True
    try:
        return any(code.name == "STOP" for code, _, _ in pickletools.genops(content))
    except ValueError:
        return False


def test_a_pickle_is_known_by_its_content(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "new")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    numpy.save(tmp_path / "array.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    found = [(tmp_path / name).read_bytes() for name in ("new", "old", "array.npy")]
    assert all(map(is_pickle, [*found, pickle.dumps([1]), pickle.dumps([1], protocol=0)]))
    assert not any(map(is_pickle, [b"", b"{}\n", b"\x89PNG\r\n", b"\x08\0\0\0\0\0\0\0{}"]))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_is_saved_or_pushed_is_a_pickle(method: str, world: World, hub: HubServer, client: Client) -> None:
    client.run(TRAINER + TRAIN.format(method=method))
    assert_pushed_without_pickles(hub, client, method)


def test_nothing_of_a_merged_model_is_a_pickle(world: World, hub: HubServer, client: Client) -> None:
    merged = client.run(f"answer = shell('merge', {str(world.adapter)!r}, 'merged')")
    assert merged["status"] == 0, merged["err"]
    assert_pushed_without_pickles(hub, client, "merged")


def assert_pushed_without_pickles(hub: HubServer, client: Client, name: str) -> None:
    """Pushes a folder with strays in it, and looks at every byte of what it holds of its own and what arrives."""
    folder, repo = client.folder / name, f"user/clean-{name.replace('_', '-')}"
    if name != "merged":
        inside = [path.read_bytes() for path in (folder / "checkpoint-1").rglob("*") if path.is_file()]
        assert any(map(is_pickle, inside)), "a checkpoint that has none would show nothing"
    for stray in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "notes.pkl", "nested/optimizer.pt"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_bytes(pickle.dumps({"a": 1}))
    answer = client.run(f"answer = attempt({name!r}, {repo!r}, check=True)")
    assert not answer["error"], answer
    own = {*read_whole(folder).files, "onestep.json"}
    files = published(hub.files(repo))
    assert files.keys() == own | {"README.md"}
    for file, content in [*files.items(), *((file, (folder / file).read_bytes()) for file in own)]:
        assert not is_pickle(content), file
