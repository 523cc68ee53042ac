"""`python3 -m runtime warm --output FOLDER [FLAGS]`: starts the server once and records what a start needs.

For `coldstart prewarm`, which adds the folder to the image. Works in any container engine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime import record
from runtime.prefetch import FILE_LIST
from runtime.processes import descendants
from runtime.settings import Settings

_POLL_SECONDS = 0.2
_REQUEST_SECONDS = 300
_STOP_SECONDS = 60


def warm(settings: Settings, argv: Sequence[str], output: Path) -> int:
    """Exit code 0 when `output` is complete; else the server's own."""
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, record.VARIABLE: str(output), "COLDSTART_DRAIN_DELAY": "0"}
    server = subprocess.Popen([sys.executable, "-m", "runtime", "serve", *argv], env=environment)
    try:
        while not _answers(settings):
            if server.poll() is not None:
                return server.returncode or 1
            time.sleep(_POLL_SECONDS)
        _ask(settings)
        _write_file_list(output, server.pid, Path(settings.manifest.model_path))
    finally:
        server.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
        server.kill()
    return server.wait()


def _answers(settings: Settings) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.port}/ready", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _ask(settings: Settings) -> None:
    """One request, so that what is only loaded for the first one is on the list too."""
    body: dict[str, Any] = {"model": settings.served_model_name, "prompt": "Hello", "max_tokens": 4}
    request = urllib.request.Request(
        f"http://127.0.0.1:{settings.port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=_REQUEST_SECONDS).close()  # noqa: S310


def _write_file_list(output: Path, server: int, model: Path) -> None:
    """Libraries first, since the first import needs the largest of them; then files in order of opening."""
    mapped = sorted(
        {path for pid in descendants(server) for path in _libraries(pid)}, key=_size, reverse=True
    )
    opened = (output / record.OPENED).read_text().splitlines()
    (output / record.OPENED).unlink()
    wanted = [
        path
        for path in dict.fromkeys(mapped + opened)
        if path.startswith("/")
        and not path.startswith(("/proc", "/sys", "/dev", "/tmp", str(model)))  # noqa: S108
        # Read only to find the import structures, which are remembered from now on.
        and not ("/transformers/models/" in path and path.endswith(".py"))
        and Path(path).is_file()
    ]
    (output / FILE_LIST).write_text("".join(f"{path}\n" for path in wanted))


def _libraries(pid: int) -> set[str]:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[5] for line in lines if line.count("/") and ".so" in line}
    return set()


def _size(path: str) -> int:
    with suppress(OSError):
        return Path(path).stat().st_size
    return 0
