"""One of two processes that make the same step under all arguments about processes; started by test_argument_steps.

Writes `found.json` into the folder: the fields, and the update's relative difference to that of the default.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import argument_values
from tests.conftest import relative_difference, toy_rows, trainer_for, updates

NAMES = (
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout",
    "eval_use_gather_object", "log_on_each_node", "save_on_each_node",
)  # fmt: skip
# What is left of `accelerator_config` where its refused keys are not given.
ACCELERATOR: dict[str, Any] = {
    "use_seedable_sampler": False,
    "non_blocking": True,
    "gradient_accumulation_kwargs": {"sync_each_batch": True, "sync_with_dataloader": False},
}


def update(folder: Path, **options: Any) -> torch.Tensor:
    trainer = trainer_for(
        folder, toy_rows(14, seed=1), eval_dataset=toy_rows(5, seed=2), search_dataset=toy_rows(7, seed=3),
        direction="kfac", step_size=0.05, fit_head=False, guard=False, per_device_train_batch_size=4,
        per_device_eval_batch_size=2, **options,
    )  # fmt: skip
    trainer.train()
    assert dist.get_world_size() == 2
    layers = updates(trainer.accelerator.unwrap_model(trainer.model))
    return torch.cat([layers[name].flatten() for name in sorted(layers)])


def main() -> None:
    options: dict[str, Any] = {"accelerator_config": ACCELERATOR}
    for name in NAMES:
        options |= argument_values.HARMLESS[name]
    folder = Path(tempfile.mkdtemp())
    default, other = update(folder / "default"), update(folder / "other", **options)
    if dist.get_rank() == 0:
        found = {"fields": list(options), "difference": relative_difference(other, default)}
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
