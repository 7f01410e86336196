"""Uploads and downloads by Xet: tokens from the Hub, then xorbs, shards and reconstructions. Client: hf_xet.

A store in a folder (casUrl local://...) would need none of this, but it is locked by the process that opened it:
neither a second client nor this server could read what a running client has uploaded.
"""

from ..auth import readable_repo, writable_repo
from ..messages import HubError, Request, Response, json_response, ranged_response, route
from ..xet import CHUNK, download_xorb, shard_files, xorb_chunks

EXPIRES = 4102444800  # in the year 2100


@route("GET", "/api/{type}/{repo}/xet-write-token/{rev}", "xet_write_token")
def write_token(request: Request) -> Response:
    writable_repo(request)
    return _token(request, "xet-write")


@route("GET", "/api/{type}/{repo}/xet-read-token/{rev}", "xet_read_token")
def read_token(request: Request) -> Response:
    readable_repo(request, content=True)
    return _token(request, "xet-read")


def _token(request: Request, token: str) -> Response:
    url = f"{request.hub.storage}/xet"
    names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
    headers = dict(zip(names, (url, token, str(EXPIRES)), strict=True))
    return json_response({"casUrl": url, "accessToken": token, "exp": EXPIRES}, headers=headers)


def _require(request: Request, *tokens: str) -> None:
    if request.bearer not in tokens:
        raise HubError(401, "Invalid Xet token")


@route("POST", "/xet/v1/xorbs/default/{oid}", "xet_xorb")
def put_xorb(request: Request) -> Response:
    _require(request, "xet-write")
    xorb_chunks(request.body)  # refuses what it cannot read
    request.hub.store.write(request.hub.store.path("xorbs", request.args["oid"]), request.body)
    return json_response({"was_inserted": True})


@route("POST", "/xet/v1/shards", "xet_shard")
def put_shard(request: Request) -> Response:
    """Puts the declared files together from their chunks; `Store.put_blob` checks the sha256 that they declare."""
    _require(request, "xet-write")
    store = request.hub.store
    xorbs: dict[str, list[bytes]] = {}
    for file in shard_files(request.body):
        content = b""
        for xorb, start, stop in file.terms:
            path = store.path("xorbs", xorb)
            if not path.exists():
                raise HubError(400, f"The shard refers to a xorb that was not uploaded: {xorb}")
            if xorb not in xorbs:
                xorbs[xorb] = xorb_chunks(path.read_bytes())
            content += b"".join(xorbs[xorb][start:stop])
        store.put_blob(content, file.sha256)
    return json_response({"result": 1})


@route("GET", "/xet/v1/reconstructions/{oid}", "xet_reconstruction")
def reconstruction(request: Request) -> Response:
    """Which chunks a file, or the asked range of it, consists of: here always those of `download_xorb`."""
    _require(request, "xet-read", "xet-write")
    oid, store = request.args["oid"], request.hub.store
    if not store.has_blob(oid):
        raise HubError(404, "No such file")
    size = store.blob_size(oid)
    asked = request.headers.get("Range", f"bytes=0-{size}").removeprefix("bytes=").split("-")
    start, last = int(asked[0]), min(int(asked[1]), size - 1)
    if start > last:
        return Response(416)
    chunks = {"start": start // CHUNK, "end": last // CHUNK + 1}
    stop = min(chunks["end"] * CHUNK, size)
    # Each chunk has a header of 8 bytes.
    url_range = {"start": chunks["start"] * (CHUNK + 8), "end": stop + 8 * chunks["end"] - 1}
    term = {"hash": oid, "unpacked_length": stop - chunks["start"] * CHUNK, "range": chunks}
    fetch = {"range": chunks, "url": f"{request.hub.storage}/xet/data/{oid}", "url_range": url_range}
    return json_response({"offset_into_first_range": start % CHUNK, "terms": [term], "fetch_info": {oid: [fetch]}})


@route("GET", "/xet/data/{oid}", "xet_data")
def data(request: Request) -> Response:
    """Like a signed URL."""
    return ranged_response(request, download_xorb(request.hub.store.blob(request.args["oid"])), {})


@route("GET", "/xet/v1/chunks/default/{oid}", "xet_dedup")
@route("POST", "/xet/v1/xorb-grants/default/{oid}", "xet_optional")
@route("POST", "/xet/v2/shards", "xet_optional")
@route("GET", "/xet/v2/reconstructions/{oid}", "xet_optional")
@route("POST", "/xet/v1/telemetry", "xet_optional")
def optional(request: Request) -> Response:
    """No chunk is known from elsewhere, and newer requests are answered with 404: the client goes on with v1."""
    raise HubError(404, "Not found")
