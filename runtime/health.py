"""The image's HEALTHCHECK: is the server that is PID 1 ready? Exit 0 or 1."""

from __future__ import annotations

import http.client
import os
from pathlib import Path

from runtime.settings import Manifest, Settings, load

_TIMEOUT_SECONDS = 4.0


def serving_settings(cmdline: bytes, manifest: Manifest) -> Settings:
    """The settings of the process with this /proc/PID/cmdline: flags at `docker run` may move the port."""
    argv = [part.decode() for part in cmdline.rstrip(b"\0").split(b"\0")]
    start = argv.index("runtime") + 1 if "runtime" in argv else len(argv)
    flags = argv[start:]
    if flags and flags[0] == "serve":
        flags = flags[1:]
    return load(flags, os.environ, manifest)


def _address(settings: Settings) -> tuple[str, int]:
    host = "127.0.0.1" if settings.host in ("", "0.0.0.0", "::") else settings.host  # noqa: S104
    return host, settings.port


def pid1_url(manifest: Manifest) -> tuple[str, str]:
    """Where PID 1 of this container serves, and under which name."""
    settings = serving_settings(Path("/proc/1/cmdline").read_bytes(), manifest)
    host, port = _address(settings)
    return f"http://{host}:{port}", settings.served_model_name


def check_pid1(manifest: Manifest) -> int:
    settings = serving_settings(Path("/proc/1/cmdline").read_bytes(), manifest)
    connection = http.client.HTTPConnection(*_address(settings), timeout=_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/ready")
        return 0 if connection.getresponse().status == 200 else 1
    except OSError:
        return 1
    finally:
        connection.close()
