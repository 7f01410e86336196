"""Uploads by Git LFS: batch, PUT in one or several parts, verify. Client: `huggingface_hub.lfs`."""

import hashlib
from typing import Any

from ..auth import writable_repo
from ..messages import HubError, Request, Response, json_response, route


@route("POST", "/{prefix}{repo}.git/info/lfs/objects/batch", "lfs_batch")
def batch(request: Request) -> Response:
    body = request.json()
    # Without a ref it prepares a pull request, see `HfApi.preupload_lfs_files`.
    writable_repo(request, body.get("ref", {"name": "refs/pr/"})["name"])
    return json_response({"transfer": "basic", "objects": [_actions(request, **wanted) for wanted in body["objects"]]})


def _actions(request: Request, oid: str, size: int) -> dict[str, Any]:
    known: dict[str, Any] = {"oid": oid, "size": size}
    if request.hub.store.has_blob(oid):
        return known
    put = f"{request.hub.storage}/lfs/{oid}"
    upload: dict[str, Any] = {"href": put}
    if size > request.hub.part_size:
        parts = range(1, -(-size // request.hub.part_size) + 1)
        urls = {f"{part:05}": f"{put}/part/{part}" for part in parts}
        upload = {"href": f"{request.hub.endpoint}/lfs/{oid}/complete"}
        upload["header"] = {"chunk_size": str(request.hub.part_size), **urls}
    path = request.path.removesuffix("objects/batch") + "verify"
    return known | {"actions": {"upload": upload, "verify": {"href": request.hub.endpoint + path}}}


@route("PUT", "/lfs/{oid}", "lfs_put")
def put(request: Request) -> Response:
    request.hub.store.put_blob(request.body, request.args["oid"])
    return Response(200, headers={"ETag": f'"{request.args["oid"]}"'})


@route("PUT", "/lfs/{oid}/part/{num}", "lfs_put_part")
def put_part(request: Request) -> Response:
    store = request.hub.store
    store.write(store.path(f"parts/{request.args['oid']}", request.args["num"]), request.body)
    return Response(200, headers={"ETag": f'"{hashlib.sha256(request.body).hexdigest()}"'})


@route("POST", "/lfs/{oid}/complete", "lfs_complete")
def complete(request: Request) -> Response:
    content = b""
    for part in request.json()["parts"]:
        path = request.hub.store.path(f"parts/{request.args['oid']}", str(part["partNumber"]))
        piece = path.read_bytes() if path.exists() else b""
        if part["etag"].strip('"') != hashlib.sha256(piece).hexdigest():
            raise HubError(400, f"Part {part['partNumber']} is missing or has another ETag")
        content += piece
    request.hub.store.put_blob(content, request.args["oid"])
    return json_response({})


@route("POST", "/{prefix}{repo}.git/info/lfs/verify", "lfs_verify")
def verify(request: Request) -> Response:
    writable_repo(request, "refs/pr/")  # what the object is for, it does not say
    oid, size = request.json()["oid"], request.json()["size"]
    if not request.hub.store.has_blob(oid) or request.hub.store.blob_size(oid) != size:
        raise HubError(404, f"No object {oid} of {size} bytes")
    return json_response({})
