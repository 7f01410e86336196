"""Files of somebody else's folder: names, links, pickles, programs, and those that the report does not name."""

from __future__ import annotations

import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onestep_peft import OneStepTrainer, load
from onestep_peft.cli import main
from onestep_peft.merging import merge
from onestep_peft.report import StepReport
from tests.architectures.models import CONFIGS, save_base
from tests.conftest import config_for
from tests.hub.client import ROOT, Client
from tests.hub.conftest import World, resaved
from tests.hub.hostile.tampering import (
    ADAPTER,
    CONFIG,
    REPORT,
    Change,
    Marker,
    assert_same,
    edited,
    refusal,
    report_with,
)
from tests.hub_server import HubServer
from tests.test_load import named_rows


def test_the_folders_load_as_they_are(folders: Path) -> None:
    for method in ("lora", "prompt_tuning", "full"):
        model, _ = load(folders / method)
        assert model.config.id2label == {0: "ant", 1: "bee"}


# Names


NAMES = [
    "../base/config.json", "/etc/hostname", "a/../../b", "a/../b", "./adapter_config.json", "..", ".", "", "a//b",
    "..\\base\\config.json", "C:/windows/win.ini", "adapter\x00.json", "adapter\n.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_outside_are_refused(name: str, hostile: Callable[..., Path]) -> None:
    folder = report_with(hostile(), files={name: "0" * 64})
    assert "outside its folder" in refusal(folder)


@pytest.mark.parametrize("directory", [False, True])
def test_links_that_lead_outside_are_refused(directory: bool, hostile: Callable[..., Path], tmp_path: Path) -> None:
    folder = hostile(lambda copy: (copy / "words").mkdir() or (copy / "words" / "more.txt").write_text("more"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.txt").write_text("more")
    if directory:
        shutil.rmtree(folder / "words")
        (folder / "words").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "words" / "more.txt").unlink()
        (folder / "words" / "more.txt").symlink_to(tmp_path / "elsewhere" / "more.txt")
    assert "is a link to a file outside its folder" in refusal(folder)
    with pytest.raises(ValueError, match="outside its folder"):
        merge(folder, tmp_path / "merged")


def test_a_snapshot_of_any_cache_may_link_to_its_blobs_only(folders: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--user--news"
    snapshot = repository / "snapshots" / "0123abc"
    shutil.copytree(folders / "lora", snapshot)
    shutil.copytree(folders / "base", snapshot.parent / "base")
    (repository / "blobs").mkdir()
    shutil.move(snapshot / ADAPTER, repository / "blobs" / "weights")
    (snapshot / ADAPTER).symlink_to("../../blobs/weights")
    load(snapshot)
    shutil.move(repository / "blobs" / "weights", tmp_path / "elsewhere")
    (repository / "blobs" / "weights").symlink_to(tmp_path / "elsewhere")
    assert "is a link to a file outside its folder" in refusal(snapshot)


def test_a_link_within_the_folder_is_read(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "lora", tmp_path / "lora"))
    (folder / ADAPTER).rename(folder / "weights")
    (folder / ADAPTER).symlink_to("weights")
    load(folder, base_model=str(folders / "base"))


def test_an_index_that_leads_outside_is_refused(hostile: Callable[..., Path]) -> None:
    def index(place: Any) -> Change:
        def change(folder: Path) -> None:
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
            weights = dict.fromkeys(load_file(folder / "model-1.safetensors"), place)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

        return change

    for place, said in (
        ("../../base/model.safetensors", "outside its folder"),
        ("pytorch_model.bin", "a pickle"),
        ("model-2.safetensors", "names model-2.safetensors, which onestep.json does not"),
        (5, "no index of weights"),
    ):
        folder = hostile(index(place), "full")
        assert said in refusal(folder)
        shutil.rmtree(folder)


# Pickles and programs


PICKLES = [
    "adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "last.ckpt",
    "rows.pkl", "words.npy", "nested/scheduler.PT",
]  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_where_it_is_named_and_left_alone_where_it_is_not(
    name: str, hostile: Callable[..., Path], folders: Path, tmp_path: Path
) -> None:
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))

    folder = hostile(add)
    said = refusal(folder)
    assert f"holds {name}, a pickle" in said and "safetensors" in said
    files = json.loads((folder / REPORT).read_text())["files"]
    report_with(folder, files={key: value for key, value in files.items() if key != name})
    load(folder, base_model=str(folders / "base"))
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_there_as_a_pickle_only_are_refused(hostile: Callable[..., Path], tmp_path: Path) -> None:
    def only_a_pickle(folder: Path) -> None:
        (folder / ADAPTER).unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))

    folder = hostile(only_a_pickle)
    assert "a pickle" in refusal(folder)
    files = json.loads((folder / REPORT).read_text())["files"]
    report_with(folder, files={key: value for key, value in files.items() if not key.endswith(".bin")})
    assert f"but no {ADAPTER}" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_program_is_refused(hostile: Callable[..., Path]) -> None:
    folder = hostile(lambda copy: (copy / "modeling_bert.py").write_text("raise SystemExit") and None)
    assert "modeling_bert.py, a program" in refusal(folder)


@pytest.fixture
def pickled_base(folders: Path, tmp_path: Path) -> Path:
    """The base with its weights as torch saves them."""
    base = Path(shutil.copytree(folders / "base", tmp_path / "pickled"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def test_a_base_in_a_pickle_is_read_only_if_one_says_so(folders: Path, pickled_base: Path, tmp_path: Path) -> None:
    said = refusal(folders / "lora", base_model=str(pickled_base))
    assert "no weights in safetensors" in said and "`allow_pickle=True` (`--allow-pickle` in the shell)" in said
    model, _ = load(folders / "lora", base_model=str(pickled_base), allow_pickle=True)
    expected, _ = load(folders / "lora")
    assert_same(model, expected)
    words = [str(folders / "lora"), "w1 w2", "--base-model", str(pickled_base)]
    assert main(["predict", *words]) == 2 and main(["predict", *words, "--allow-pickle"]) == 0
    with pytest.raises(ValueError, match="allow_pickle"):
        merge(folders / "lora", tmp_path / "merged", base_model=str(pickled_base))
    merge(folders / "lora", tmp_path / "merged", base_model=str(pickled_base), allow_pickle=True)
    load(tmp_path / "merged")


def test_a_base_in_a_pickle_that_holds_more_than_tensors_is_never_read(
    folders: Path, pickled_base: Path, tmp_path: Path
) -> None:
    torch.save({"weight": Marker(tmp_path / "ran")}, pickled_base / "pytorch_model.bin")
    for options in ({}, {"allow_pickle": True}):
        assert refusal(folders / "lora", base_model=str(pickled_base), **options)
    assert not (tmp_path / "ran").exists()


def test_training_on_a_base_in_a_pickle_tells_what_follows(pickled_base: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has its weights in a pickle.*`allow_pickle=True`"):
        trainer = OneStepTrainer(
            model=str(pickled_base),
            args=config_for(tmp_path / "out", direction="sgd", step_size=0.1),
            train_dataset=named_rows(60, 1),
        )
    trainer.train()
    trainer.save_model()
    assert "`allow_pickle=True`" in refusal(tmp_path / "out")
    load(tmp_path / "out", allow_pickle=True)


FOREIGN = """
from onestep_peft import OneStepTrainer, load
from tests.conftest import assert_same_bits, bits, config_for
from tests.test_load import named_rows

def trained(base):
    OneStepTrainer(model=base, args=config_for("never"), train_dataset=named_rows(60, 1))

for way in (trained, lambda base: load(adapter, base_model=base)):
    for base in bases:
        try:
            way(base)
        except ValueError as error:
            print("SAID", error)
"""


def test_code_of_a_base_is_never_run_and_nobody_is_asked(folders: Path, tmp_path: Path) -> None:
    bases = []
    for file, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        base = Path(shutil.copytree(folders / "base", tmp_path / kind))
        (base / "foreign.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
        options = {"config.json": {"model_type": "foreign"}, "tokenizer_config.json": {"tokenizer_class": "Foreign"}}
        mapped = ["foreign.Foreign", None] if kind == "AutoTokenizer" else "foreign.Foreign"
        edited(file, auto_map={kind: mapped}, **options[file])(base)
        bases.append(str(base))
    # An adapter without a tokenizer of its own looks for that of its base.
    bare = resaved(folders / "lora", tmp_path / "bare", lambda copy: [f.unlink() for f in copy.glob("token*")] and None)
    shown, terminal = pty.openpty()
    script = f"bases, adapter = {bases!r}, {str(bare)!r}\n{FOREIGN}"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], stdin=terminal, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, timeout=120,
    )  # fmt: skip
    os.close(terminal)
    os.close(shown)
    said = [line for line in run.stdout.splitlines() if line.startswith("SAID")]
    # A tokenizer of this architecture can do without the code, and does.
    assert run.returncode == 0 and len(said) == 2, run.stdout
    assert all("none is run here" in line and "PeftModel.from_pretrained" in line for line in said)
    assert "[y/N]" not in run.stdout and not (tmp_path / "ran").exists()


# Files that the report does not name


def test_files_that_the_report_does_not_name_change_nothing(folders: Path, tmp_path: Path) -> None:
    for method, shadows in (("lora", ["config.json"]), ("full", ["adapter_config.json"])):
        folder = Path(shutil.copytree(folders / method, tmp_path / method))
        expected, _ = load(folder, **({"base_model": str(folders / "base")} if method == "lora" else {}))
        for name in (*shadows, "generation_config.json", "chat_template.jinja", "added_tokens.json"):
            (folder / name).write_text('{"base_model_name_or_path": "other/base", "model_type": "other"}')
        model, tokenizer = load(folder, **({"base_model": str(folders / "base")} if method == "lora" else {}))
        assert tokenizer.chat_template is None and tokenizer.name_or_path == str(folder)
        assert_same(model, expected)
    assert model.name_or_path == model.config.name_or_path == str(folder)


def test_the_configuration_of_another_kind_of_folder_is_refused(hostile: Callable[..., Path], folders: Path) -> None:
    for method, name in (("lora", "config.json"), ("full", CONFIG)):
        folder = hostile(lambda copy, name=name: (copy / name).write_text("{}") and None, method)
        assert f"to which no {name} belongs" in refusal(folder)
        shutil.rmtree(folder)


# The Hub, and merging


def test_a_folder_with_a_pickle_is_not_pushed(world: World, hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = resaved(world.adapter, tmp_path / "pickled", lambda copy: (copy / "a.bin").write_bytes(b"") and None)
    answer = client.run(f"answer = shell('push', {str(folder)!r}, 'user/pickled')")
    assert answer["status"] == 2 and "holds a.bin, a pickle" in answer["err"]
    assert not hub.requests


def test_nothing_is_downloaded_but_what_the_report_names(
    world: World, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    files = {file.name: file.read_bytes() for file in world.adapter.iterdir()}
    more = {"adapter_model.bin": "pickle", "config.json": "{}", "foreign.py": "1/0", "README.md": "", "huge/file": ""}
    hub.add_repo("user/crowded", files | more)
    hub.requests.clear()
    client.run("load('user/crowded')\nanswer = True")
    asked = {
        entry.path.split("/resolve/")[1].split("/", 1)[1] for entry in hub.requests if "crowded/resolve" in entry.path
    }
    assert asked == files.keys()


def test_a_repository_that_names_no_folder_of_this_machine_or_holds_no_report_is_refused(
    world: World, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    base = save_base(client.folder / "private", CONFIGS["bert"])
    config = json.loads((world.adapter / CONFIG).read_text())
    local = config | {"base_model_name_or_path": str(base), "revision": None}
    folder = resaved(
        world.adapter, tmp_path / "local", lambda copy: (copy / CONFIG).write_text(json.dumps(local)) and None,
        base_model=str(base), base_revision=None,
    )  # fmt: skip
    hub.add_repo("user/prying", folder)
    hub.add_repo("user/plain", {CONFIG: "{}", ADAPTER: "weights"})
    said = client.run("""
    answer = []
    for repo in ("user/prying", "user/plain", "user/nowhere"):
        try:
            load(repo)
        except ValueError as error:
            answer.append(str(error))
    """)
    assert "a folder of that name would be taken for it" in said[0] and "--base-model" in said[0]
    assert "holds no onestep.json" in said[1]
    assert "no folder here, and the Hub does not give it" in said[2]


def test_merging_copies_no_file_that_the_report_does_not_name(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "lora", tmp_path / "lora"))
    (tmp_path / "secret").write_text("a key")
    (folder / "search.png").symlink_to(tmp_path / "secret")
    assert "search.png" not in StepReport.from_json((folder / REPORT).read_text()).files
    merge(folder, tmp_path / "merged", base_model=str(folders / "base"))
    assert not (tmp_path / "merged" / "search.png").exists()
