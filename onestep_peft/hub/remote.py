"""Calls to the Hub: which failures are worth another try, and what to tell about the others."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
)

from onestep_peft.errors import PushError, without_secrets

logger = logging.getLogger("onestep_peft")
T = TypeVar("T")

# The client itself waits up to half a minute for some requests and not at all for others; this is on top of both.
WAITS_S = (1.0, 4.0)
FIXES = {
    400: "See what it refuses, and change that.",
    401: "Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
    403: "Use a token that may write there, push under a name of your own, or propose it with `create_pr=True` "
    "(`--create-pr`).",
    404: "Check the name, and that your token may see it.",
}


class StaleParentError(PushError):
    """The branch has moved on since its head was read (HTTP 412)."""


@dataclass
class Journal:
    """What a push has done so far, for the message if it fails, and what it met on the way."""

    repo_id: str
    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Something that the user should see although the push goes on."""
        self.notes.append(text)
        logger.warning(text)


def client(token: str | None) -> HfApi:
    """The Hub's client. Like a token of the environment, one that was read from a file may end in a line break."""
    return HfApi(token=token.strip() if isinstance(token, str) else token)


@contextlib.contextmanager
def interruptible(journal: Journal) -> Iterator[None]:
    """Tells, after Ctrl-C, what was sent until then."""
    try:
        yield
    except KeyboardInterrupt as error:
        sent = f"sent before that: {', '.join(journal.done)}" if journal.done else "nothing was sent for certain"
        raise KeyboardInterrupt(
            f"pushing to {journal.repo_id!r}, {sent}. The branch holds the old files, or all of the new ones. Push "
            "again, which does no harm."
        ) from error


def attempt(what: str, call: Callable[[], T], journal: Journal, *, twice_is_safe: bool = True) -> T:
    """What the call returns, tried again after faults that pass.

    Args:
        twice_is_safe: Whether the call may be repeated where its answer was lost, so that it may have worked.

    Raises:
        ValueError: The Hub refuses it: a name, a token, a file.
        PushError: The network or the Hub failed again and again.
        StaleParentError: The branch has moved on.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return call()
        except Exception as error:
            if status(error) == 412:
                raise StaleParentError(
                    f"Pushing to {journal.repo_id!r}: {what} came too late, the branch has moved on. Push again."
                ) from error
            if not _comes_from_outside(error):
                raise
            again = is_transient(error) and (twice_is_safe or status(error) is not None)
            if not again or tries > len(WAITS_S):
                raise told(error, what, journal, tries) from error
            logger.warning("%s failed (%s). Another try in %g s.", what, reason(error), WAITS_S[tries - 1])
            time.sleep(WAITS_S[tries - 1])


def status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, None where there was no (whole) answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well work a little later."""
    code = status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    return not isinstance(error, HFValidationError | LocalTokenNotFoundError) and (
        # The client reads an answer before it looks at its status: an empty 503 is a JSONDecodeError.
        isinstance(error, json.JSONDecodeError) or not isinstance(error, ValueError)
    )


def _comes_from_outside(error: BaseException) -> bool:
    """Whether it is the Hub's, the network's or the client's error; what is none of these is a bug, and stays as is."""
    kinds = (HfHubHTTPError, OSError, ValueError, RuntimeError)
    # huggingface_hub has changed from requests to httpx to httpx2, and lets their errors through.
    return isinstance(error, kinds) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "hf_xet")


def told(error: BaseException, what: str, journal: Journal, tries: int = 1) -> ValueError | PushError:
    """The error as onestep tells it: what, why, what was sent before, and what to do."""
    sent = f"Sent before that: {', '.join(journal.done)}." if journal.done else "Nothing was sent before that."
    if is_transient(error):
        number = "" if tries == 1 else f" {tries} times"
        return PushError(
            f"Pushing to {journal.repo_id!r}: {what} failed{number} ({reason(error)}). {sent} The folder here is as "
            "it was. Push again when the network and the Hub are well; what has arrived is not sent twice."
        )
    if isinstance(error, LocalTokenNotFoundError):
        return ValueError(f"Pushing to {journal.repo_id!r}: there is no token. {FIXES[401]}")
    fix = FIXES.get(status(error) or 400, FIXES[400])
    return ValueError(f"Pushing to {journal.repo_id!r}: {what} was refused ({reason(error)}). {sent} {fix}")


def reason(error: BaseException) -> str:
    """The error in one line, without the request's address book of links."""
    code, said = status(error), getattr(error, "server_message", None)
    if code is not None:
        return f"HTTP {code}: {_line(said or str(error))}"
    # The client wraps what went wrong in general words: "Error while uploading", "cannot find the requested files".
    wrapped = error.__cause__ or error.__context__
    if wrapped is not None and isinstance(error, LocalEntryNotFoundError):
        return reason(wrapped)
    because = f" ({reason(wrapped)})" if wrapped is not None and type(error) is RuntimeError else ""
    return f"{type(error).__name__}: {_line(str(error))}{because}"


def _line(text: str) -> str:
    return without_secrets(" ".join(text.split())).partition(" For more information check:")[0][:300]


def files_at(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """What a commit holds: path -> sha256 of a large file, git's id of another."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {
        entry.path: entry.lfs.sha256 if getattr(entry, "lfs", None) else entry.blob_id  # type: ignore[union-attr]
        for entry in entries
        if hasattr(entry, "blob_id")
    }
