"""The runtime's download, in a process as PID 1 starts it: the real hub client against a hub on loopback."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from huggingface_hub import errors

from runtime import fetch
from runtime.fetch import FETCHED, _reason
from runtime.settings import Manifest
from tests.hub import COMMIT, Hub, serve
from tests.models import write_model

REPO = "org/tiny-model"
TOKEN = "hf_" + "x" * 34
WEIGHTS = "model-00001-of-00002.safetensors"
LOCKED = ("config.json", "tokenizer.json", WEIGHTS, "model-00002-of-00002.safetensors")


@dataclass
class Setup:
    """A hub, an image's manifest of a model on it, and the folder where the model is to be."""

    hub: Hub
    root: Path
    manifest: Path
    environ: dict[str, str]

    def start(self, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "runtime", "fetch"],
            env={**os.environ, **self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **environ: str) -> tuple[int, str]:
        """Exit code and last line; nothing else may be printed that a user would not understand."""
        process = self.start(**environ)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        assert TOKEN not in out + err
        return process.returncode, out.splitlines()[-1]

    def fetched(self) -> set[str]:
        """Names of the files that were asked for since the last time."""
        asked = [
            request for request in self.hub.requests if request.startswith("GET") and "/resolve/" in request
        ]
        self.hub.requests.clear()
        return {request.split(f"/resolve/{COMMIT}/")[1] for request in asked}

    def files(self) -> dict[str, bytes]:
        found = {p.relative_to(self.root).as_posix(): p for p in self.root.rglob("*") if p.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".cache/")}


def _manifest(folder: Path, root: Path, revision: str, names: tuple[str, ...]) -> str:
    files = [
        {"path": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()}
        for n, d in ((name, (folder / name).read_bytes()) for name in names)
    ]
    model = {"path": str(root), "served_name": "x", "source": f"hf://{REPO}", "revision": revision}
    return json.dumps(
        {"device": "cpu", "engine_args": [], "weights": "download", "model": {**model, "files": files}}
    )


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    folder = write_model(tmp_path / "repository", shards=2)
    root, manifest = tmp_path / "models" / "tiny", tmp_path / "manifest.json"
    manifest.write_text(_manifest(folder, root, COMMIT, LOCKED))
    with serve(REPO, folder) as hub:
        environ = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "COLDSTART_MANIFEST": str(manifest),
        }
        yield Setup(hub, root, manifest, environ)


def test_exactly_the_locked_files_come_at_the_locked_commit(setup: Setup, tmp_path: Path) -> None:
    setup.hub.push("f" * 40, write_model(tmp_path / "moved-on"))
    assert setup.run() == (0, FETCHED)
    assert setup.files() == {name: (setup.hub.folder / name).read_bytes() for name in LOCKED}
    assert setup.fetched() == set(LOCKED)


def test_whole_files_are_kept_without_asking_the_hub(setup: Setup) -> None:
    setup.run()
    setup.hub.requests.clear()
    assert setup.run(HF_HUB_OFFLINE="1") == (0, FETCHED)
    assert setup.hub.requests == []


@pytest.mark.parametrize("damage", [b"", b"longer than it was" * 99, None])
def test_only_what_is_not_whole_is_fetched_again(setup: Setup, damage: bytes | None) -> None:
    setup.run()
    setup.fetched()
    path = setup.root / WEIGHTS
    same_size = path.read_bytes()[:-1] + b"?"
    path.write_bytes(same_size if damage is None else damage)
    assert setup.run() == (0, FETCHED)
    assert setup.fetched() == {WEIGHTS}
    assert path.read_bytes() == (setup.hub.folder / WEIGHTS).read_bytes()


def test_file_that_arrives_damaged_is_fetched_once_more_and_refused(setup: Setup) -> None:
    true = (setup.hub.folder / "tokenizer.json").read_bytes()
    setup.hub.lies = {"tokenizer.json": b"!" * len(true)}
    code, line = setup.run()
    assert code == 1
    assert "tokenizer.json of hf://org/tiny-model arrived damaged twice" in line
    asked = [r for r in setup.hub.requests if r == f"GET /{REPO}/resolve/{COMMIT}/tokenizer.json"]
    assert len(asked) == 2


def test_download_that_was_killed_starts_again_and_leaves_nothing(setup: Setup) -> None:
    setup.hub.stalled.add(WEIGHTS)
    with setup.start() as process:
        while not list(setup.root.rglob("*.incomplete")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    left = list(setup.root.rglob("*.incomplete"))
    setup.hub.stalled.clear()
    assert left
    assert setup.run() == (0, FETCHED)
    assert not list(setup.root.rglob("*.incomplete"))


def test_sigterm_ends_a_download_at_once(setup: Setup) -> None:
    setup.hub.stalled.add(WEIGHTS)
    with setup.start() as process:
        while not list(setup.root.rglob("*.incomplete")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0  # the file itself would never end


def test_kept_volume_of_another_commit_loses_only_what_was_fetched(setup: Setup, tmp_path: Path) -> None:
    setup.run()
    (setup.root / "notes.md").write_text("the user's own")
    folder = write_model(tmp_path / "next")
    setup.hub.push("f" * 40, folder)
    names = ("config.json", "tokenizer.json", "model.safetensors")
    setup.manifest.write_text(_manifest(folder, setup.root, "f" * 40, names))
    assert setup.run() == (0, FETCHED)
    assert set(setup.files()) == {*names, "notes.md"}


def test_containers_that_share_a_volume_take_turns(setup: Setup) -> None:
    setup.hub.stalled.add(WEIGHTS)
    with setup.start() as first:
        while not list(setup.root.rglob("*.incomplete")):
            assert first.poll() is None
            time.sleep(0.05)
        with setup.start() as second:
            while not _has_open(second, "coldstart.lock"):
                assert second.poll() is None
                time.sleep(0.05)
            time.sleep(0.5)  # what it would do to the other's half-written files, it would do by now
            setup.hub.stalled.clear()
            answers = [process.communicate(timeout=60)[0].splitlines()[-1] for process in (first, second)]
    assert answers == [FETCHED, FETCHED]
    assert setup.files() == {name: (setup.hub.folder / name).read_bytes() for name in LOCKED}


def test_waiting_for_another_container_is_progress(setup: Setup, tmp_path: Path) -> None:
    (setup.root / ".cache").mkdir(parents=True)
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "events"))
    receiver.settimeout(30)
    with receiver, (setup.root / ".cache" / "coldstart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with setup.start(COLDSTART_EVENTS=str(tmp_path / "events")) as process:
            details = [json.loads(receiver.recv(65536))["begin"]["detail"] for _ in range(3)]
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert process.communicate(timeout=60)[0].splitlines()[-1] == FETCHED
    assert details == ["", *["waiting for another container"] * 2]


def test_checking_what_is_there_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("runtime.trace.announce", lambda _phase, _started, detail: said.append(detail))
    monkeypatch.setattr(fetch, "_TICK_SECONDS", 0.01)
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    with fetch._progress(tmp_path, 1 << 20, 0.0):
        _wait_for(lambda: len(said) == 1)
        time.sleep(0.1)
        assert len(said) == 1  # nothing happens
        (tmp_path / "weights").read_bytes()
        _wait_for(lambda: len(said) == 2)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _has_open(process: subprocess.Popen[str], name: str) -> bool:
    found = []
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):  # closed this moment
            found.append(link.readlink().name)
    return name in found


def test_progress_and_the_end_are_reported_as_one_phase(setup: Setup, tmp_path: Path) -> None:
    setup.hub.stalled.add(WEIGHTS)
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "events"))
    receiver.settimeout(30)
    with receiver, setup.start(COLDSTART_EVENTS=str(tmp_path / "events")) as process:
        messages = [json.loads(receiver.recv(65536)) for _ in range(2)]
        setup.hub.stalled.clear()
        out, err = process.communicate(timeout=60)
        assert out.splitlines()[-1] == FETCHED, err
        while "event" not in messages[-1]:
            messages.append(json.loads(receiver.recv(65536)))
    begins = [message["begin"] for message in messages[:-1]]
    event = messages[-1]["event"]
    assert {(begin["phase"], begin["start"]) for begin in begins} == {("model_download", event["start"])}
    assert begins[0]["detail"] == ""
    assert all(" of " in begin["detail"] for begin in begins[1:])
    assert (event["phase"], event["process"]) == ("model_download", "fetch")
    assert event["detail"].endswith("downloaded")


@pytest.mark.parametrize("how", ["cuts", "resets"])
def test_cut_body_is_gone_on_with(setup: Setup, how: str) -> None:
    getattr(setup.hub, how)[WEIGHTS] = 2
    assert setup.run() == (0, FETCHED)
    assert getattr(setup.hub, how)[WEIGHTS] == -1  # twice, then whole
    assert setup.files() == {name: (setup.hub.folder / name).read_bytes() for name in LOCKED}


@pytest.mark.parametrize("status", [408, 429, 500, 504])
def test_what_passes_is_waited_for(setup: Setup, status: int) -> None:
    for command in ("HEAD", "GET"):  # metadata, and the body
        setup.hub.refuse(f"/{REPO}/resolve/{COMMIT}/{WEIGHTS}", status, command=command, times=2)
    assert setup.run() == (0, FETCHED)
    assert [refusal.times for refusal in setup.hub.refusals] == [0, 0]


def test_what_does_not_pass_is_given_up(setup: Setup) -> None:
    setup.hub.refuse(f"/{REPO}/resolve/{COMMIT}/{WEIGHTS}", 500, command="GET")
    code, line = setup.run()
    assert code == 1
    assert "the hub answered 500" in line
    asked = [r for r in setup.hub.requests if r == f"GET /{REPO}/resolve/{COMMIT}/{WEIGHTS}"]
    assert len(asked) == 6


def _refuse(status: int, code: str = "") -> Callable[[Setup], None]:
    return lambda setup: setup.hub.refuse(f"/{REPO}/resolve", status, code)


def _blocked(setup: Setup) -> None:
    setup.root.parent.mkdir()
    setup.root.write_text("a file where the folder should be")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_refuse(403, "GatedRepo"), "is gated"),
        (_refuse(401), "HF_TOKEN"),
        (_refuse(403), "the hub answered 403"),
        (_refuse(404, "RepoNotFound"), "is not on the hub, or is private"),
        (_refuse(404, "RevisionNotFound"), f"is gone from the hub at {COMMIT}"),
        (_refuse(404, "EntryNotFound"), f"is gone from the hub at {COMMIT}"),
        (_refuse(429), "too many requests"),
        (_refuse(503), "the hub answered 503"),
        (_blocked, "cannot read or write"),
        (lambda setup: setup.environ.update(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_one_line_says_what_to_do(setup: Setup, prepare: Callable[[Setup], None], words: str) -> None:
    prepare(setup)
    code, line = setup.run(HF_TOKEN=TOKEN)
    assert code == 1
    assert words in line


@pytest.mark.parametrize(
    ("status", "words"),
    [(429, "too many requests"), (500, "the hub answered 500"), (None, "check the container's network")],
)
def test_what_the_client_retries_for_long_is_told_too(status: int | None, words: str, tmp_path: Path) -> None:
    error: Exception = errors.OfflineModeIsEnabled("a secret address")
    if status:
        answer = httpx.Response(status, request=httpx.Request("GET", "http://hub/secret"))
        error = errors.HfHubHTTPError("a secret address", response=cast(Any, answer))
    line = _reason(error, "config.json", Manifest("/models/x", "x", "cpu", ()))
    assert words in line
    assert "secret" not in line


def test_full_disk_is_told_before_the_download(setup: Setup) -> None:
    data = json.loads(setup.manifest.read_text())
    data["model"]["files"][0]["size"] = 1 << 60
    setup.manifest.write_text(json.dumps(data))
    code, line = setup.run()
    assert code == 1
    assert "mount a larger volume" in line
    assert setup.fetched() == set()
