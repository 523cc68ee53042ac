"""Parquet files of calibration text, read by the quantizer's own Python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from builder import calibration
from builder.build import cache_folder
from builder.quantize import _JOB, ensure_environment, job_environment
from builder.report import SilentReporter

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS: list[dict[str, Any]] = [
    {"text": "a", "id": 1},
    {"messages": [{**message, "name": None} for message in CHAT]},
    {"text": None},
    {"prompt": "2+2=", "completion": "4"},
]
_WRITE = """
import json, sys
import pyarrow, pyarrow.parquet
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(json.loads(sys.argv[2])), sys.argv[1])
"""
_READ = """
import json, runpy, sys
print(json.dumps(list(runpy.run_path(sys.argv[2])["parquet_documents"](sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    return ensure_environment(cache_folder().absolute(), SilentReporter())


def _run(python: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), "-I", "-c", code, *arguments],
        env=job_environment(os.environ, Path("/tmp")),
        capture_output=True,
        text=True,
        check=False,
    )


def test_rows_become_the_documents_of_a_calibration_file(python: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    rows = json.dumps(
        [{"text": None, "messages": None, "prompt": None, "completion": None, **row} for row in ROWS]
    )
    written = _run(python, _WRITE, str(path), rows)
    assert written.returncode == 0, written.stderr
    assert calibration.read(path).parquet == path
    read = _run(python, _READ, str(path), str(_JOB))
    assert json.loads(read.stdout) == ["a", CHAT, "2+2=4"], read.stderr


def test_missing_columns_are_told(python: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    assert _run(python, _WRITE, str(path), '[{"question": "?"}]').returncode == 0
    read = _run(python, _READ, str(path), str(_JOB))
    assert "has no column text or messages" in read.stderr
    assert "Traceback" not in read.stderr
