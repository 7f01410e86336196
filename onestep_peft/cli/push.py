"""`onestep push`: share a saved folder on the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field

from onestep_peft.cli.parsing import be_quiet, build, parse
from onestep_peft.hub import push as hub


@dataclass
class PushOptions:
    """What `onestep push` takes beside the folder and the repository."""

    private: bool = field(default=False, metadata={"help": "Make a new repository private; never use a public one."})
    revision: str | None = field(default=None, metadata={"help": "The branch (default: main); made if need be."})
    create_pr: bool = field(default=False, metadata={"help": "Propose the commit as a pull request."})
    tag: str | None = field(default=None, metadata={"help": "A tag for the commit."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of a base that was a folder here."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, send nothing."})


def run(arguments: list[str]) -> None:
    """`onestep push`."""
    # Flags last, or the parser would take the word after one for its value.
    flags = ("--private", "--create-pr", "--create_pr", "--dry-run", "--dry_run")
    arguments = sorted(arguments, key=lambda word: word in flags)
    given = parse("push", [PushOptions], arguments, positional={"folder": None, "repo": None})
    options: PushOptions = build(PushOptions, given)
    be_quiet()

    said = {**vars(options), "private": options.private or None}
    result = hub.push(given["folder"], given["repo"], **said)
    for name, size in result.files.items():
        print(f"{size:>12,}  {name}")
    print(f"A fresh process gets the trained model's logits, to {result.difference:.1e} of their scale.")
    if options.dry_run:
        print(f"Nothing was sent. Without --dry-run, the above goes to {result.url} ({result.revision}).")
    else:
        print(f"Pushed: {result.url}" + (f" (tag {result.tag})" if result.tag else ""))
