"""Words in the shell to typed options; and a quiet screen."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import datasets
from transformers import HfArgumentParser
from transformers.utils import logging

from onestep_peft.errors import nearest


def parse(
    command: str, kinds: list[Any], arguments: list[str], positional: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """The options that were given, and only those, so that defaults stay where they are declared.

    Args:
        positional: Words without an option: name -> how many, as argparse's `nargs`.

    Raises:
        ValueError: An unknown option, or a required one that is missing.
    """
    words = [f"{name.upper()}{' ...' if nargs else ''}" for name, nargs in (positional or {}).items()]
    usage = " ".join(["onestep", command, *words, "[options]"])
    parser = HfArgumentParser(kinds, prog=f"onestep {command}", usage=usage, allow_abbrev=False)
    for name, nargs in (positional or {}).items():
        parser.add_argument(name, nargs=nargs)
    required = [action.dest for action in parser._actions if action.required]
    for action in parser._actions:
        action.required = False
        if action.dest != "help":
            action.default = argparse.SUPPRESS
        if action.dest in ("step_size", "fit_head"):  # "search" and "auto" stand beside numbers and flags
            action.type = str
    parser.exit_on_error = False
    try:
        namespace, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"unknown option {rest[0]!r} of `onestep {command}`.{nearest(rest[0].split('=')[0], known)}")
    for name in required:
        if name not in namespace:
            option = name.upper() if name in (positional or {}) else f"--{name.replace('_', '-')}"
            raise ValueError(f"`onestep {command}` needs {option}. See `onestep {command} --help`.")
    return vars(namespace)


def build(kind: Any, given: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    return kind(**{name: value for name, value in given.items() if name in names})


def be_quiet() -> None:
    """Leaves the screen to what this command says: bars of single files and reports of expected gaps are noise."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
