from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from builder import build, context, models
from builder.errors import HostError, InputError
from builder.files import finished_folder, require_space
from builder.plan import BaseImage
from builder.probe import parse_argument_list, parse_base_facts, parser_complaint
from builder.report import SilentReporter
from builder.verify import _TOKEN_VARIABLE
from tests.models import write_model

_Usage = namedtuple("_Usage", "total used free")


def test_full_disk_is_told_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(10**12, 10**12 - 2 * 10**9, 2 * 10**9))
    build._require_engine_space(str(tmp_path), 10**8)
    with pytest.raises(HostError, match=r"the build needs 3.1 GB of disk space .*2.0 GB are free"):
        build._require_engine_space(str(tmp_path), 2 * 10**9)


def test_disk_of_a_remote_engine_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(1, 1, 0))
    build._require_engine_space(str(tmp_path / "not-on-this-machine"), 10**12)


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(9, 6, 3) if path == tmp_path else None)
    folder = tmp_path / "not" / "there" / "yet"
    require_space(folder, 3, what="this needs", fix="Free some.")
    with pytest.raises(HostError, match=r"this needs 0\.0 GB of disk space in .*Free some"):
        require_space(folder, 4, what="this needs", fix="Free some.")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_is_told_and_leaves_no_folder(tmp_path: Path, number: int) -> None:
    told = pytest.raises(HostError, match="cannot finish .*Free some disk space")
    with told, finished_folder(tmp_path / "result") as partial:
        (partial / "half").touch()
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []
    # What has nothing to do with the disk stays what it is.
    with pytest.raises(FileNotFoundError), finished_folder(tmp_path / "result"):
        (tmp_path / "missing").read_bytes()


def test_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLDSTART_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", "no usable python3"),
        ("exec: python3: not found", "no usable python3"),
        ('{"python": [3, 8], "vllm": "0.32.0"}', "Python 3.8"),
        ('{"python": [3, 12], "vllm": null}', "no vLLM"),
        ('{"python": 3}', "no usable python3"),
    ],
)
def test_base_that_cannot_serve_is_refused(output: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_base_facts("base:1", output)


def test_base_facts_are_the_last_line() -> None:
    facts = parse_base_facts("base:1", 'warning: x\n{"python": [3, 12], "vllm": "0.32.0"}\n')
    assert (facts.python, facts.vllm) == ((3, 12), "0.32.0")


@pytest.mark.parametrize(
    ("variable", "is_token"),
    [
        ("HF_TOKEN=x", True),
        ("S3_SECRET=x", True),
        ("OPENAI_API_KEY=x", True),
        ("HF_TOKEN=", False),
        ("TOKENIZERS_PARALLELISM=false", False),
        ("PATH=/usr/bin", False),
    ],
)
def test_variables_that_hold_tokens(variable: str, is_token: bool) -> None:
    assert bool(_TOKEN_VARIABLE.match(variable)) == is_token


def test_complaint_is_the_line_that_says_why() -> None:
    output = "INFO loading\nvllm: error: argument --max-model-len: invalid int value: 'x'\n"
    assert parser_complaint(output) == "argument --max-model-len: invalid int value: 'x'"
    assert parser_complaint("boom") == "boom"


def test_argument_list_is_found_among_what_vllm_logs() -> None:
    output = 'INFO [{loading\n[{"group": "g", "flags": ["--x"], "help": ""}]\nwarning: y\n'
    assert json.loads(parse_argument_list(output) or "")[0]["flags"] == ["--x"]
    assert parse_argument_list("Traceback\n") is None


def test_base_is_asked_for_its_arguments_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDSTART_CACHE", str(tmp_path))
    asked: list[str] = []

    class Engine:
        def list_engine_args(self, base: BaseImage) -> str | None:
            asked.append(base.reference)
            return None if base.reference == "odd:1" else "[]\n"

    def arguments(reference: str, identity: str) -> str | None:
        base = BaseImage(reference, identity, "cpu")
        return build.with_argument_list(base, cast(Any, Engine()), SilentReporter()).vllm_arguments

    assert arguments("base:1", "sha256:a") == arguments("base:1", "sha256:a") == "[]\n"
    assert asked == ["base:1"]
    assert arguments("base:1", "sha256:b") == "[]\n"
    assert arguments("odd:1", "sha256:c") is None
    assert asked == ["base:1", "base:1", "odd:1"]


def test_mountable_folder_is_the_users_own_where_a_container_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTART_CACHE", str(tmp_path / "cache"))
    root = write_model(tmp_path / "model")
    for path in root.iterdir():
        path.chmod(0o644)
    snapshot = models.resolve(models.parse_ref(str(root)), SilentReporter())
    root.chmod(0o755)
    assert build._mountable(snapshot, SilentReporter()) == root
    (root / "model.safetensors").chmod(0o600)
    (root / "blob").write_bytes((root / "config.json").read_bytes())
    (root / "config.json").unlink()
    (root / "config.json").symlink_to("blob")  # as in the hub's cache
    folder = build._mountable(snapshot, SilentReporter())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        file.path: (root / file.path).read_bytes() for file in snapshot.lock.files
    }
    assert all(path.stat().st_mode & 0o777 == 0o644 and not path.is_symlink() for path in folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o755
    assert build._mountable(snapshot, SilentReporter()) == folder
    (folder.parent / "private").mkdir(mode=0o700)
    for file in snapshot.lock.files:
        (folder / file.path).rename(folder.parent / "private" / file.path)
    private = models.ModelSnapshot(snapshot.lock, folder.parent / "private")
    folder.rmdir()
    assert build._mountable(private, SilentReporter()) == folder


def test_mountable_folder_is_made_once_and_a_killed_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTART_CACHE", str(tmp_path / "cache"))
    root = write_model(tmp_path / "model")
    (root / "model.safetensors").chmod(0o600)
    snapshot = models.resolve(models.parse_ref(str(root)), SilentReporter())
    digest = snapshot.lock.digest[:16]
    left = tmp_path / "cache" / "mount" / f".{digest}.partial"
    left.mkdir(parents=True)
    (left / "half").touch()
    made = 0
    both, write = threading.Event(), context.write_files

    def slow(*arguments: Any) -> None:
        nonlocal made
        made += 1
        both.wait(10)
        write(*arguments)

    class Waiting(SilentReporter):
        def note(self, text: str) -> None:
            assert text.startswith("Waiting: ")
            both.set()

    monkeypatch.setattr(context, "write_files", slow)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: build._mountable(snapshot, Waiting()), range(2))
    assert one == two
    assert made == 1
    names = {path.name for path in one.parent.iterdir()}
    assert names == {digest, f"{digest}.lock"}
    assert {path.name for path in one.iterdir()} == {file.path for file in snapshot.lock.files}
