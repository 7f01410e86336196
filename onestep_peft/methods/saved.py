"""Which modules an adapter saves whole, beside its own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# PEFT itself adds these to `modules_to_save` of a classifier.
SAVED_BY_PEFT = {"classifier", "score"}


def modules_to_save(config: Any, head: Sequence[str]) -> list[str] | None:
    """What the user's configuration names, and the head; None where PEFT adds all of it by itself.

    Args:
        head: Names of modules that no checkpoint filled.
    """
    return sorted({*(config.modules_to_save or ()), *head} - SAVED_BY_PEFT) or None
