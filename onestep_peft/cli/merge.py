"""`onestep merge`: a LoRA adapter and its base as one plain model."""

from __future__ import annotations

from onestep_peft.cli.parsing import Parser, add_source_options, be_quiet, parse, require
from onestep_peft.merging import merge

ABOUT = """Makes one plain model of a LoRA adapter and its base, that loads without PEFT and without this package.

  onestep merge out whole
  onestep predict whole "some text"

A fresh process must get the adapter's answers from it, or nothing is written."""


def run(arguments: list[str]) -> None:
    """`onestep merge`."""
    parser = Parser("merge", ABOUT, "FOLDER OUT")
    parser.positional("folder", help="A LoRA that `onestep train` wrote, or a repository on the Hub.")
    parser.positional("out", help="A folder for the model, which is not there yet.")
    add_source_options(parser)
    parser.add_argument("--float32", action="store_true", help="Widen weights of 16 bits, so that nothing is rounded.")
    given = parse(parser, arguments)
    require(parser, given)
    be_quiet()

    folder, out = given.pop("folder"), given.pop("out")
    result = merge(folder, out, **given)
    print(f"Merged: {result.folder} ({result.dtype})")
    rounded = "" if result.dtype == "float32" else f"; weights in {result.dtype} round the sum"
    print(
        f"A fresh process gets the adapter's logits, to {result.difference:.1e} of their scale "
        f"({result.allowed:.0e} is allowed{rounded})."
    )
