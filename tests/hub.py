"""A loopback server that speaks as much of the Hugging Face hub's HTTP API as the real client asks for.

It does not cover the hub's chunk-based transfer (hf_xet).
"""

from __future__ import annotations

import hashlib
import json
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
    """One repository at one commit. statuses: path prefix -> HTTP status to answer instead."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo, self.folder = repo, folder
        self.statuses: dict[str, tuple[int, str]] = {}
        self.stalled = threading.Event()  # set: bodies of weights never come to their end
        self.requests: list[str] = []
        self.url = ""

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
        api = f"/api/models/{hub.repo}"
        if path.startswith(api + "/tree/"):
            return self._send(200, json.dumps([hub.entry(name) for name in hub.files()]).encode())
        if path == api or path.startswith(api + "/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            if revision not in ("main", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            info = {"id": hub.repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            info["siblings"] = [hub.entry(name) for name in hub.files()]
            return self._send(200, json.dumps(info).encode())
        prefix = f"/{hub.repo}/resolve/"
        if path.startswith(prefix):
            name = path.removeprefix(prefix).split("/", 1)[1]
            if name in hub.files() and hub.stalled.is_set() and name.endswith(_LFS_SUFFIXES):
                return self._stall(name)
            if name in hub.files():
                headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": COMMIT}
                return self._send(200, (hub.folder / name).read_bytes(), headers)
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _stall(self, name: str) -> None:
        data = (self.hub.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{self.hub.etag(name)}"')
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
