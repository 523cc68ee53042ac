"""JSON output: of our own lines, of loggers, of children that know nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# A process as PID 1 is one: it logs, its children log and print, one dies with a traceback.
PROGRAM = """
import logging, os, subprocess, sys
from runtime import logs
logs.begin("json")
print("before", flush=True)
with logs.as_json():
    logs.say("from us", "warning")
    print("printed\\rprogress 50%\\rprogress 100%", flush=True)
    os.system("echo from a child; echo to stderr >&2")
    code = "from runtime import logs; import logging; logs.configure('INFO')\\n"
    code += "logging.getLogger('vllm.x').info('two\\\\nlines')\\n"
    code += "try: 1/0\\nexcept ZeroDivisionError: logging.getLogger('uvicorn.error').exception('failed')\\n"
    code += "raise SystemExit('dead')"
    subprocess.run([sys.executable, "-c", code])
    os.write(1, b"no line end")
print("after", flush=True)
"""


def test_every_line_is_one_json_object() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1], done.stderr) == ("before", "after", "")
    records: list[dict[str, Any]] = [json.loads(line) for line in lines[1:-1]]
    required = {"time", "level", "message", "logger", "process", "start"}
    assert all(required <= set(record) for record in records)
    assert len({record["start"] for record in records}) == 1
    assert len(records[0]["start"]) == 16
    by_message = {record["message"]: record for record in records}
    assert (by_message["from us"]["level"], by_message["from us"]["logger"]) == ("warning", "coldstart")
    expected = {
        "printed",
        "progress 50%",
        "progress 100%",
        "from a child",
        "to stderr",
        "dead",
        "no line end",
    }
    assert expected <= set(by_message)
    assert by_message["two\nlines"]["logger"] == "vllm.x"
    assert "ZeroDivisionError" in by_message["failed"]["exception"]
    assert by_message["failed"]["level"] == "error"


def test_text_is_as_it_was() -> None:
    code = "from runtime import logs; logs.begin('text'); logs.say('words')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "coldstart: words\n")
