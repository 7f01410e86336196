"""What the Hub keeps: blobs by their sha256, and repositories as commits and references, all in one folder.

Every change is on disk before the request that made it is answered, so a crashed server revives with all of it.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .messages import HubError

Discussion = dict[str, Any]


@dataclass(frozen=True)
class File:
    sha256: str
    oid: str  # git's id of the blob; for an LFS file, of its pointer
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        return len(lfs_pointer(self.sha256, self.size))


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    type: str
    id: str
    private: bool = False
    gated: str | bool = False  # "auto", "manual" or False
    created: str = ""
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> commit id
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        return next((r for r in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision) if r in self.refs), None)

    def commit(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request, commit id, or the first 7 or more characters of one."""
        ref = self.ref(revision)
        if ref:
            return self.commits[self.refs[ref]]
        matches = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(matches) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[matches[0]]

    def history(self, revision: str) -> Iterator[Commit]:
        """Newest first."""
        commit: Commit | None = self.commit(revision)
        while commit:
            yield commit
            commit = self.commits.get(commit.parent or "")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Store:
    """`root`/blobs/<sha256> and `root`/repos/<type>s/<namespace>/<name>.json.

    git's blobs and LFS objects share a folder: what is there as either is not asked for again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._repos: dict[tuple[str, str], Repo] = {}
        for path in root.glob("repos/*/*/*.json"):
            repo = self._load(path)
            self._repos[repo.type, repo.id] = repo

    # Blobs

    def path(self, kind: str, name: str) -> Path:
        folder = self.root / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def write(self, path: Path, content: bytes) -> None:
        """Whole or not at all, also for readers in other threads."""
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
        temporary.write_bytes(content)
        temporary.replace(path)

    def put_blob(self, content: bytes, expected: str = "") -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if expected and sha256 != expected:
            raise HubError(400, f"Content of {len(content)} bytes has sha256 {sha256}, but {expected} was announced")
        self.write(self.path("blobs", sha256), content)
        return sha256

    def has_blob(self, sha256: str) -> bool:
        return self.path("blobs", sha256).exists()

    def blob_size(self, sha256: str) -> int:
        return self.path("blobs", sha256).stat().st_size

    def blob(self, sha256: str) -> bytes:
        return self.path("blobs", sha256).read_bytes()

    def regular_file(self, content: bytes) -> File:
        return File(self.put_blob(content), git_oid(content), len(content), lfs=False)

    def lfs_file(self, sha256: str) -> File:
        if not self.has_blob(sha256):
            raise HubError(400, f"LFS pointer points to a file that was not uploaded: {sha256}")
        size = self.blob_size(sha256)
        return File(sha256, git_oid(lfs_pointer(sha256, size)), size, lfs=True)

    # Repositories

    def repos(self, type: str) -> list[Repo]:
        return [repo for (known, _), repo in sorted(self._repos.items()) if known == type]

    def find(self, type: str, id: str) -> Repo | None:
        return self._repos.get((type, id))

    def create(self, type: str, id: str, private: bool, gated: str | bool, files: Mapping[str, File]) -> Repo:
        repo = Repo(type, id, private, gated, created=now())
        self._repos[type, id] = repo
        self.commit(repo, "refs/heads/main", None, files, "initial commit", repo.namespace)
        return repo

    def delete(self, repo: Repo) -> None:
        del self._repos[repo.type, repo.id]
        self._repo_path(repo).unlink()

    def save(self, repo: Repo) -> None:
        self.write(self._repo_path(repo), json.dumps(asdict(repo)).encode())

    def commit(
        self,
        repo: Repo,
        ref: str,
        parent: Commit | None,
        changes: Mapping[str, File | None],
        title: str,
        author: str,
        message: str = "",
    ) -> Commit:
        """Moves `ref` to a new commit: the parent's files with `changes` applied, None for a deletion."""
        files = {**(parent.files if parent else {}), **changes}
        kept = {path: file for path, file in sorted(files.items()) if file is not None}
        content = [parent.oid if parent else None, title, message, author, now(), {p: f.oid for p, f in kept.items()}]
        # The random part keeps two equal commits within one second apart.
        oid = hashlib.sha1(json.dumps(content).encode() + os.urandom(8)).hexdigest()
        commit = Commit(oid, parent.oid if parent else None, title, message, author, now(), kept)
        repo.commits[oid], repo.refs[ref] = commit, oid
        self.save(repo)
        return commit

    def _repo_path(self, repo: Repo) -> Path:
        # A canonical repository such as gpt2 has no namespace, and gets the folder "_".
        namespace, _, name = repo.id.rpartition("/")
        return self.path(f"repos/{repo.type}s/{namespace or '_'}", f"{name}.json")

    @staticmethod
    def _load(path: Path) -> Repo:
        repo = Repo(**json.loads(path.read_bytes()))
        for oid, commit in repo.commits.items():
            fields: dict[str, Any] = {**commit}  # type: ignore[dict-item]
            fields["files"] = {name: File(**file) for name, file in fields["files"].items()}
            repo.commits[oid] = Commit(**fields)
        return repo
