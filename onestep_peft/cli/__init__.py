"""The command `onestep`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from onestep_peft.cli import predict, push, train
from onestep_peft.errors import PushError, nearest
from onestep_peft.version import __version__

USAGE = """usage: onestep COMMAND ...

Adapt a pretrained model in one optimization step.

commands:
  train     adapt a model to a data set:  onestep train --model M --dataset D --output-dir OUT
  predict   classify texts:               onestep predict OUT "text" ...
  push      share it on the Hub:          onestep push OUT user/name

`onestep COMMAND --help` lists a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for what is refused, 1 for a push that did not arrive.

    Both are told on standard error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {"train": train.run, "predict": predict.run, "push": push.run}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"onestep-peft {__version__}")
        return 0
    if arguments[0] not in commands:
        return _fail(f"unknown command {arguments[0]!r}.{nearest(arguments[0], commands)}")
    try:
        commands[arguments[0]](arguments[1:])
    except ValueError as error:
        return _fail(str(error))
    except PushError as error:
        return _fail(str(error), 1)
    return 0


def _fail(message: str, status: int = 2) -> int:
    print(f"onestep: error: {message}", file=sys.stderr)
    return status
