"""A loopback server that speaks as much of the Hugging Face hub's HTTP API as the real client asks for.

It does not cover the hub's chunk-based transfer (hf_xet).
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet")


@dataclass
class Refusal:
    """An answer in place of the right one, to the next `times` requests whose path starts with `prefix`.

    command: HEAD or GET, where it is for one of them only.
    """

    prefix: str
    status: int
    code: str = ""
    message: str = ""
    times: float = float("inf")
    command: str = ""
    # Without it the client's first wait is a second.
    headers: dict[str, str] = field(default_factory=lambda: {"Retry-After": "0"})


class Faults:
    """Answers that can be made to fail in every way."""

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []
        self.stalled: set[str] = set()  # files whose bodies stop after ten bytes, as long as they are here
        self.cuts: dict[str, int] = {}  # file -> how many times its body ends in the middle
        self.resets: dict[str, int] = {}  # the same, by a connection reset
        self.pauses: dict[str, int] = {}  # the same, but after three seconds it goes on
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.url = ""

    def refuse(self, prefix: str, status: int, code: str = "", **options: Any) -> None:
        self.refusals.append(Refusal(prefix, status, code, **options))


class Cdn(Faults):
    """The other host that a hub's large files come from, at addresses that say nothing of a repository."""

    def __init__(self) -> None:
        super().__init__()
        self.blobs: dict[str, tuple[str, bytes]] = {}  # path -> name of the file, and its bytes
        self.authorizations: list[str] = []  # there should be none

    def add(self, name: str, data: bytes, digest: str) -> str:
        """The file's address."""
        path = f"/blobs/{digest}"
        self.blobs[path] = (name, data)
        return f"{self.url}{path}?Signature=abc"


class Hub(Faults):
    """One repository, of models or datasets. cdn: large files are redirected there, where there is one."""

    def __init__(self, repo: str, folder: Path, kind: Literal["models", "datasets"] = "models") -> None:
        super().__init__()
        self.repo, self.folder, self.kind = repo, folder, kind
        self.cdn: Cdn | None = None
        self.commits = {COMMIT: folder}
        self.main = COMMIT
        self.token: str | None = None  # set: whoever does not send it gets 401
        self.lies: dict[str, bytes] = {}  # file -> other bytes than those of its digest
        self.sizes: dict[str, int] = {}  # file -> the size that its metadata claims
        self.says: dict[str, Any] = {}  # of the repository, over what is so

    def push(self, commit: str, folder: Path) -> None:
        """`main` moves on to `commit`; the one before stays."""
        self.commits[commit] = folder
        self.main = commit

    @property
    def bodies(self) -> list[str]:
        """The files whose bodies were asked for, in order."""
        return [
            request.split("/resolve/", 1)[1].split("/", 1)[1]
            for request in list(self.requests)
            if request.startswith("GET") and "/resolve/" in request
        ]

    def at(self, revision: str) -> tuple[str, Path] | None:
        """The commit that a revision names, and its files."""
        commit = self.main if revision == "main" else revision
        return (commit, self.commits[commit]) if commit in self.commits else None

    def entry(self, folder: Path, name: str) -> dict[str, Any]:
        data = (folder / name).read_bytes()
        size = self.sizes.get(name, len(data))
        entry: dict[str, Any] = {"rfilename": name, "path": name, "type": "file", "size": size}
        entry["blobId"] = entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if name.endswith(_LFS_SUFFIXES):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": digest, "oid": digest, "size": size, "pointerSize": 130}
        return entry

    def etag(self, folder: Path, name: str) -> str:
        entry = self.entry(folder, name)
        return str(entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"])


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _used(counts: dict[str, int], name: str) -> bool:
    """Whether the count of `name` had something left; one less from now on."""
    left = counts.get(name, 0)
    counts[name] = left - 1
    return left > 0


class _FaultyHandler(BaseHTTPRequestHandler):
    faults: Faults
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        raise NotImplementedError

    def do_HEAD(self) -> None:
        self.do_GET()

    def _refusal(self, path: str) -> Refusal | None:
        for refusal in self.faults.refusals:
            meant = refusal.command in ("", self.command) and path.startswith(refusal.prefix)
            if meant and refusal.times > 0:
                refusal.times -= 1
                return refusal
        return None

    def _refuse(self, refusal: Refusal) -> None:
        told = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        headers = {name: value for name, value in told.items() if value}
        self._send(refusal.status, b"{}", {**headers, **refusal.headers})

    def _body(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        faults = self.faults
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted and self.command == "GET":
            faults.ranges.append(f"{name} {wanted[0]}")
            status, start = 206, int(wanted[1])
            whole, data = len(data), data[: int(wanted[2]) + 1] if wanted[2] else data
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{whole}"
        half = (len(data) - start) // 2
        if self.command == "GET" and name in faults.stalled:
            self._part(status, data[start:], 10, headers)
            while name in faults.stalled:
                time.sleep(0.05)
            self.wfile.write(data[start + 10 :])
        elif self.command == "GET" and _used(faults.cuts, name):
            self._part(status, data[start:], half, headers)
        elif self.command == "GET" and _used(faults.pauses, name):
            self._part(status, data[start:], half, headers)
            time.sleep(3)
            self.wfile.write(data[start + half :])
        elif self.command == "GET" and _used(faults.resets, name):
            self._part(status, data[start:], half, headers)
            time.sleep(0.2)  # a reset throws away what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self._send(status, data[start:], headers)

    def _part(self, status: int, body: bytes, length: int, headers: dict[str, str]) -> None:
        """The headers of the whole body, `length` bytes of it, and the end of the connection."""
        self.close_connection = True
        self._head(status, len(body), headers)
        self.wfile.write(body[:length])
        self.wfile.flush()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


class _CdnHandler(_FaultyHandler):
    cdn: Cdn

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.cdn.requests.append(f"{self.command} {path}")
        if self.headers["Authorization"]:
            self.cdn.authorizations.append(self.headers["Authorization"])
        if refusal := self._refusal(path):
            return self._refuse(refusal)
        if path not in self.cdn.blobs:
            return self._refuse(Refusal("/", 404))
        return self._body(*self.cdn.blobs[path], {"ETag": '"of-the-cdn"'})


class _Handler(_FaultyHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            wrong = "Invalid credentials in Authorization header" if self.headers["Authorization"] else ""
            return self._refuse(Refusal("/", 401, message=wrong))
        if refusal := self._refusal(path):
            return self._refuse(refusal)
        repo = re.escape(hub.repo)
        found = re.fullmatch(
            rf"/api/{hub.kind}/{repo}(?:/(?P<kind>tree|revision)/(?P<revision>[^/]+))?(?:/.*)?", path
        )
        if found:
            return self._api(found["kind"], found["revision"] or "main")
        prefix = "/datasets" if hub.kind == "datasets" else ""
        found = re.fullmatch(rf"{prefix}/{repo}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path)
        if found:
            return self._file(found["revision"], found["name"])
        # As the real hub: who shows no token is not told whether the repository exists.
        return self._refuse(Refusal("/", 404 if self.headers["Authorization"] else 401, "RepoNotFound"))

    def _api(self, kind: str | None, revision: str) -> None:
        at = self.hub.at(revision)
        if at is None:
            return self._refuse(Refusal("/", 404, "RevisionNotFound"))
        commit, folder = at
        entries = [self.hub.entry(folder, name) for name in _files(folder)]
        if kind == "tree":
            return self._send(200, json.dumps(entries).encode())
        info = {"id": self.hub.repo, "sha": commit, "private": False, "tags": [], "downloads": 0}
        return self._send(200, json.dumps({**info, "siblings": entries, **self.hub.says}).encode())

    def _file(self, revision: str, name: str) -> None:
        at = self.hub.at(revision)
        if at is None or name not in _files(at[1]):
            self._refuse(Refusal("/", 404, "EntryNotFound"))
            return
        commit, folder = at
        data = self.hub.lies.get(name) or (folder / name).read_bytes()
        etag = self.hub.etag(folder, name)
        if self.hub.cdn and name.endswith(_LFS_SUFFIXES):
            headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            self._send(302, b"", {**headers, "Location": self.hub.cdn.add(name, data, etag)})
        else:
            self._body(name, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed, or whose connection is reset on purpose, is not worth a traceback."""


@contextmanager
def _running(host: str, faults: Faults, handler: type[_FaultyHandler]) -> Iterator[None]:
    server = _Server((host, 0), handler)
    faults.url = f"http://{host}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        faults.stalled.clear()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve(
    repo: str, folder: Path, kind: Literal["models", "datasets"] = "models", host: str = "127.0.0.1"
) -> Iterator[Hub]:
    """A hub on a free port of `host`; point HF_ENDPOINT to its url."""
    hub = Hub(repo, folder, kind)
    with _running(host, hub, type("Handler", (_Handler,), {"hub": hub, "faults": hub})):
        yield hub


@contextmanager
def redirecting(hub: Hub, host: str = "127.0.0.1") -> Iterator[Cdn]:
    """A second server, which the hub sends those who ask for large files to."""
    hub.cdn = cdn = Cdn()
    with _running(host, cdn, type("Handler", (_CdnHandler,), {"cdn": cdn, "faults": cdn})):
        yield cdn
    hub.cdn = None
