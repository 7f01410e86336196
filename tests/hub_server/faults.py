"""Faults to order: which request goes wrong, how, and how many times."""

import re
import threading
from dataclasses import dataclass
from fnmatch import fnmatch

KINDS = {
    "status": "status:503 answers with that status instead of doing anything",
    "slow": "slow:0.5 waits that many seconds, then goes on as usual",
    "cut": "closes the connection before doing anything",
    "cut-body": "does its work, then closes the connection in the middle of the answer",
    "cut-after": "does its work, then closes the connection without an answer",
    "crash": "goes down before doing anything, until `HubServer.revive()`",
    "crash-after": "does its work and answers, and is down for whatever comes next, until `HubServer.revive()`",
}


@dataclass
class Fault:
    """Spoils requests whose step name matches `step` and whose path matches `path` (both as in `fnmatch`).

    Each route in `routes/` names its step, a HEAD request's ends in `_head`. `kind` is one of `KINDS`;
    `skip` matching requests pass before it acts, and it acts `times` times.
    """

    step: str
    kind: str
    times: int = 1
    skip: int = 0
    path: str = "*"

    def __post_init__(self) -> None:
        pattern = r"status:\d{3}|slow:\d+(\.\d+)?|" + "|".join(KINDS.keys() - {"status", "slow"})
        if not re.fullmatch(pattern, self.kind):
            raise ValueError(f"Unknown kind of fault {self.kind!r}. Use one of: {'; '.join(KINDS.values())}.")

    @property
    def name(self) -> str:
        return self.kind.partition(":")[0]

    @property
    def value(self) -> float:
        return float(self.kind.partition(":")[2] or 0)


class Faults:
    """The faults still to come; the test's thread adds, the server's threads take."""

    def __init__(self) -> None:
        self._pending: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._pending.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()

    def take(self, step: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._pending:
                if fault.times and fnmatch(step, fault.step) and fnmatch(path, fault.path):
                    if not fault.skip:
                        fault.times -= 1
                        return fault
                    fault.skip -= 1
            return None
