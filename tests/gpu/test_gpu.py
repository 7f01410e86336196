"""On an accelerator: the pass, the step and whole runs, against the CPU in fp32."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from torch import Tensor

from onestep_peft import OneStepTrainer, head, load
from onestep_peft.prediction import predict
from onestep_peft.step import snapshot
from onestep_peft.step.snapshot import Snapshot
from onestep_peft.tasks import logits_for
from tests.architectures.models import save_base
from tests.conftest import assert_same_bits, bits, relative_difference, tiny_bert, toy_rows, trainer_for, word_tokenizer
from tests.gpu.device import CPU, device, environment_of_all_gpus, needs_device, number_of_gpus
from tests.processes.test_processes import launch
from tests.test_load import configurations, named_rows

pytestmark = needs_device

ROWS = toy_rows(96, seed=1)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_config": LoraConfig(r=8, lora_alpha=8)},
    "full": {"method": "full"},
    "prompt": {"peft_config": PromptTuningConfig(num_virtual_tokens=4)},
}
# A pass at a fixed step, so that nothing but the pass has a say in what it leaves.
FIXED: dict[str, Any] = {"step_size": 1e-3, "guard": False, "fit_head": False}
DIRECTION = {"lora": "kfac", "full": "kfac", "prompt": "natural"}


def run(folder: Path, where: torch.device, **options: Any) -> OneStepTrainer:
    """A whole run on a device; the same weights, adapter and rows every time."""
    model = options.pop("model", None) or tiny_bert()
    torch.manual_seed(7)  # PEFT draws A at random
    rows = options.pop("rows", ROWS)
    options = {"per_device_train_batch_size": 32, "use_cpu": where.type == "cpu", **options}
    trainer = trainer_for(folder, list(rows), model=model, **options)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == where.type
    return trainer


def passed(folder: Path, where: torch.device, method: str, **options: Any) -> dict[str, Tensor]:
    """What a pass leaves, by layer and kind, on the CPU."""
    options = {"direction": DIRECTION[method], **FIXED, **METHODS[method], **options}
    records = run(folder, where, **options).one_step.statistics
    kinds = ("gradient", "input_covariance", "output_grad_covariance")
    return {
        f"{name}, {kind}": getattr(record, kind).detach().cpu().float()
        for name, record in records.items()
        for kind in kinds
        if hasattr(record, kind) and not record.is_noise()
    }


def whole_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative difference of all of a kind together, the worst kind's."""
    kinds = {name.rpartition(", ")[2] for name in wanted}

    def joined(tensors: dict[str, Tensor], kind: str) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in wanted if name.endswith(kind)])

    return max(relative_difference(joined(found, kind), joined(wanted, kind)) for kind in kinds)


@pytest.mark.parametrize("method", METHODS)
def test_a_pass_in_fp32_leaves_what_it_leaves_on_the_cpu(method: str, tmp_path: Path) -> None:
    wanted, found = (passed(tmp_path / where.type / name, where, method) for name, where in _cpu_and_device())
    assert found.keys() == wanted.keys() and wanted
    worst = max((relative_difference(found[name], wanted[name]), name) for name in wanted)
    assert worst[0] < 1e-4, worst


@pytest.mark.parametrize("method", METHODS)
def test_a_pass_in_bf16_is_as_exact_as_bf16(method: str, tmp_path: Path) -> None:
    wanted = passed(tmp_path / "wanted", CPU, method)
    found = passed(tmp_path / "found", device(), method, bf16=True)
    # Eight bits a factor: 0.4 % each, over the products of a few layers.
    difference = whole_difference(found, {name: wanted[name] for name in wanted.keys() & found.keys()})
    assert 1e-5 < difference < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_activation_checkpointing_leaves_the_same(method: str, precision: str, tmp_path: Path) -> None:
    options = {"bf16": precision == "bf16"}
    wanted = passed(tmp_path / "wanted", device(), method, **options)
    found = passed(tmp_path / "found", device(), method, gradient_checkpointing=True, **options)
    assert found.keys() == wanted.keys()
    assert whole_difference(found, wanted) < (1e-5 if precision == "fp32" else 1e-2)


def test_a_plain_step_is_that_of_torch(tmp_path: Path) -> None:
    trainer = run(tmp_path, device(), method="full", direction="sgd", step_size=0.1)
    model = tiny_bert().to(device()).eval()
    batch = word_tokenizer()([row["text"] for row in ROWS], padding=True, return_tensors="pt").to(device())
    labels = torch.tensor([row["label"] for row in ROWS], device=device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
    optimizer.step()
    wanted = dict(model.named_parameters())
    for name, found in trainer.model.named_parameters():
        assert torch.allclose(found, wanted[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_run_comes_back_on_the_cpu(method: str, precision: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", configurations()["bert"])
    trainer = run(
        tmp_path / "out", device(), model=str(base), rows=named_rows(160, 1), bf16=precision == "bf16",
        eval_dataset=named_rows(60, 2), **METHODS[method],
    )  # fmt: skip
    report = trainer.report
    assert report.steps[0]["candidates"] and report.metrics["after"] and report.peak_memory_bytes > 0
    trainer.save_model()
    model, tokenizer = load(tmp_path / "out")
    batch = tokenizer(["w1 w2 w50", "w9 w12 w60"], padding=True, return_tensors="pt")
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without autocast
    with torch.no_grad():
        wanted = logits_for(trained, dict(batch.to(device()))).cpu()
        found = logits_for(model, dict(batch.to(CPU)))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_held_out_rows_lie_on_the_device_and_a_refused_step_leaves_the_old_bits(tmp_path: Path) -> None:
    model = tiny_bert()
    before = bits(model)
    trainer = run(
        tmp_path, device(), model=model, method="full", direction="kfac", step_size=1e3, search_fraction=0.3,
        fit_head=False,
    )  # fmt: skip
    assert not trainer.report.steps[0]["accepted"]
    assert_same_bits(trainer.model.cpu(), before)
    trainer.model.to(device())
    assert trainer.held_out is not None
    assert {value.device.type for batch in trainer.held_out.batches for value in batch.values()} == {device().type}
    losses = trainer.held_out.losses(trainer.model)
    assert losses.device == CPU and float(losses.mean()) == pytest.approx(trainer.report.steps[0]["loss_before"])


@pytest.mark.parametrize("large", [False, True])
def test_a_snapshot_brings_the_bits_back_from_either_memory(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "LARGE", 0 if large else 2**30)
    model = tiny_bert().to(device(), torch.bfloat16)
    before, held = bits(model), Snapshot(model.parameters())
    assert {held.of(p).device.type for p in model.parameters()} == {"cpu" if large else device().type}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    held.restore()
    assert_same_bits(model, before)


@pytest.mark.parametrize("small", [0, head.SMALL])
def test_a_head_is_the_same_wherever_it_is_fitted_and_lies_with_its_items(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "SMALL", small)
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(90, 8, generator=draw), torch.randint(3, (90,), generator=draw)
    found = {}
    for name, where in _cpu_and_device():
        items, held = (x[:60].to(where), labels[:60].to(where)), (x[60:].to(where), labels[60:].to(where))
        whole = head.fit(*items, held_out=held, outputs=3, bias=True)
        some = head.refit(items[0][:40], items[1][:40], whole)
        assert whole.weight.device.type == some.weight.device.type == where.type
        found[name] = torch.cat([whole.weight, some.weight]).cpu()
    assert torch.allclose(found["found"], found["wanted"], rtol=1e-5, atol=1e-6)


def test_a_model_that_predicts_stays_where_it_is() -> None:
    for where in (CPU, device()):
        model = tiny_bert().eval().to(where)
        assert len(list(predict(model, word_tokenizer(), ["w1 w2", "w3"]))) == 2
        assert next(model.parameters()).device.type == where.type


def test_two_processes_make_the_update_of_one(tmp_path: Path) -> None:
    on_cpu = device() == CPU
    if not on_cpu and number_of_gpus() < 2:
        pytest.skip("needs two GPUs")
    kinds = ["lora, kfac", "full, plain", "prompt, rows kept"]
    environment = dict(os.environ) if on_cpu else environment_of_all_gpus()
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        one = {} if on_cpu or number > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
        launch(tmp_path / str(number), number, *kinds, cpu=on_cpu, environment={**environment, **one})
    for kind in kinds:
        report = json.loads((tmp_path / "2" / f"{kind}.json").read_text())
        assert report["processes"] == 2
        wanted, found = (load_file(tmp_path / number / f"{kind}.safetensors") for number in ("1", "2"))
        for parameter, value in wanted.items():
            if "lora_A" not in parameter and "lora_B" not in parameter:  # their products are compared on the CPU
                assert torch.allclose(found[parameter], value, rtol=1e-3, atol=1e-5), (kind, parameter)


def _cpu_and_device() -> list[tuple[str, torch.device]]:
    return [("wanted", CPU), ("found", device())]
