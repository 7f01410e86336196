"""The two binary formats of the Xet protocol that an upload consists of, and the one that a download needs.

Hashes travel as four little-endian 64-bit numbers, and are written as those numbers in hexadecimal.
Specification: https://huggingface.co/docs/xet
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .messages import HubError

CHUNK = 65536  # of downloads; uploads are cut by content
_ENTRY = 48  # every record of a shard has this size
_VERIFICATION, _METADATA = 1 << 31, 1 << 30  # flags of a file's header in a shard


@dataclass
class ShardFile:
    sha256: str
    terms: list[tuple[str, int, int]]  # (xorb, first chunk, chunk after the last)


def hash_text(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def shard_files(shard: bytes) -> Iterator[ShardFile]:
    """The files that a shard declares: where their chunks are, and their sha256."""
    at = _ENTRY
    while shard[at : at + 32] != b"\xff" * 32:
        flags, entries = struct.unpack_from("<II", shard, at + 32)
        if not flags & _METADATA:
            raise HubError(400, "A file in the shard has no sha256")
        first = at + _ENTRY
        terms = []
        for term in range(first, first + entries * _ENTRY, _ENTRY):
            start, stop = struct.unpack_from("<II", shard, term + 40)
            terms.append((hash_text(shard[term : term + 32]), start, stop))
        metadata = first + entries * _ENTRY * (2 if flags & _VERIFICATION else 1)
        yield ShardFile(hash_text(shard[metadata : metadata + 32]), terms)
        at = metadata + _ENTRY


def xorb_chunks(xorb: bytes) -> list[bytes]:
    """The chunks of an uploaded xorb; a footer may follow them."""
    chunks, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        size, scheme = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        if scheme != 0:  # LZ4, which the standard library lacks
            raise HubError(400, "Compressed chunk. Set HF_XET_XORB_COMPRESSION_POLICY=none.")
        chunks.append(xorb[at + 8 : at + 8 + size])
        at += 8 + size
    return chunks


def download_xorb(content: bytes) -> bytes:
    """`content` as a xorb of uncompressed chunks of `CHUNK` bytes, so that offsets can be computed."""
    out = bytearray()
    for at in range(0, len(content), CHUNK):
        piece = content[at : at + CHUNK]
        size = len(piece).to_bytes(3, "little")
        out += b"\0" + size + b"\0" + size + piece
    return bytes(out)
