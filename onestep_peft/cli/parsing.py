"""Words in the shell to typed options, errors instead of exits, help that a newcomer can read; and a quiet screen."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import datasets
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

from onestep_peft.errors import nearest

HELP_COLUMN = 34
WIDTH = 110
ALLOW_PICKLE = "Read the base's weights even from a pickle (pytorch_model.bin)."
METAVARS: dict[Any, str] = {int: "N", float: "X", string_to_bool: "true|false"}


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling a name (`--lora-r`, though `--lora_r` is understood too), and short words for values."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "_" not in name]
        if not names or action.nargs == 0:
            return ", ".join(names) or super()._format_action_invocation(action)
        value = f"[{_metavar(action)}]" if action.nargs == "?" else self._format_args(action, _metavar(action))
        return f"{', '.join(names)} {value}"


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or METAVARS.get(action.type, action.dest.split("_")[-1].upper()))


class Parser(HfArgumentParser):
    """The parser of one command. It raises where argparse would end the process.

    Args:
        command: Its name.
        about: What it does, for `--help`.
        words: What comes without an option, for the usage line.
        kinds: Dataclasses whose fields are options. Their defaults stay with them: `parse` returns what was given.
        epilog: What `--help` ends with.
    """

    def __init__(
        self, command: str, about: str, words: str = "", *, kinds: Sequence[Any] = (), epilog: str | None = None
    ) -> None:
        usage = " ".join(filter(None, ["onestep", command, words, "[options]"]))
        super().__init__(
            kinds, prog=f"onestep {command}", usage=usage, description=about, epilog=epilog, add_help=False,
            allow_abbrev=False, formatter_class=_Help,
        )  # fmt: skip
        self.command = command
        self.hidden: argparse._ArgumentGroup | None = None
        self.required = [action.dest for action in self._actions if action.required]
        for action in self._actions:
            action.required = False
            action.help = _with_default(action)
            action.default = argparse.SUPPRESS
        self.add_argument("-h", "--help", action=_HelpAction, nargs=0, default=argparse.SUPPRESS, help="Show this.")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def positional(self, name: str, nargs: str | None = None, **options: Any) -> None:
        """Adds a word without an option; one without `nargs` must be given."""
        self.add_argument(name, nargs=nargs or "?", **options)
        if nargs is None:
            self.required.append(name)

    @property
    def options(self) -> list[argparse.Action]:
        """All options but help."""
        return [action for action in self._actions if action.option_strings and action.dest not in ("help", "help_all")]

    def arrange(self, groups: Mapping[str, Iterable[str]], rest: str) -> None:
        """Sorts the options into titled groups; `--help` shows these, and `--help-all` the rest too.

        Args:
            groups: Title -> names of options, in the order in which they are shown.
            rest: Title of the group that holds all others.
        """
        self.add_argument(
            "--help-all", action=_HelpAction, nargs=0, default=argparse.SUPPRESS, help="Show every option."
        )
        left = dict.fromkeys(self._optionals._group_actions)
        for title, names in {"help": ("help", "help_all"), **groups}.items():
            members = [action for name in names for action in left if action.dest == name]
            self.add_argument_group(title)._group_actions += members
            left = dict.fromkeys(action for action in left if action not in members)
        self._optionals._group_actions = []
        self.hidden = self.add_argument_group(rest)
        self.hidden._group_actions += left


class _HelpAction(argparse.Action):
    """Prints the help and ends the process; only `--help-all` shows the hidden group."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        hidden = getattr(parser, "hidden", None)
        if hidden is not None and self.dest == "help":
            parser._action_groups.remove(hidden)
        parser.print_help()
        parser.exit()


def _with_default(action: argparse.Action) -> str | None:
    if action.option_strings[0].startswith("--no_"):  # beside `--x false`
        return argparse.SUPPRESS
    value = action.default
    said = not action.help or "default" in action.help.lower()
    if said or value in (None, "", [], argparse.SUPPRESS) or callable(value):
        return action.help
    value = str(value).lower() if isinstance(value, bool) else getattr(value, "value", value)
    return f"{action.help} (default: {value})".replace("%", "%%")


def parse(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """The options that were given, by name, and the defaults of those that `add_argument` added.

    Raises:
        ValueError: An unknown option, or a value that is none of its kind.
    """
    namespace, rest = parser.parse_known_intermixed_args(list(words))
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        near = nearest(rest[0].split("=")[0], known)
        raise ValueError(f"unknown option {rest[0]!r} of `onestep {parser.command}`.{near}")
    return vars(namespace)


def require(parser: Parser, given: Mapping[str, Any]) -> None:
    """Raises a ValueError for a word or an option that must be given and is not."""
    options = {action.dest for action in parser.options}
    for name in parser.required:
        if given.get(name) is None:
            option = f"--{name.replace('_', '-')}" if name in options else name.upper()
            raise ValueError(f"`onestep {parser.command}` needs {option}. See `onestep {parser.command} --help`.")


def build(kind: Any, given: Mapping[str, Any]) -> Any:
    """A dataclass from those of the given options that are its fields."""
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    return kind(**{name: value for name, value in given.items() if name in names})


def add_source_options(parser: Parser) -> None:
    """Options of every command that loads a folder or repository."""
    parser.add_argument("--revision", help="Branch, tag or commit of a repository.")
    parser.add_argument("--base-model", "--base_model", help="The base, where it has moved.")
    parser.add_argument("--allow-pickle", "--allow_pickle", action="store_true", help=ALLOW_PICKLE)


def be_quiet() -> None:
    """Leaves the screen to what this command says: bars of single files and reports of expected gaps are noise."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
