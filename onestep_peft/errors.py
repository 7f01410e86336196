"""Help for messages that name a value, the reason and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing where nothing is near."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def without_secrets(text: str) -> str:
    """A message for a screen or a log, without tokens, and without what stands before the host in an address."""
    return re.sub(r"\bhf_\w{8,}", "hf_...", re.sub(r"(\w://)[^/\s@]+@", r"\1", text))


class PushError(RuntimeError):
    """A push that the network, the Hub or somebody else's commit kept from arriving."""
