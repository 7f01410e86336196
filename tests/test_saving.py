"""What is saved: whole or absent, checked by sha256, with nothing in it of the machine or its secrets."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from onestep_peft import OneStepTrainer, StepReport, load
from onestep_peft.hub import probe
from onestep_peft.methods import lora
from onestep_peft.saving import check_free, read_whole, save_whole
from tests.conftest import bits, tiny_bert, tiny_llama, toy_rows, trainer_for, word_tokenizer

SENTINEL = "sentinel-5f0c1e7b"
SECRET = "hf_" + "Zq7" * 11
TOKEN = "hf_" + "Wk3" * 11


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OneStepTrainer]:
    """A folder with `base`, `out` (a saved run) and `checkpoints`; all of it from one run, read by every test."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    tiny_bert().bert.save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_TOKEN", SECRET)
    patch.setenv("ONESTEP_TEST_SENTINEL", SENTINEL)
    patch.chdir(root)
    try:
        rows = [{**row, "label": ["bad", "good"][row["label"]]} for row in toy_rows(300, 1)]
        trainer = trainer_for(
            root / "out", rows, model=str(root / "base"), eval_dataset=rows[:50], hub_token=TOKEN, search_fraction=0.2,
            save_strategy="steps", save_steps=1,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
    finally:
        patch.undo()
    return root, trainer


def saved_files(folder: Path) -> list[Path]:
    """The run's own files, without Trainer's checkpoints."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and "checkpoint-" not in str(f.relative_to(folder)))


def test_the_report_has_every_field(world: tuple[Path, OneStepTrainer]) -> None:
    data = json.loads((world[0] / "out" / "onestep.json").read_text())
    assert data["version"] == 1
    assert data["base_model"] == "../base"
    assert data["base_revision"] is None
    assert (data["task"], data["method"], data["labels"]) == ("text-classification", "lora", ["bad", "good"])
    assert set(data["rows"]) == {"gradient", "search", "guard"}
    assert data["rows"]["gradient"] + data["rows"]["search"] == 300
    assert {"total", "head", "pass", "directions", "search", "guard"} <= set(data["seconds"])
    parts = sum(data["seconds"][part] for part in ("head", "pass", "directions", "search", "guard"))
    assert 0 < parts <= data["seconds"]["total"]
    assert data["peak_memory_bytes"] > 2**20
    (step,) = data["steps"]
    assert {"direction", "step_size", "candidates", "loss_before", "loss_after", "accepted", "reason"} <= set(step)
    assert [one["direction"] for one in step["candidates"]] == list(lora.auto)
    for one in step["candidates"]:
        assert one["points"][0] == [0.0, step["loss_before"]]
        assert len(one["points"]) > 2
    assert set(data["metrics"]) == {"base", "head", "after"}
    assert all({"loss", "accuracy"} <= set(data["metrics"][stage]) for stage in data["metrics"])
    found = StepReport.from_json((world[0] / "out" / "onestep.json").read_text())
    assert found.steps == data["steps"] and found.metrics == data["metrics"]


def test_the_checksums_are_those_of_every_file(world: tuple[Path, OneStepTrainer]) -> None:
    out = world[0] / "out"
    report = read_whole(out)
    files = [f for f in saved_files(out) if f.name != "onestep.json"]
    assert report.files == {f.relative_to(out).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "search.png"} <= set(report.files)


def test_no_file_is_a_pickle_or_holds_a_path_or_a_secret(world: tuple[Path, OneStepTrainer]) -> None:
    root = world[0]
    forbidden = [str(root), str(Path.home()), os.getcwd(), SENTINEL, SECRET, TOKEN]
    for file in saved_files(root / "out"):
        assert file.suffix in (".json", ".safetensors", ".png", ".txt", ".jinja"), file
        assert not zipfile.is_zipfile(file), file  # what torch.save writes
        content = file.read_bytes()
        for text in forbidden:
            if len(text) > 5:  # "/root" and the like occur by chance
                assert text.encode() not in content, (file.name, text)
    assert getpass.getuser() not in (root / "out" / "onestep.json").read_text()


def test_a_base_elsewhere_is_saved_relative_to_where_peft_and_load_look_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "private" / "base"
    tiny_bert().bert.save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    monkeypatch.chdir(tmp_path.parent)
    trainer = trainer_for(tmp_path / "out", toy_rows(60, 1), model=str(base), direction="sgd", step_size=0.1)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    report = json.loads((tmp_path / "out" / "onestep.json").read_text())
    for written, start in ((config["base_model_name_or_path"], Path.cwd()), (report["base_model"], tmp_path / "out")):
        assert not Path(written).is_absolute()
        assert (start / written).resolve() == base.resolve()
    for file in saved_files(tmp_path / "out"):
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_trainers_checkpoints_hold_no_token(world: tuple[Path, OneStepTrainer]) -> None:
    root, trainer = world
    files = [f for f in (root / "out" / "checkpoint-1").rglob("*") if f.is_file()]
    assert "trainer_state.json" in {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        assert all(text.encode() not in content for text in (SECRET, TOKEN, SENTINEL)), file.name
    assert trainer.args.hub_token == TOKEN  # for whoever pushes later


def test_others_may_read_what_the_umask_lets_them(world: tuple[Path, OneStepTrainer]) -> None:
    umask = os.umask(0)
    os.umask(umask)
    modes = {file.stat().st_mode & 0o777 for file in saved_files(world[0] / "out")}
    assert modes == {0o666 & ~umask}


def test_the_picture_is_a_png(world: tuple[Path, OneStepTrainer]) -> None:
    from matplotlib.image import imread

    pixels = imread(world[0] / "out" / "search.png")
    assert (world[0] / "out" / "search.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert pixels.shape[0] > 200 and pixels.shape[1] > 200
    assert pixels.std() > 0.01  # not an empty sheet


def test_a_fresh_process_without_this_package_loads_the_adapter(world: tuple[Path, OneStepTrainer]) -> None:
    root, trainer = world
    batch = word_tokenizer()([row["text"] for row in toy_rows(5, 9)], padding=True, return_tensors="pt")
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).logits
    script = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
model = PeftModel.from_pretrained(base, "out").eval()
tokenizer = AutoTokenizer.from_pretrained("out")
batch = tokenizer(json.load(sys.stdin), padding=True, return_tensors="pt")
assert "onestep_peft" not in sys.modules
with torch.no_grad():
    print(json.dumps(model(**batch).logits.tolist()))
"""
    texts = json.dumps([row["text"] for row in toy_rows(5, 9)])
    done = subprocess.run([sys.executable, "-c", script], cwd=root, input=texts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_a_changed_or_missing_file_is_noticed(name: str, world: tuple[Path, OneStepTrainer], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in saved_files(world[0] / "out"):
        (copy / file.name).write_bytes(file.read_bytes())
    read_whole(copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} has changed.*Save or download"):
        load(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing.*Save or download"):
        load(copy)
    (copy / "onestep.json").unlink()
    with pytest.raises(ValueError, match=r"holds no onestep\.json"):
        load(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_report_that_names_a_file_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    report = StepReport(files={name: "0" * 64})
    (tmp_path / "onestep.json").write_text(report.to_json())
    with pytest.raises(ValueError, match="outside its folder"):
        read_whole(tmp_path)


def test_a_folder_with_another_run_is_refused_before_any_work(
    world: tuple[Path, OneStepTrainer], tmp_path: Path
) -> None:
    for taken in ("onestep.json", "adapter_config.json"):
        folder = tmp_path / taken
        folder.mkdir()
        (folder / taken).write_text("{}")
        trainer = trainer_for(folder, toy_rows(60, 1), direction="sgd", step_size=0.1)
        before = bits(trainer.model)
        with pytest.raises(ValueError, match=rf"holds another run \({taken}\).*another `output_dir`"):
            trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        assert (folder / taken).read_text() == "{}"


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="is a file.*another `output_dir`"):
        check_free(tmp_path / "out")
    # Through the trainer too, and before Trainer tries to make it a folder.
    with pytest.raises(ValueError, match="is a file.*another `output_dir`"):
        trainer_for(tmp_path / "out", toy_rows(60, 1), direction="sgd", step_size=0.1).train()


def test_the_same_trainer_may_train_and_save_again(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "out", toy_rows(60, 1), direction="sgd", step_size=0.1)
    for _ in range(2):
        trainer.train()
        trainer.save_model()
        read_whole(tmp_path / "out")


def test_a_crash_in_saving_leaves_no_report_and_no_staging_folder(tmp_path: Path) -> None:
    def crash(folder: Path) -> StepReport:
        (folder / "adapter_config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_whole(tmp_path / "out", crash)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_not_finite_is_still_json() -> None:
    report = StepReport(steps=[{"loss_before": float("nan"), "candidates": [[0.1, float("inf")]]}])
    data = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["steps"] == [{"loss_before": None, "candidates": [[0.1, None]]}]


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "not a report"), ("{", "not a report"), ('{"version": 2}', "version 2.*Upgrade")]
)
def test_a_text_that_is_no_report_says_so(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepReport.from_json(text)


def test_the_summary_of_a_step_without_held_out_rows_names_no_loss(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "out", toy_rows(60, 1), direction="sgd", step_size=0.1)
    trainer.train()
    trainer.save_model()
    for report in (trainer.report, read_whole(tmp_path / "out")):
        assert "held-out loss" not in report.summary()
        assert "step size 0.1" in report.summary()
    assert "search.png" not in read_whole(tmp_path / "out").files


def test_the_picture_of_a_step_at_a_fixed_size_and_of_a_refusal_is_drawn(tmp_path: Path) -> None:
    spoilt = [{**row, "label": 1 - row["label"]} for row in toy_rows(60, 5)]
    trainer = trainer_for(tmp_path, toy_rows(100, 1), search_dataset=spoilt, direction="sgd", step_size=50.0)
    trainer.train()
    assert not trainer.report.steps[0]["accepted"]
    assert trainer.report.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_run_whose_losses_are_all_infinite_is_drawn(tmp_path: Path) -> None:
    points = [[0.0, 0.5], [0.1, float("inf")], [0.04, float("nan")]]
    step = {
        "direction": "kfac", "step_size": 0.0, "candidates": [{"direction": "kfac", "points": points}],
        "loss_before": 0.5, "loss_after": 0.5, "accepted": False, "reason": "refused", "energy_lost": 0.0,
    }  # fmt: skip
    for report in (StepReport(steps=[step]), StepReport.from_json(StepReport(steps=[step]).to_json())):
        assert report.plot(tmp_path / "picture.png")


def test_the_head_and_labels_come_back(world: tuple[Path, OneStepTrainer]) -> None:
    root, trainer = world
    model, _ = load(root / "out")
    assert model.config.id2label == {0: "bad", 1: "good"}
    name = "base_model.model.classifier.modules_to_save.default.weight"
    assert torch.equal(model.state_dict()[name], trainer.model.state_dict()[name])
    fresh = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=2)
    assert not torch.equal(fresh.classifier.weight, model.state_dict()[name])


@pytest.mark.parametrize("decoder", [False, True])
def test_the_record_of_a_run_under_autocast_is_what_a_load_answers(decoder: bool, tmp_path: Path) -> None:
    body = tiny_llama().model if decoder else tiny_bert().bert
    body.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    trainer = trainer_for(
        tmp_path / "out", toy_rows(120, 1), model=str(tmp_path / "base"), bf16=True, fit_head=True,
        search_fraction=0.3,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    found = probe.compare(tmp_path / "out")
    assert found["difference"] <= found["tolerance"] == probe.TOLERANCE
    inputs = word_tokenizer()(["w1 w2 w50"], return_tensors="pt")
    with torch.no_grad():  # autocast is back
        logits = trainer.model.eval()(**inputs).logits
        exact = load(tmp_path / "out")[0](**inputs).logits
    assert not torch.allclose(logits, exact, rtol=1e-5)
