"""Images without weights, on real starts: downloaded from a hub on this machine, or mounted."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.docker_engine import Container, DockerEngine
from tests.hub import Hub, serve
from tests.image.conftest import (
    ENGINE_ARGS,
    PREFIX,
    ask,
    coldstart,
    get,
    wait_healthy,
    wait_ready,
    wait_until,
)
from tests.image.test_serving import CPU_PHASES

REPO = f"{PREFIX}/SmolLM2-135M-Instruct"
FOLDER = "/models/SmolLM2-135M-Instruct"
TOKEN = "hf_" + "t" * 34
# As platforms that give every project a UID of its own run it.
ANY_USER = ("--user", "12345:0")
STARTUP = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/startup').read().decode())"
ENVIRON = "import sys; print(open(f'/proc/{sys.argv[1]}/environ').read().replace(chr(0), chr(10)))"


@pytest.fixture(scope="module")
def hub(model: str) -> Iterator[Hub]:
    """Where containers on the default bridge reach it."""
    gateway = subprocess.run(
        ["docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    with serve(REPO, Path(model), host=gateway.stdout.strip()) as served:
        yield served


@pytest.fixture(scope="module")
def downloading(
    engine: DockerEngine, hub: Hub, base: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    tag = f"{PREFIX}/smollm2:download"
    home = tmp_path_factory.mktemp("hub")
    done = coldstart(
        *("build", REPO, "--weights", "download", "--base", base, "-t", tag, "--json", "--", *ENGINE_ARGS),
        env={"HF_ENDPOINT": hub.url, "HF_HOME": str(home)},
    )
    assert done.code == 0, done.err
    assert not list(home.rglob("*.safetensors"))  # the weights never were on the build host
    yield done.json
    engine.remove_image(tag)


@pytest.fixture(scope="module")
def mounted(build: Callable[..., Any]) -> Any:
    return build("smollm2:mount", "--prewarm", "--weights", "mount")


@pytest.fixture(scope="module")
def volume() -> Iterator[str]:
    name = f"{PREFIX}-{uuid.uuid4().hex[:12]}"
    subprocess.run(["docker", "volume", "create", name], check=True, capture_output=True)
    yield name
    subprocess.run(["docker", "volume", "rm", name], check=True, capture_output=True)


@pytest.fixture
def docker_run(engine: DockerEngine) -> Iterator[Callable[..., Container]]:
    """docker_run(image, *flags) -> a container, as `docker run -d` starts it; removed after the test."""
    containers: list[Container] = []

    def run(image: str, *flags: str) -> Container:
        name = f"coldstart-{uuid.uuid4().hex[:12]}"
        containers.append(Container(engine._client, name, time.time()))
        subprocess.run(
            ["docker", "run", "-d", "--name", name, *flags, image], check=True, capture_output=True
        )
        return containers[-1]

    yield run
    for container in containers:
        container.remove()


def _download_phase(startup: Any) -> Any:
    """The one event of the download, of a start that has all phases."""
    assert {event["phase"] for event in startup["phases"]} == CPU_PHASES
    [event] = [event for event in startup["phases"] if event["phase"] == "model_download"]
    return event


def _engine_environments(container: Container, startup: Any) -> list[list[str]]:
    pids = {e["pid"] for e in startup["phases"] if e["process"] in ("template", "api", "EngineCore")}
    outputs = [container.run(["python3", "-c", ENVIRON, str(pid)]) for pid in pids]
    assert [code for code, _ in outputs] == [0, 0, 0]
    return [output.splitlines() for _, output in outputs]


def _running(container: Container) -> dict[str, str]:
    """Phase -> detail of what /startup says is under way."""
    try:
        return {row["phase"]: row["detail"] for row in get(container, "/startup").json["running"]}
    except OSError:
        return {}


@pytest.mark.parametrize("image", ["downloading", "mounted"])
def test_image_is_small_and_verified(
    image: str, request: pytest.FixtureRequest, engine: DockerEngine, base: str
) -> None:
    built = request.getfixturevalue(image)
    added = engine.require_image(built["tag"]).size - engine.require_image(base).size
    assert added < 8 << 20  # the runtime, and the recorded start where there is one
    assert built["weights_image"] is None
    done = coldstart("verify", built["tag"], "--json")
    assert done.code == 0, done.out


def test_downloaded_model_serves(
    downloading: Any, hub: Hub, volume: str, engine: DockerEngine, docker_run: Callable[..., Container]
) -> None:
    environment = engine.require_image(downloading["tag"]).environment
    assert not any(entry.startswith(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")) for entry in environment)
    hub.stalled.add("model.safetensors")
    container = docker_run(
        downloading["tag"],
        *(*ANY_USER, "-v", f"{volume}:/models", "-p", "127.0.0.1::8000"),
        *("-e", f"HF_ENDPOINT={hub.url}", "-e", f"HF_TOKEN={TOKEN}"),
    )
    wait_until(lambda: " of 27" in _running(container).get("model_download", ""), container)
    assert get(container, "/health").status == 200
    assert get(container, "/ready").status == 503
    hub.stalled.clear()
    wait_ready(container)
    assert "Paris" in ask(container)["chat"]
    startup = get(container, "/startup").json
    event = _download_phase(startup)
    assert event["process"] == "fetch"
    assert event["detail"].endswith("downloaded")
    for entries in _engine_environments(container, startup):
        assert "HF_HUB_OFFLINE=1" in entries
        assert not any(entry.startswith("HF_TOKEN") for entry in entries)
    assert TOKEN not in container.logs()


def test_kept_volume_starts_with_no_network_and_no_writable_root(
    downloading: Any, volume: str, docker_run: Callable[..., Container]
) -> None:
    container = docker_run(
        downloading["tag"],
        *(*ANY_USER, "-v", f"{volume}:/models", "--network", "none", "--read-only", "--tmpfs", "/tmp:exec"),
    )
    wait_healthy(container)
    assert "Paris" in ask(container)["chat"]
    event = _download_phase(json.loads(container.run(["python3", "-c", STARTUP])[1]))
    assert event["detail"].endswith("here already")


def test_file_with_another_digest_ends_the_start(
    downloading: Any, hub: Hub, model: str, docker_run: Callable[..., Container]
) -> None:
    hub.lies = {"tokenizer.json": b"!" * (Path(model) / "tokenizer.json").stat().st_size}
    try:
        container = docker_run(downloading["tag"], "-e", f"HF_ENDPOINT={hub.url}")
        assert container.wait(120) == 4
    finally:
        hub.lies = {}
    assert "exit 4: failed: tokenizer.json of hf://" in container.logs().splitlines()[-1]
    assert "Traceback" not in container.logs()


def test_sigterm_during_the_download_exits_cleanly(
    downloading: Any, hub: Hub, docker_run: Callable[..., Container]
) -> None:
    hub.stalled.add("model.safetensors")
    container = docker_run(downloading["tag"], "-e", f"HF_ENDPOINT={hub.url}", "-p", "127.0.0.1::8000")
    wait_until(lambda: "MB of" in _running(container).get("model_download", ""), container)
    # A SIGKILL, which follows when SIGTERM is not obeyed, would give 137; the download would never end.
    assert container.stop(20) == 0, container.logs()[-2000:]
    hub.stalled.clear()


def test_mounted_model_serves_with_no_network(mounted: Any, docker_run: Callable[..., Container]) -> None:
    container = docker_run(mounted["tag"], "-v", f"{mounted['mount']}:{FOLDER}:ro", "--network", "none")
    wait_healthy(container)
    assert "Paris" in ask(container)["chat"]
    startup = json.loads(container.run(["python3", "-c", STARTUP])[1])
    event = _download_phase(startup)
    assert (event["detail"], event["start"]) == ("mounted", event["end"])
    assert startup["recording"]["status"] == "used"  # the build mounts the model to start the image
    for entries in _engine_environments(container, startup):
        assert "HF_HUB_OFFLINE=1" in entries


def test_verify_starts_what_it_can_mount(mounted: Any) -> None:
    alone = coldstart("verify", mounted["tag"], "--json")
    assert "its weights are not in it" in alone.err
    done = coldstart("verify", mounted["tag"], "--json", "--mount", mounted["mount"])
    assert done.code == 0, done.err
    assert {check["name"] for check in done.json["checks"]} >= {"starts", "recording"}


@pytest.mark.parametrize(
    ("image", "flags", "words"),
    [
        ("mounted", (), f"-v FOLDER:{FOLDER}:ro"),
        ("downloading", ("--read-only",), "-v VOLUME:/models"),
        ("downloading", ("--user", "12345:12345"), "user 12345:12345 cannot write"),
    ],
)
def test_missing_mount_is_told(
    image: str,
    flags: tuple[str, ...],
    words: str,
    request: pytest.FixtureRequest,
    docker_run: Callable[..., Container],
) -> None:
    container = docker_run(request.getfixturevalue(image)["tag"], *flags)
    assert container.wait(60) == 3
    [line] = container.logs().splitlines()
    assert words in line
