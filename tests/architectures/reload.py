"""Loads saved folders in a process of its own and writes down what their models answer.

python -m tests.architectures.reload OUTPUT FOLDER ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestep_peft import load
from onestep_peft.tasks import logits_for

INPUTS = "inputs.safetensors"


@torch.no_grad()
def answers(model: Any, folder: Path) -> Tensor:
    """Logits for the inputs that lie beside a folder, in fp32."""
    return logits_for(model.eval(), load_file(folder.parent / INPUTS)).float().contiguous()


def main() -> None:
    torch.set_num_threads(1)
    folders = [Path(word) for word in sys.argv[2:]]
    save_file({str(folder): answers(load(folder)[0], folder) for folder in folders}, sys.argv[1])


if __name__ == "__main__":
    main()
