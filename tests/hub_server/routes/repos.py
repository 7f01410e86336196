"""Accounts and repositories: `HfApi.whoami`, `create_repo`, `delete_repo`, `model_info`, `list_models`, ..."""

import re
from typing import Any

from ..auth import account, readable_repo, require_account, require_owner, writable_repo
from ..card import card_data, card_tags, validate_card
from ..messages import REPO_TYPES, HubError, Request, Response, json_response, paged_response, route
from ..store import Commit, Repo

_LARGE = (
    "7z arrow bin ckpt ftz gz h5 joblib model msgpack npy npz onnx parquet pickle pkl pt pth rar safetensors tar "
    "tflite tgz wasm xz zip zst"
)
GITATTRIBUTES = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in _LARGE.split())


@route("GET", "/api/whoami-v2", "whoami")
def whoami(request: Request) -> Response:
    known = require_account(request)
    token = {"displayName": "demo", "role": known.role}
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"} for name in known.orgs]
    about = {"type": "user", "id": known.name, "name": known.name, "fullname": known.name, "email": None, "orgs": orgs}
    return json_response({**about, "auth": {"type": "access_token", "accessToken": token}})


@route("GET", "/api/agent-harnesses", "agent_harnesses")
def agent_harnesses(request: Request) -> Response:
    """Which programs drive `hf`, as `huggingface_hub.utils._detect_agent` asks: none is known here."""
    return json_response({"standardEnvVars": [], "harnesses": {}})


def _named_repo(request: Request) -> tuple[str, str]:
    """(type, id) of a body such as {"name", "organization", "type"}; the namespace is the sender's by default."""
    body = request.json()
    known = require_account(request, "write")
    repo_type, id = body.get("type") or "model", f"{body.get('organization') or known.name}/{body['name']}"
    if repo_type not in REPO_TYPES or not re.fullmatch(r"[\w.-]+/[\w.-]+", id):
        raise HubError(400, f"Invalid type {repo_type!r} or name {id!r} of a repository")
    require_owner(request, id.partition("/")[0])
    return repo_type, id


@route("POST", "/api/repos/create", "create_repo")
def create_repo(request: Request) -> Response:
    repo_type, id = _named_repo(request)
    repo = request.hub.store.find(repo_type, id)
    url = f"{request.hub.endpoint}/{Repo(repo_type, id).url_path}"
    if repo:
        return json_response({"error": f"You already created this {repo_type} repo", "url": url}, 409)
    body = request.json()
    # `visibility` since huggingface_hub 1.0, `private` before.
    private = body.get("visibility") == "private" or bool(body.get("private"))
    attributes = request.hub.store.regular_file(GITATTRIBUTES.encode())
    request.hub.store.create(repo_type, id, private, False, {".gitattributes": attributes})
    return json_response({"url": url, "name": id, "id": id})


@route("DELETE", "/api/repos/delete", "delete_repo")
def delete_repo(request: Request) -> Response:
    repo = request.hub.store.find(*_named_repo(request))
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    request.hub.store.delete(repo)
    return json_response({})


@route("PUT", "/api/{type}/{repo}/settings", "settings")
def settings(request: Request) -> Response:
    repo, _ = writable_repo(request)
    body = request.json()
    repo.gated = body.get("gated", repo.gated)
    if "visibility" in body or "private" in body:
        repo.private = body.get("visibility") == "private" or bool(body.get("private"))
    request.hub.store.save(repo)
    return json_response({"private": repo.private, "gated": repo.gated})


@route("POST", "/api/validate-yaml", "validate_yaml")
def validate_yaml(request: Request) -> Response:
    body = request.json()
    errors, warnings = validate_card(body["content"], body.get("repoType") or "model")
    answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return json_response(answer, 400 if errors else 200)


@route("GET", "/api/{type}/{repo}", "repo_info")
@route("GET", "/api/{type}/{repo}/revision/{rev}", "repo_info")
def repo_info(request: Request) -> Response:
    repo = readable_repo(request)
    return json_response(describe(request, repo, repo.commit(request.args.get("rev", "main"))))


@route("GET", "/api/{type}", "list_repos")
def list_repos(request: Request) -> Response:
    known = account(request)
    wanted = set(request.params("filter") + request.params("pipeline_tag"))
    found = []
    for repo in request.hub.store.repos(request.repo_type):
        visible = not repo.private or (known is not None and known.owns(repo.namespace))
        named = request.param("search").lower() in repo.id.lower()
        if visible and named and request.param("author", repo.namespace) == repo.namespace:
            described = describe(request, repo, repo.commit("main"))
            if wanted <= set(described["tags"]):
                found.append(described)
    return paged_response(request, found)


def describe(request: Request, repo: Repo, commit: Commit) -> dict[str, Any]:
    """What `huggingface_hub.hf_api.ModelInfo` and its siblings read."""
    readme = commit.files.get("README.md")
    card = card_data(request.hub.store.blob(readme.sha256).decode(errors="replace")) if readme else {}
    siblings = []
    for path, file in commit.files.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if request.flag("blobs"):
            sibling |= {"size": file.size, "blobId": file.oid}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        siblings.append(sibling)
    described: dict[str, Any] = {key: card[key] for key in ("library_name", "pipeline_tag", "sdk") if key in card}
    described |= {"id": repo.id, "author": repo.namespace, "sha": commit.oid, "cardData": card, "tags": card_tags(card)}
    described |= {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
    return described | {"createdAt": repo.created, "lastModified": commit.date, "siblings": siblings}
