"""Listing and downloading: `list_repo_tree`, `get_paths_info`, `file_exists`, `hf_hub_download`, `HfFileSystem`."""

import hashlib
from typing import Any
from urllib.parse import parse_qs, quote

from ..auth import readable_repo
from ..messages import HubError, Request, Response, json_response, paged_response, ranged_response, route
from ..store import Commit, File


@route("GET", "/api/{type}/{repo}/tree/{rev}", "tree")
@route("GET", "/api/{type}/{repo}/tree/{rev}/{path}", "tree")
def tree(request: Request) -> Response:
    commit = readable_repo(request).commit(request.args["rev"])
    folder = request.args.get("path", "").strip("/")
    inside = {p: e for p, e in _entries(request, commit).items() if not folder or p.startswith(f"{folder}/")}
    if folder and not inside:
        raise HubError(404, f'"{folder}" does not exist on "{request.args["rev"]}"', "EntryNotFound", _at(commit))
    depth = folder.count("/") + 1 if folder else 0
    shown = [e for p, e in inside.items() if request.flag("recursive") or p.count("/") == depth]
    return paged_response(request, shown)


@route("POST", "/api/{type}/{repo}/paths-info/{rev}", "paths_info")
def paths_info(request: Request) -> Response:
    entries = _entries(request, readable_repo(request).commit(request.args["rev"]))
    asked = parse_qs(request.body.decode()).get("paths", [])
    return json_response([entries[path.strip("/")] for path in asked if path.strip("/") in entries])


def _entries(request: Request, commit: Commit) -> dict[str, dict[str, Any]]:
    """Every file and folder of a commit, by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.oid}/{folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        entries[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.lfs:
            entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            if request.hub.profile == "xet":
                entries[path]["xetHash"] = file.sha256
    return dict(sorted(entries.items()))


@route("GET", "/{prefix}{repo}/resolve/{rev}/{path}", "resolve")
def resolve(request: Request) -> Response:
    repo = readable_repo(request, content=True)
    commit = repo.commit(request.args["rev"])
    file = commit.files.get(request.args["path"])
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", _at(commit))
    headers = {**_at(commit), "ETag": f'"{file.etag}"'}
    if not file.lfs:
        return ranged_response(request, request.hub.store.blob(file.sha256), headers)
    return _redirect(request, file, headers, f"/api/{repo.type}s/{repo.id}/xet-read-token/{commit.oid}")


def _redirect(request: Request, file: File, headers: dict[str, str], xet_token: str) -> Response:
    """LFS files live on another origin, to which the client must not send its token."""
    name = quote(request.args["path"].rpartition("/")[2])
    headers |= {
        "Location": f"{request.hub.storage}/storage/{file.sha256}?filename={name}",
        "X-Linked-ETag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
    }
    if request.hub.profile == "xet":
        # The hash that a Xet client computed for the file would do as well: it only names the file to ../cas.py.
        headers |= {"X-Xet-Hash": file.sha256, "Link": f'<{request.hub.endpoint}{xet_token}>; rel="xet-auth"'}
    return Response(302, b"Found", headers)


@route("GET", "/storage/{oid}", "storage")
def storage(request: Request) -> Response:
    """Like a signed URL: whoever knows it may read it."""
    if not request.hub.store.has_blob(request.args["oid"]):
        raise HubError(404, "No such object")
    return ranged_response(request, request.hub.store.blob(request.args["oid"]), {"ETag": f'"{request.args["oid"]}"'})


def _at(commit: Commit) -> dict[str, str]:
    return {"X-Repo-Commit": commit.oid}
