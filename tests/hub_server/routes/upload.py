"""The first and the last step of every upload: preupload and commit. Client: `huggingface_hub._commit_api`."""

import base64
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from ..auth import writable_repo
from ..card import validate_card
from ..messages import HubError, Request, Response, json_response, route
from ..store import Commit, File, Store
from .discussions import open_pull_request
from .repos import GITATTRIBUTES

REGULAR_LIMIT = 10 << 20


@route("POST", "/api/{type}/{repo}/preupload/{rev}", "preupload")
def preupload(request: Request) -> Response:
    repo, _ = writable_repo(request)
    commit, body = repo.commit(request.args["rev"]), request.json()
    ignored = body.get("gitIgnore") or _text(request.hub.store, commit.files, ".gitignore")
    answers = []
    for file in body["files"]:
        path, known = file["path"], commit.files.get(file["path"])
        lfs = wants_lfs(request.hub.store, commit.files, path, base64.b64decode(file["sample"]), file["size"])
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": any(_matches(path, line) for line in ignored.splitlines()),
                # With the id of the present content the client leaves out files that have not changed.
                "oid": known.etag if known and known.lfs == lfs else None,
            }
        )
    return json_response({"files": answers})


def wants_lfs(store: Store, files: Mapping[str, File], path: str, sample: bytes, size: int) -> bool:
    """By .gitattributes, by size, and, since the Hub keeps binary files out of git, by content."""
    attributes = _text(store, files, ".gitattributes") or GITATTRIBUTES
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    return size > REGULAR_LIMIT or b"\0" in sample or any(_matches(path, pattern) for pattern in patterns)


def _text(store: Store, files: Mapping[str, File], path: str) -> str:
    return store.blob(files[path].sha256).decode() if path in files else ""


def _matches(path: str, pattern: str) -> bool:
    """Enough of gitignore's rules for tests: a pattern without a slash matches a name at any depth."""
    pattern = pattern.strip().strip("/")
    if not pattern or pattern.startswith("#"):
        return False
    names = [path, *path.split("/")] if "/" not in pattern else [path]
    return any(fnmatch(name, pattern) for name in names)


@route("POST", "/api/{type}/{repo}/commit/{rev}", "commit")
def commit(request: Request) -> Response:
    repo, sender = writable_repo(request)
    ref, head = repo.ref(request.args["rev"]), repo.commit(request.args["rev"])
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if not header or not header.get("summary"):
        raise HubError(400, "A commit needs a header with a summary")
    title, description = header["summary"], header.get("description", "")
    if request.flag("create_pr"):
        head = repo.commit(header.get("parentCommit") or head.oid)
    elif header.get("parentCommit") not in (None, head.oid):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    changes = _changes(request, head, lines)
    if request.flag("create_pr"):
        ref = open_pull_request(request, repo, head, sender, title, description)
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(400, f"Cannot commit to {request.args['rev']!r}: it is not a branch")
    made = request.hub.store.commit(repo, ref, head, changes, title, sender.name, description)
    url = f"{request.hub.endpoint}/{repo.url_path}"
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    if request.flag("create_pr"):
        answer["pullRequestUrl"] = f"{url}/discussions/{ref.rpartition('/')[2]}"
    return json_response(answer)


def _changes(request: Request, head: Commit, lines: list[dict[str, Any]]) -> dict[str, File | None]:
    changes: dict[str, File | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            continue
        path = value["path"].strip("/")
        if not path or {"..", ".git", "."} & set(path.split("/")):
            raise HubError(400, f"Invalid path {value['path']!r}")
        if key == "file":
            changes[path] = _regular(request, path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            changes[path] = request.hub.store.lfs_file(value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in head.files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            changes |= dict.fromkeys(gone)
        else:
            raise HubError(400, f"Unknown operation {key!r}")
    return changes


def _regular(request: Request, path: str, content: bytes) -> File:
    if path == "README.md":
        errors, _ = validate_card(content.decode(errors="replace"), request.repo_type)
        if errors:
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    return request.hub.store.regular_file(content)
