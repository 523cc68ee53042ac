"""A loopback server that speaks as much of the Hugging Face hub's HTTP API as the real client asks for.

It does not cover the hub's chunk-based transfer (hf_xet).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


class Hub:
    """One repository. statuses: path prefix -> HTTP status and error code to answer instead."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo, self.folder = repo, folder
        self.commits = {COMMIT: folder}
        self.main = COMMIT
        self.statuses: dict[str, tuple[int, str]] = {}
        self.stalled = threading.Event()  # set: bodies of weights never come to their end
        self.lies: dict[str, bytes] = {}  # path -> other bytes than those of its digest
        self.requests: list[str] = []
        self.url = ""

    def push(self, commit: str, folder: Path) -> None:
        """`main` moves on to `commit`; the one before stays."""
        self.commits[commit] = folder
        self.main = commit

    def at(self, revision: str) -> tuple[str, Hub] | None:
        """The commit that a revision names, and a view of the repository there."""
        commit = self.main if revision == "main" else revision
        if commit not in self.commits:
            return None
        view = Hub(self.repo, self.commits[commit])
        return commit, view

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def entry(self, name: str) -> dict[str, Any]:
        data = (self.folder / name).read_bytes()
        entry: dict[str, Any] = {"rfilename": name, "path": name, "type": "file", "size": len(data)}
        entry["blobId"] = entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if name.endswith(_LFS_SUFFIXES):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 130}
        return entry

    def etag(self, name: str) -> str:
        entry = self.entry(name)
        return str(entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"])


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        for prefix, (status, code) in hub.statuses.items():
            if path.startswith(prefix):
                return self._send(status, b"{}", {"X-Error-Code": code} if code else {})
        found = re.fullmatch(
            rf"/api/models/{re.escape(hub.repo)}(?:/(?P<kind>tree|revision)/(?P<revision>[^/]+))?(?:/.*)?",
            path,
        )
        if found:
            return self._api(found["kind"], found["revision"] or "main")
        found = re.fullmatch(rf"/{re.escape(hub.repo)}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path)
        if found:
            return self._file(found["revision"], found["name"])
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _api(self, kind: str | None, revision: str) -> None:
        at = self.hub.at(revision)
        if at is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit, view = at
        entries = [view.entry(name) for name in view.files()]
        if kind == "tree":
            return self._send(200, json.dumps(entries).encode())
        info = {"id": view.repo, "sha": commit, "private": False, "tags": [], "downloads": 0}
        return self._send(200, json.dumps({**info, "siblings": entries}).encode())

    def _file(self, revision: str, name: str) -> None:
        at = self.hub.at(revision)
        if at is None or name not in at[1].files():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        commit, view = at
        if self.hub.stalled.is_set() and name.endswith(_LFS_SUFFIXES):
            return self._stall(view, name)
        headers = {"ETag": f'"{view.etag(name)}"', "X-Repo-Commit": commit}
        return self._send(200, self.hub.lies.get(name) or (view.folder / name).read_bytes(), headers)

    def _stall(self, view: Hub, name: str) -> None:
        data = (view.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{view.etag(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:10])
            self.wfile.flush()
            while self.hub.stalled.is_set():
                time.sleep(0.1)
        self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(repo: str, folder: Path) -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1; point HF_ENDPOINT to its url."""
    hub = Hub(repo, folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.stalled.clear()
        server.shutdown()
        thread.join()
        server.server_close()
