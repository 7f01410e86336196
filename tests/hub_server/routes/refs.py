"""Branches, tags and history: `create_branch`, `create_tag`, `list_repo_refs`, `list_repo_commits`."""

from typing import Any

from ..auth import readable_repo, writable_repo
from ..messages import HubError, Request, Response, json_response, paged_response, route


@route("GET", "/api/{type}/{repo}/refs", "refs")
def refs(request: Request) -> Response:
    listed: dict[str, list[dict[str, Any]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, oid in readable_repo(request).refs.items():
        _, kind, name = ref.split("/", 2)
        listed[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": oid})
    if not request.flag("include_prs"):
        del listed["pullRequests"]
    return json_response(listed)


@route("GET", "/api/{type}/{repo}/commits/{rev}", "commits")
def commits(request: Request) -> Response:
    history = readable_repo(request).history(request.args["rev"])
    return paged_response(
        request,
        [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in history
        ],
    )


@route("POST", "/api/{type}/{repo}/branch/{name}", "create_branch")
def create_branch(request: Request) -> Response:
    return _create(request, "heads", request.args["name"], request.json().get("startingPoint") or "main")


@route("POST", "/api/{type}/{repo}/tag/{rev}", "create_tag")
def create_tag(request: Request) -> Response:
    return _create(request, "tags", request.json()["tag"], request.args["rev"])


def _create(request: Request, kind: str, name: str, revision: str) -> Response:
    repo, _ = writable_repo(request)
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid reference {name!r}")
    target, ref = repo.commit(revision), f"refs/{kind}/{name}"
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = target.oid
    request.hub.store.save(repo)
    return json_response({})
