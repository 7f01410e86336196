"""The server: two loopback listeners, one folder, and the faults and the log that tests work with."""

import itertools
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from . import routes  # noqa: F401  (fills the table of routes)
from .auth import DEMO_TOKENS, Account
from .environment import client_environment, client_variables
from .faults import Fault, Faults
from .messages import Handler, HubError, Request, Response, find_route
from .routes.upload import wants_lfs
from .store import Commit, File, Repo, Store


@dataclass
class Logged:
    """A request as it came in; status 0 means that it got no (whole) answer."""

    method: str
    path: str
    step: str
    status: int = 0


class HubServer:
    """A Hugging Face Hub on 127.0.0.1 for the life of a `with` block.

    `profile` is "lfs" or "xet"; `root` keeps everything (a temporary folder by default, removed in the end);
    `part_size` is the size above which LFS files are uploaded in parts, `page_size` that of listings.

        with HubServer() as hub:
            hub.add_repo("user/model", {"config.json": "{}"})
            hub.faults.add(Fault("commit", "status:503"))
            subprocess.run([sys.executable, "push.py"], env=hub.environment("hf_write"), cwd=tmp_path)
            assert "commit" in hub.steps()
    """

    def __init__(
        self,
        root: Path | None = None,
        profile: Literal["lfs", "xet"] = "lfs",
        port: int = 0,
        tokens: Mapping[str, Account] = DEMO_TOKENS,
        part_size: int = 64 << 20,
        page_size: int = 1000,
    ) -> None:
        if profile not in ("lfs", "xet"):
            raise ValueError(f"Unknown profile {profile!r}. Use 'lfs' or 'xet'.")
        self.profile, self.tokens, self.part_size, self.page_size = profile, tokens, part_size, page_size
        self.faults = Faults()
        self.requests: list[Logged] = []
        self.down = True
        self.lock = threading.RLock()
        self._temporary = root is None
        self.root = Path(root or tempfile.mkdtemp(prefix="hub_server_")).resolve()
        self._ports = [port, 0]
        self._listeners: list[_Listener] = []
        self._homes = itertools.count()

    # Life

    def __enter__(self) -> "HubServer":
        self.revive()
        return self

    def __exit__(self, *_: object) -> None:
        self.crash()
        if self._temporary:
            shutil.rmtree(self.root, ignore_errors=True)

    def revive(self) -> None:
        """Starts, or starts again after a crash: on the same ports, with what is on disk."""
        self.store = Store(self.root)
        self._listeners = [_Listener(("127.0.0.1", port), self) for port in self._ports]
        self._ports = [listener.server_port for listener in self._listeners]
        self.down = False
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()

    def crash(self, spare: socket.socket | None = None) -> None:
        """Refuses connections until `revive`, and closes those that are open, but for one that is to be answered."""
        with self.lock:
            listeners, self._listeners, self.down = self._listeners, [], True
        for listener in listeners:
            listener.shutdown()
            listener.server_close()
            for connection in listener.connections - {spare}:
                _close(connection)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def storage(self) -> str:
        """Another origin, where large files are, as on the Hub."""
        return f"http://127.0.0.1:{self._ports[1]}"

    # For tests

    def environment(self, token: str = "", home: Path | None = None) -> dict[str, str]:
        """A whole environment for a subprocess whose clients talk to this server only.

        Each call has a new, empty HF_HOME unless `home` says otherwise. See `environment.py`.
        """
        home = home or self.root / "homes" / str(next(self._homes))
        return client_environment(client_variables(self.endpoint, self.profile, home, token))

    def steps(self) -> list[str]:
        """The step names of all requests so far, in order. `hub.requests.clear()` starts anew."""
        return [entry.step for entry in self.requests]

    def add_repo(
        self,
        id: str,
        files: Mapping[str, bytes | str] | Path | None = None,
        type: str = "model",
        private: bool = False,
        gated: Literal["auto", "manual", False] = False,
    ) -> Commit:
        """A repository with exactly these files (a mapping, or a folder's), made without HTTP."""
        with self.lock:
            if self.store.find(type, id):
                raise ValueError(f"The {type} {id} exists already. Use `commit` to change it.")
            return self.store.create(type, id, private, gated, self._files(files or {})).commit("main")

    def commit(self, id: str, files: Mapping[str, bytes | str], type: str = "model", revision: str = "main") -> Commit:
        """Adds or replaces files on a branch, without HTTP: somebody else's push."""
        with self.lock:
            repo = self.repo(id, type)
            head, ref = repo.commit(revision), repo.ref(revision)
            return self.store.commit(repo, ref or "", head, self._files(files), "by the test", repo.namespace)

    def repo(self, id: str, type: str = "model") -> Repo:
        repo = self.store.find(type, id)
        if repo is None:
            raise KeyError(f"No {type} {id!r}")
        return repo

    def head(self, id: str, revision: str = "main", type: str = "model") -> Commit:
        return self.repo(id, type).commit(revision)

    def files(self, id: str, revision: str = "main", type: str = "model") -> dict[str, bytes]:
        """Every file's content, .gitattributes included if the repository was created over HTTP."""
        return {path: self.store.blob(file.sha256) for path, file in self.head(id, revision, type).files.items()}

    def _files(self, files: Mapping[str, bytes | str] | Path) -> dict[str, File]:
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        stored = {}
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            if wants_lfs(self.store, {}, path, data[:512], len(data)):
                stored[path] = self.store.lfs_file(self.store.put_blob(data))
            else:
                stored[path] = self.store.regular_file(data)
        return stored

    # Answering

    def answer(self, handler: Handler, request: Request) -> Response:
        try:
            with self.lock:
                return handler(request)
        except HubError as error:
            return error.response()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return HubError(500, f"The test server has a bug, or the request is malformed: {error!r}").response()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: HubServer) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(address, _Connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may leave when they like
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        request = Request(self.command, path, query, self.headers, self._body(), hub)
        step, handler, request.args = find_route(self.command, path) or ("unknown", _unknown, {})
        if self.command == "CONNECT" or not path.startswith("/"):
            # datasets looks for a viewer beside the Hub, which is as good as not there.
            viewer = path.startswith("http://datasets-server.127.0.0.1")
            step, handler = "dataset_viewer" if viewer else "outside", _outside
        entry = Logged(self.command, self.path, step)
        hub.requests.append(entry)
        fault = hub.faults.take(step, path) or Fault(step, "slow:0")  # which is none
        if fault.name == "crash":
            hub.crash()
        if fault.name == "slow":
            time.sleep(fault.value)
        if hub.down or fault.name == "cut":
            self._cut()
            return
        response = Response(int(fault.value)) if fault.name == "status" else hub.answer(handler, request)
        if fault.name == "crash-after":
            hub.crash(self.connection)  # before the answer, or the client's next request could still come through
        if fault.name == "cut-after":
            self._cut()
            return
        entry.status = 0 if fault.name == "cut-body" else response.status
        self._send(response, len(response.body) // 2 if fault.name == "cut-body" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _serve  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def _send(self, response: Response, cut_at: int | None) -> None:
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        if self.server.hub.down:
            self.send_header("Connection", "close")  # or the client would send its next request into the void
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[:cut_at])
        if cut_at is not None:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        _close(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `HubServer.requests` is the log


def _close(connection: socket.socket) -> None:
    with suppress(OSError):  # the client may have been faster
        connection.shutdown(socket.SHUT_RDWR)


def _unknown(request: Request) -> Response:
    raise HubError(404, f"This Hub has no {request.method} {request.path}")


def _outside(request: Request) -> Response:
    raise HubError(403, f"This Hub's clients cannot reach {request.path}")
