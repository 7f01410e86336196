"""Where the tests of this folder run: on an accelerator, or by a switch on the CPU, to prove the tests themselves.

pytest tests/gpu                              # skipped without an accelerator
ONESTEP_TEST_DEVICE=cpu pytest tests/gpu      # the same bodies on the CPU
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SWITCH = "ONESTEP_TEST_DEVICE"
CPU = torch.device("cpu")


def _device() -> torch.device | None:
    """The device under test, or None where there is nothing to test."""
    if os.environ.get(SWITCH) == "cpu":
        return CPU
    return torch.device("cuda") if torch.cuda.is_available() else None


DEVICE = _device()
needs_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason=f"no accelerator here; {SWITCH}=cpu runs the same bodies on the CPU"),
]


def device() -> torch.device:
    """The device under test."""
    assert DEVICE is not None
    return DEVICE


def environment_of_all_gpus() -> dict[str, str]:
    """The environment without the limit to one GPU that `tests.conftest` sets for the tests' own process."""
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}


def number_of_gpus() -> int:
    """How many there are, counted by a process of its own: this one sees the first."""
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", count], env=environment_of_all_gpus(), capture_output=True, text=True)
    return int(done.stdout)
