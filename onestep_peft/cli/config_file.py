"""`--config FILE`: the options of a command in YAML, typed as they are on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from onestep_peft.cli.parsing import Parser, parse
from onestep_peft.errors import nearest

NULL = "tag:yaml.org,2002:null"


def read(file: Path, parser: Parser) -> dict[str, Any]:
    """The options that a file gives, by name.

    Keys are the options of `parser`, with `-` or `_`. Scalars are taken as they are written and go through the
    command line's own parser, so that `no`, `1e-3` or `0x10` mean the same in both; a key without a value counts as
    not given.

    Raises:
        ValueError: No such file, no YAML, no mapping, an unknown key, one that is given twice, or a value that is
            none of its kind.
    """
    words: dict[str, list[str]] = {}
    known = {action.dest for action in parser.options} - {"config"}
    for key, node in _entries(file):
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(
                f"{file}: unknown key {key!r}.{nearest(name, known)} Keys are the options of "
                f"`onestep {parser.command}`."
            )
        if name in words:
            raise ValueError(f"{file}: the key {key!r} is given twice. Leave one of the two out.")
        words[name] = _words(name, node, file)
    try:
        return parse(parser, [word for value in words.values() for word in value])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _entries(file: Path) -> list[tuple[str, yaml.Node]]:
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"`--config {file}` cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise ValueError(f"{file} holds no options. Write one a line, such as `damping: 0.1`.")
    return [(key.value, value) for key, value in root.value]


def _words(name: str, node: yaml.Node, file: Path) -> list[str]:
    """What one would have typed."""
    if isinstance(node, yaml.ScalarNode):
        return [] if node.tag == NULL else [f"--{name}={node.value}"]
    if isinstance(node, yaml.MappingNode):  # such as lr_scheduler_kwargs: JSON on the command line
        return [f"--{name}={json.dumps(yaml.SafeLoader('').construct_document(node), default=str)}"]
    if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        raise ValueError(f"{file}: the list {name!r} holds more than words and numbers. Write one value an item.")
    return [f"--{name}", *(item.value for item in node.value)] if node.value else []
