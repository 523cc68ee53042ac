"""What the container prints: plain text, or one JSON object a line, whoever wrote the line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, TextIO

from runtime import threads

# Set by PID 1 for its children, never by the user.
_FORMAT_VARIABLE = "_COLDSTART_LOG_FORMAT"
_START_VARIABLE = "_COLDSTART_START_ID"
_LINE_BYTES = 1 << 20
_FLUSH_SECONDS = 2.0


def begin(log_format: str) -> str:
    """Choose the format for this process and its children, and a new start id, which is returned."""
    os.environ[_FORMAT_VARIABLE] = log_format
    os.environ[_START_VARIABLE] = secrets.token_hex(8)
    return start_id()


def start_id() -> str:
    """Sixteen hexadecimal digits, new at each start of the container; "" before `begin`."""
    return os.environ.get(_START_VARIABLE, "")


def is_json() -> bool:
    return os.environ.get(_FORMAT_VARIABLE) == "json"


def say(message: str, level: str = "info", process: str = "pid1", stream: TextIO | None = None) -> None:
    """One line from the runtime itself, on stderr unless another stream is given."""
    line = f"coldstart: {message}"
    if is_json():
        line = _line(message, level=level, logger="coldstart", process=process)
    print(line, file=stream or sys.stderr, flush=True)


def _line(
    message: str, *, level: str, logger: str, process: str, time: float | None = None, exception: str = ""
) -> str:
    moment = datetime.now(UTC) if time is None else datetime.fromtimestamp(time, UTC)
    record = {
        "time": moment.isoformat(timespec="milliseconds"),
        "level": level,
        "message": message,
        "logger": logger,
        "process": process,
        "start": start_id(),
    }
    if exception:
        record["exception"] = exception
    return json.dumps(record)


class JsonFormatter(logging.Formatter):
    """A record as one JSON object; vLLM names its processes better than multiprocessing does."""

    def format(self, record: logging.LogRecord) -> str:
        name = getattr(record, "vllm_process_name", record.processName)
        return _line(
            record.getMessage(),
            level=record.levelname.lower(),
            logger=record.name,
            process="template" if name == "MainProcess" else str(name),
            time=record.created,
            exception=self.formatException(record.exc_info) if record.exc_info else "",
        )


def configure(level: str) -> None:
    """Send every logger of this process to stderr as JSON. Forked processes inherit it."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("vllm").setLevel(level)


@contextlib.contextmanager
def as_json() -> Iterator[None]:
    """While it lasts, every line that this process and its children write is JSON, on stdout.

    Lines of our own formatter pass; what else is printed (progress bars, C libraries, tracebacks of a
    dying interpreter) becomes the message of a record. Outside, the output is as it was.
    """
    saved = os.dup(1), os.dup(2)
    reader, writer = os.pipe()
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)
    with os.fdopen(reader, "rb") as source, os.fdopen(os.dup(saved[0]), "w") as out:
        pump = threading.Thread(target=_pump, args=(source, out), daemon=True)
        threads.start(pump)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, original in zip((1, 2), saved, strict=True):
                os.dup2(original, number)  # the last writers but for children, which have been ended
                os.close(original)
            pump.join(_FLUSH_SECONDS)


def _pump(source: IO[bytes], out: IO[str]) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads our output any more
        while raw := source.readline(_LINE_BYTES):
            for text in raw.decode(errors="replace").splitlines():
                if text.strip():
                    out.write(text if _is_ours(text) else _wrap(text))
                    out.write("\n")
            out.flush()


def _is_ours(text: str) -> bool:
    if not text.startswith('{"time": '):
        return False
    try:
        return bool(json.loads(text)["start"] == start_id())
    except (ValueError, KeyError, TypeError):
        return False


def _wrap(text: str) -> str:
    return _line(text.rstrip(), level="info", logger="output", process="unknown")
