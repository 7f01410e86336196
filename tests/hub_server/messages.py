"""Requests, answers, errors, and the table of routes that connects them to the functions in `routes/`."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode

if TYPE_CHECKING:
    from .server import HubServer

REPO_TYPES = ("model", "dataset", "space")


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """A refusal, in the headers that `huggingface_hub.utils._http.hf_raise_for_status` turns into exceptions.

    `code` is X-Error-Code: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo, or nothing.
    """

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}

    def response(self) -> Response:
        one_line = self.message.replace("\n", " ").encode("ascii", "replace").decode()
        headers = {"X-Error-Message": one_line, **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return json_response({"error": self.message}, self.status, headers)


@dataclass
class Request:
    method: str
    path: str  # still percent-encoded: the revision refs%2Fpr%2F1 is one segment
    query: str
    headers: Message
    body: bytes
    hub: "HubServer"
    args: dict[str, str] = field(default_factory=dict)  # what the route's pattern captured, decoded

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error

    def param(self, name: str, default: str = "") -> str:
        return self.params(name, default)[0]

    def params(self, name: str, *default: str) -> list[str]:
        return parse_qs(self.query).get(name) or list(default)

    def flag(self, name: str) -> bool:
        return self.param(name).lower() in ("1", "true")

    @property
    def bearer(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def repo_type(self) -> str:
        return (self.args.get("type") or self.args.get("prefix") or "models").strip("/")[:-1]


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


def ranged_response(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """`data`, or the part of it that a Range header names: resumed downloads and HfFileSystem ask for parts."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not wanted:
        return Response(200, data, headers)
    start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
    if start >= stop:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Response(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def paged_response(request: Request, items: list[Any]) -> Response:
    """One page of `items`, and a Link to the next as `huggingface_hub.utils._pagination` follows it."""
    start = int(request.param("cursor", "0"))
    stop = start + min(int(request.param("limit", "1000")), request.hub.page_size)
    headers: dict[str, str] = {}
    if stop < len(items):
        following = urlencode({**parse_qs(request.query), "cursor": stop}, doseq=True)
        headers["Link"] = f'<{request.hub.endpoint}{request.path}?{following}>; rel="next"'
    return json_response(items[start:stop], headers=headers)


Handler = Callable[[Request], Response]
_ROUTES: list[tuple[str, re.Pattern[str], str, Handler]] = []
_PIECES = {
    "type": "models|datasets|spaces",
    "prefix": "(?:datasets/|spaces/)?",
    "repo": r"[\w.-]+(?:/[\w.-]+)?",
    "rev": "refs/(?:pr|convert)/[^/]+|[^/]+",
    "path": ".+",
    "num": r"\d+",
    "oid": "[0-9a-f]{64}",
    "name": "[^/]+",
}


def route(method: str, pattern: str, step: str) -> Callable[[Handler], Handler]:
    """Registers a handler; `step` is the stable name under which requests are logged and faults are aimed."""
    regex = re.sub(r"{(\w+)}", lambda piece: f"(?P<{piece[1]}>{_PIECES[piece[1]]})", pattern.replace(".", r"\."))

    def register(handler: Handler) -> Handler:
        _ROUTES.append((method, re.compile(regex), step, handler))
        # Longest first, or /api/models/{repo} would take /api/models/gpt2/refs for a repository named gpt2/refs.
        _ROUTES.sort(key=lambda entry: -len(entry[1].pattern))
        return handler

    return register


def find_route(method: str, path: str) -> tuple[str, Handler, dict[str, str]] | None:
    """(step, handler, captured arguments) for a request; a HEAD is answered by its GET."""
    for known_method, pattern, step, handler in _ROUTES:
        match = pattern.fullmatch(path) if known_method == method.replace("HEAD", "GET") else None
        if match:
            step = f"{step}_head" if method == "HEAD" else step
            return step, handler, {name: unquote(value) for name, value in match.groupdict().items()}
    return None
