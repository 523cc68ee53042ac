"""Real images of the real model, built once for all tests by the command line that users have."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest

from builder.build import cache_folder
from builder.docker_engine import CONTAINER_PREFIX, Container, DockerEngine
from builder.quantize import ensure_environment, job_environment
from builder.report import SilentReporter
from runtime.preflight import lacks_avx512
from tests.models import write_llama

ASK = Path(__file__).parent / "ask.py"
# Of the images that are built; another one keeps two suites on one engine apart.
PREFIX = os.environ.get("COLDSTART_TEST_PREFIX", "coldstart-test")
# A quarter of the default: quantizing takes minutes on a CPU without AVX-512.
QUANTIZE = ("--quantize", "awq", "--calibration-samples", "4")
# A CPU without AVX-512 computes a model of 16-bit floats in float32, unless it is told otherwise.
FLOAT32 = lacks_avx512(Path("/proc/cpuinfo").read_text())
EAGER = "eager-float32" if FLOAT32 else "eager"
READY_SECONDS = 300
# A short context keeps the KV cache's bookkeeping small; the shortest drain that still is one.
ENGINE_ARGS = ("--max-model-len", "2048")
# Of the tiny model.
TINY_ARGS = ("--max-model-len", "512", "--kv-cache-memory-bytes", "100000000")


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def coldstart(*arguments: str, env: dict[str, str] | None = None) -> Finished:
    """The command as installed, in a process of its own."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "coldstart"), *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def get(container: Container, path: str) -> Reply:
    url = f"http://127.0.0.1:{container.host_port()}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return Reply(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        return Reply(error.code, dict(error.headers), error.read())


def wait_until(condition: Callable[[], bool], container: Container, seconds: float = READY_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if not container.running():
            pytest.fail(f"the container exited with {container.exit_code()}:\n{container.logs()[-3000:]}")
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s:\n{container.logs()[-3000:]}")
        time.sleep(0.1)


def _answers(container: Container, path: str, status: int) -> bool:
    try:
        return get(container, path).status == status
    except OSError:
        return False


def ask(container: Container) -> Any:
    """The model's name and its answer to one chat question, asked inside the container."""
    code, output = container.run(["python3", "-c", ASK.read_text()])
    assert code == 0, output
    return json.loads(output.strip().splitlines()[-1])


def wait_healthy(container: Container) -> None:
    """By the image's own check, for containers without a port that is published."""
    wait_until(lambda: container.run(["python3", "-m", "runtime", "health"])[0] == 0, container)


def wait_ready(container: Container) -> None:
    wait_until(lambda: _answers(container, "/ready", 200), container)


def in_base(base: str, script: str) -> Any:
    """The RESULT of a script of this folder, run in the base with the runtime beside it and no network."""
    here = Path(__file__).parent
    volumes = {
        str(here): {"bind": "/scripts", "mode": "ro"},
        str(here.parent.parent / "runtime"): {"bind": "/packages/runtime", "mode": "ro"},
    }
    output = docker.from_env(timeout=600).containers.run(
        base, entrypoint=["python3", f"/scripts/{script}"], volumes=volumes, network_mode="none", remove=True
    )
    return result_of(output)


def result_of(output: bytes) -> Any:
    """The JSON of the one line that begins with RESULT."""
    (line,) = [line for line in output.decode().splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def tiny_models(*arguments: str | Path, home: Path) -> bytes:
    """tiny_models.py on the quantizer's Python: its stdout."""
    python = ensure_environment(cache_folder().absolute(), SilentReporter())
    return subprocess.run(
        [python, "-I", Path(__file__).with_name("tiny_models.py"), *arguments],
        env=job_environment(os.environ, home),
        check=True,
        capture_output=True,
    ).stdout


def share_quantizer(cache: Path) -> Path:
    """A cache of a test's own, which has the quantizer's environment that is shared."""
    python = ensure_environment(cache_folder().absolute(), SilentReporter())
    cache.mkdir(exist_ok=True)
    if not (cache / "quantizer").exists():
        (cache / "quantizer").symlink_to(python.parents[2])
    return cache


@pytest.fixture(scope="session")
def engine() -> DockerEngine:
    return DockerEngine()


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["COLDSTART_TEST_MODEL"]


@pytest.fixture(scope="session")
def base() -> str:
    return os.environ["COLDSTART_TEST_BASE"]


@pytest.fixture(scope="session")
def build(engine: DockerEngine, model: str, base: str) -> Iterator[Callable[..., Any]]:
    """build(tag, *flags) -> the JSON of `coldstart build`, and what it told as `stderr`; the tags are removed
    at the end.

    folder: another model than the real one; started once here only when a flag asks for that.
    """
    tags: list[str] = []

    def run(
        name: str,
        *flags: str,
        engine_args: Sequence[str] = ENGINE_ARGS,
        folder: Path | None = None,
        base: str = base,
    ) -> Any:
        tag = f"{PREFIX}/{name}"
        flags = ("--no-prewarm", "--optimize", "startup", *flags)
        done = coldstart(
            *("build", str(folder or model), "--base", base, "-t", tag, "--json", *flags), "--", *engine_args
        )
        assert done.code == 0, done.err
        tags.append(tag)
        return {**done.json, "stderr": done.err}

    yield run
    for tag in dict.fromkeys(tags):
        engine.remove_image(tag)


@pytest.fixture(scope="session")
def plain(build: Callable[..., Any]) -> Any:
    return build("smollm2:plain", "--prewarm")


@pytest.fixture(scope="session")
def tiny_folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that divides by two workers."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", Path(model), shards=3)


@pytest.fixture(scope="session")
def awq(build: Callable[..., Any]) -> Any:
    return build("smollm2:awq", *QUANTIZE)


@pytest.fixture
def start(engine: DockerEngine) -> Iterator[Callable[..., Container]]:
    """start(image, **options) -> a container, removed after the test."""
    containers: list[Container] = []

    def run(image: str, **options: Any) -> Container:
        containers.append(engine.start(image, **options))
        return containers[-1]

    yield run
    for container in containers:
        container.remove()


@pytest.fixture
def run(engine: DockerEngine) -> Iterator[Callable[..., Container]]:
    """run(options, image, arguments) -> a container of `docker run`, removed after the test."""
    containers: list[Container] = []

    def start(options: tuple[str, ...], image: str, arguments: tuple[str, ...] = ()) -> Container:
        name = f"{CONTAINER_PREFIX}{uuid.uuid4().hex[:12]}"
        containers.append(Container(engine._client, name, time.time()))
        _docker("run", "-d", "--name", name, "-p", "127.0.0.1::8000", *options, image, *arguments)
        return containers[-1]

    yield start
    for container in containers:
        container.remove()


BARE = Path(__file__).parent / "bare.py"


@pytest.fixture
def bare(request: pytest.FixtureRequest) -> Iterator[Callable[..., dict[str, Any]]]:
    """bare(image, scenarios, *docker flags) -> the results of bare.py by name, in one container.

    COLDSTART_TEST_RECORD names a file that gets how long each end took: a figure to look at, no assertion.
    """
    made: list[str] = []

    def run(image: str, scenarios: Sequence[dict[str, Any]], *flags: str) -> dict[str, Any]:
        name = f"{CONTAINER_PREFIX}bare-{uuid.uuid4().hex[:8]}"
        container = _docker(
            "create", "--name", name, "--no-healthcheck", *flags, "--entrypoint", "sleep", image, "infinity"
        ).strip()
        made.append(container)
        _docker("cp", str(BARE), f"{container}:/opt/bare.py")
        _docker("start", container)
        output = _docker("exec", container, "python3", "/opt/bare.py", json.dumps(list(scenarios)))
        results = {result["name"]: result for result in json.loads(output.strip().rpartition("\n")[2])}
        for result in results.values():
            print({key: value for key, value in result.items() if key not in ("log", "phases")})
        record_ends(request.node.name, results)
        return results

    yield run
    for container in made:
        _docker("rm", "--force", "--volumes", container)


def record_ends(test: str, results: dict[str, Any]) -> None:
    """results: by scenario, exit code, last line and the seconds from the fault to the end."""
    path = os.environ.get("COLDSTART_TEST_RECORD")
    if path:
        with Path(path).open("a") as file:
            for name, result in results.items():
                row = {key: result[key] for key in ("code", "seconds", "last_line")}
                file.write(json.dumps({"test": test, "scenario": name, **row}) + "\n")


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A real registry on loopback: its host:port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path / 'data'}\n"
        f"http:\n  addr: {address}\n"
    )
    with subprocess.Popen(["docker-registry", "serve", str(config)], stderr=subprocess.DEVNULL) as process:
        yield address
        process.terminate()
