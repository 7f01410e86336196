"""The command `onestep`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import torch

from onestep_peft.cli import evaluate, merge, predict, push, train
from onestep_peft.errors import PushError, nearest, without_secrets
from onestep_peft.version import __version__

USAGE = """usage: onestep COMMAND ...

Adapt a pretrained model in one optimization step.

commands:
  train     adapt a model to a data set:     onestep train --model M --dataset D --output-dir OUT
  predict   use it on texts:                 onestep predict OUT "text" ...
  evaluate  how good it is on other rows:    onestep evaluate OUT --dataset D
  merge     make a plain model of a LoRA:    onestep merge OUT WHOLE
  push      share it on the Hub:             onestep push OUT user/name

`onestep COMMAND --help` lists a command's options.
"""
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train.run,
    "predict": predict.run,
    "evaluate": evaluate.run,
    "merge": merge.run,
    "push": push.run,
}
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Its exit status: 0; 2 where what was asked is refused; 1 where it failed on the way (the network, a full disk,
        not enough memory); 130 after Ctrl-C. All but the first are told on standard error, in a line.
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except ValueError as error:
        return _fail(str(error), REFUSED)
    except PushError as error:
        return _fail(str(error), FAILED)
    except BrokenPipeError:  # whoever read the output has enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _fail(f"{type(error).__name__}: {error}", FAILED)
    except torch.OutOfMemoryError as error:
        said = str(error).strip().splitlines()[0]
        return _fail(f"out of memory ({said}) Try smaller batches (`--help` names the option).", FAILED)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {str(error) or 'no result was saved'}", INTERRUPTED, kind="")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return DONE if arguments else REFUSED
    if arguments[0] == "--version":
        print(f"onestep-peft {__version__}")
        return DONE
    if arguments[0] not in COMMANDS:
        raise ValueError(f"unknown command {arguments[0]!r}.{nearest(arguments[0], COMMANDS)}")
    COMMANDS[arguments[0]](arguments[1:])
    return DONE


def _fail(message: str, status: int, kind: str = "error: ") -> int:
    print(f"onestep: {kind}{without_secrets(message)}", file=sys.stderr)
    return status
