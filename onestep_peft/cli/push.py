"""`onestep push`: share a saved folder on the Hub."""

from __future__ import annotations

from onestep_peft.cli.parsing import ALLOW_PICKLE, Parser, be_quiet, parse, require
from onestep_peft.hub import push as hub

ABOUT = """Shares a folder that `onestep train` wrote on the Hugging Face Hub, in one commit and with a model card.

  onestep push out user/name

Log in first with `hf auth login`. A fresh process must get the trained model's answers, or nothing is sent."""


def _parser() -> Parser:
    parser = Parser("push", ABOUT, "FOLDER REPO")
    parser.positional("folder", help="A folder that `onestep train` or `onestep merge` wrote.")
    parser.positional("repo", help="Where to: user/name.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private; never use a public one.")
    parser.add_argument("--revision", help="The branch (default: main); made if need be.")
    parser.add_argument("--create-pr", "--create_pr", action="store_true", help="Propose it as a pull request.")
    parser.add_argument("--tag", help="A tag for the commit.")
    parser.add_argument("--base-model", "--base_model", help="Hub id of a base that was a folder here.")
    parser.add_argument("--allow-pickle", "--allow_pickle", action="store_true", help=ALLOW_PICKLE)
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="Check everything, send nothing.")
    return parser


def run(arguments: list[str]) -> None:
    """`onestep push`."""
    parser = _parser()
    given = parse(parser, arguments)
    require(parser, given)
    be_quiet()

    folder, repo = given.pop("folder"), given.pop("repo")
    result = hub.push(folder, repo, **{**given, "private": given["private"] or None})
    for name, size in result.files.items():
        print(f"{size:>12,}  {name}")
    print(f"A fresh process gets the trained model's logits, to {result.difference:.1e} of their scale.")
    if given["dry_run"]:
        print(f"Nothing was sent. Without --dry-run, the above goes to {result.url} ({result.revision}).")
    else:
        done = "Pushed" if result.new else f"Nothing to push: {result.revision} holds these files already"
        print(f"{done}: {result.url}" + (f" (tag {result.tag})" if result.tag else ""))
