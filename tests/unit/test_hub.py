"""The real, unmodified hub client against a hub on loopback, through `coldstart plan --json`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import COMMIT, Hub, serve
from tests.models import write_model

REPO = "org/tiny-model"
TOKEN = "hf_" + "x" * 34


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_model(tmp_path / "repository", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"a second format")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"a third")
    with serve(REPO, folder) as served:
        yield served


def _plan(hub: Hub, home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "DOCKER_HOST": "unix:///no/engine.sock"}
    return subprocess.run(
        [sys.executable, "-m", "builder.cli", "plan", *(arguments or (REPO,)), "--json"],
        env={**os.environ, **env, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_branch_becomes_a_commit_and_only_what_serving_needs_comes(hub: Hub, tmp_path: Path) -> None:
    done = _plan(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["manifest"]["model"]
    assert (model["source"], model["revision"], model["license"]) == (f"hf://{REPO}", COMMIT, "apache-2.0")
    assert (model["served_name"], model["path"]) == (REPO, "/models/tiny-model")
    names = {file["path"] for file in model["files"]}
    assert names == {
        *("config.json", "tokenizer.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    fetched = {request for request in hub.requests if request.startswith("GET") and "/resolve/" in request}
    assert not any("pytorch_model.bin" in request or "original" in request for request in fetched)


def test_second_time_fetches_nothing_and_offline_works(hub: Hub, tmp_path: Path) -> None:
    first = _plan(hub, tmp_path)
    hub.requests.clear()
    again = _plan(hub, tmp_path)
    assert again.stdout == first.stdout
    assert not any(request.startswith("GET") and "/resolve/" in request for request in hub.requests)
    hub.requests.clear()
    offline = _plan(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["manifest"]["model"]["revision"] == COMMIT
    assert hub.requests == []


def test_branch_is_followed_once_and_its_drift_is_shown(hub: Hub, tmp_path: Path) -> None:
    spec = tmp_path / "coldstart.yaml"
    spec.write_text(f"model: {REPO}@main\n")
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "DOCKER_HOST": "unix:///no/engine.sock"}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "builder.cli", *arguments, "-f", str(spec)],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert json.loads(run("plan", "--json"))["drift"] == "new"
    run("render", "-o", str(tmp_path / "first"))
    assert json.loads(run("plan", "--json"))["drift"] == "unchanged"
    hub.push("f" * 40, write_model(tmp_path / "next"))
    assert json.loads(run("plan", "--json"))["drift"] == "upstream changed"
    run("render", "-o", str(tmp_path / "second"))
    first, second = ((tmp_path / name / "weights" / "Dockerfile").read_text() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json"])
def test_flipped_byte_is_found_and_that_file_fetched_again(hub: Hub, tmp_path: Path, name: str) -> None:
    first = _plan(hub, tmp_path)
    [cached] = (tmp_path / "hf").rglob(f"snapshots/*/{name}")
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.resolve().write_bytes(data)
    hub.requests.clear()
    again = _plan(hub, tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert f"{name} is not what the hub has" in again.stderr
    assert {request for request in hub.requests if request.startswith("GET") and "/resolve/" in request} == {
        f"GET /{REPO}/resolve/{COMMIT}/{name}"
    }


def test_file_that_arrives_damaged_every_time_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.lies = {"tokenizer.json": b"[]"}
    done = _plan(hub, tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "tokenizer.json of org/tiny-model arrived damaged twice" in done.stderr


def test_ctrl_c_does_not_wait_for_the_file_under_way(hub: Hub, tmp_path: Path) -> None:
    hub.stalled.set()
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "DOCKER_HOST": "unix:///no/engine.sock"}
    command = [sys.executable, "-m", "builder.cli", "plan", REPO]
    with subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True) as process:
        while not any(request.endswith(".safetensors") for request in list(hub.requests)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)  # the file itself would never end
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    hub.stalled.clear()
    assert _plan(hub, tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("statuses", "arguments", "words"),
    [
        ({}, ("org/other",), "is not on the hub, or is private"),
        ({}, (f"{REPO}@nope",), "has no revision 'nope'"),
        ({"/api/": (403, "GatedRepo")}, (REPO,), "is gated"),
        ({"/api/": (401, "")}, (REPO,), "is not on the hub, or is private"),
        ({"/org/": (403, "GatedRepo")}, (REPO,), "is gated"),
        ({"/api/": (500, "")}, (REPO,), "The hub answered 500"),
    ],
)
def test_refusals_are_told_apart(
    hub: Hub, tmp_path: Path, statuses: dict[str, tuple[int, str]], arguments: tuple[str, ...], words: str
) -> None:
    hub.statuses.update(statuses)
    done = _plan(hub, tmp_path, *arguments, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout) == (3, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
