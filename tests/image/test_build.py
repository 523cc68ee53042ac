"""Builds with real Docker Engine, a real registry and a real base."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.schema import BenchResult
from builder.docker_engine import CONTAINER_PREFIX, Container, DockerEngine
from builder.render import Rendered
from builder.report import SilentReporter
from tests.image.conftest import ENGINE_ARGS, PREFIX, QUANTIZE, ask, coldstart, get, wait_until
from tests.models import write_model

NO_LABEL = "dev.coldstart.test=none"  # these Dockerfiles leave nothing to tell apart


def _tree(engine: DockerEngine, image: str) -> dict[str, tuple[int, int, str]]:
    """Path -> mode, owner and content digest of everything that coldstart puts into an image."""
    tree = {}
    with engine.open_files(image) as walk:
        for folder in ("/models", "/opt/coldstart"):
            for entry, file in walk(folder):
                digest = hashlib.sha256(file.read()).hexdigest() if file else ""
                tree[entry.name] = (entry.mode & 0o7777, entry.uid, digest)
    return tree


def _dangling(engine: DockerEngine) -> set[str]:
    out = subprocess.run(
        ["docker", "image", "ls", "-q", "--filter", "dangling=true"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(out.stdout.split())


def _remove_weights(engine: DockerEngine, output: str) -> None:
    for weights in set(re.findall(r"coldstart/weights:[0-9a-f]{16}", output)):
        engine.remove_image(weights)


def _containers() -> set[str]:
    out = subprocess.run(["docker", "ps", "-aq"], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize("image", ["plain", "awq"])
def test_verify_holds(image: str, request: pytest.FixtureRequest) -> None:
    tag = request.getfixturevalue(image)["tag"]
    done = coldstart("verify", tag, "--json")
    assert done.code == 0, done.out
    assert done.json["ok"]
    assert {check["name"] for check in done.json["checks"]} >= {"labels", "model files", "modes", "no token"}


def test_awq_image_says_what_it_is(awq: Any, plain: Any, engine: DockerEngine) -> None:
    labels = engine.require_image(awq["tag"]).labels
    assert labels["dev.coldstart.quantization"] == "compressed-tensors int4 g64"
    assert labels["dev.coldstart.model.digest"] == awq["model_digest"]
    shards = [
        sum(f["size"] for f in built["manifest"]["model"]["files"] if f["path"].endswith(".safetensors"))
        for built in (awq, plain)
    ]
    assert shards[0] < 0.5 * shards[1]


def test_second_awq_build_does_not_quantize_again(build: Callable[..., Any], awq: Any) -> None:
    again = build("smollm2:awq", *QUANTIZE)
    assert again["weights_reused"]
    assert again["weights_image"] == awq["weights_image"]


def test_changed_engine_argument_sends_no_weight(
    build: Callable[..., Any], plain: Any, engine: DockerEngine
) -> None:
    other = build("smollm2:other", "--served-model-name", "other", engine_args=("--max-model-len", "1024"))
    assert other["weights_reused"]
    first, second = (engine.require_image(built["tag"]).layers for built in (plain, other))
    below = second[:-2]  # the last ones are runtime and manifest, and the runtime's bytecode
    assert first[: len(below)] == below
    labels = engine.require_image(other["tag"]).labels
    assert labels["org.opencontainers.image.title"] == "SmolLM2-135M-Instruct"
    assert other["manifest"]["model"]["served_name"] == "other"


def test_weights_are_in_the_image_once(plain: Any, base: str, engine: DockerEngine) -> None:
    added = engine.require_image(plain["tag"]).size - engine.require_image(base).size
    weights = sum(file["size"] for file in plain["manifest"]["model"]["files"])
    assert weights <= added < weights + (8 << 20)  # the runtime and what was recorded


def test_split_weights_answer_as_the_whole(
    build: Callable[..., Any], plain: Any, start: Callable[..., Container]
) -> None:
    limit = 60 << 20  # the largest tensor has 54 MiB
    split = build("smollm2:split", "--max-shard-size", "60MiB", "--no-prewarm")
    sizes = [
        [
            file["size"]
            for file in image["manifest"]["model"]["files"]
            if file["path"].endswith(".safetensors")
        ]
        for image in (plain, split)
    ]
    assert len(sizes[0]) == 1
    assert len(sizes[1]) >= 5
    assert max(sizes[1]) <= limit
    container = start(split["tag"])
    details: set[str] = set()

    def is_ready() -> bool:
        try:
            startup = get(container, "/startup")
        except OSError:
            return False
        loads = [row for row in startup.json["running"] if row["phase"] == "weight_load"]
        details.update(row["detail"] for row in loads)
        return startup.status == 200

    wait_until(is_ready, container)
    assert ask(container)["chat"] == "The capital of France is Paris."
    # How far it is, while it loads.
    told = [re.fullmatch(r"shard (\d+) of (\d+), \d+ of \d+ MB", detail) for detail in details - {""}]
    assert told
    for found in told:
        assert found, details
        assert 1 <= int(found[1]) <= int(found[2]) == len(sizes[1])


def test_no_package_cache_is_in_the_image(plain: Any, engine: DockerEngine) -> None:
    with engine.open_files(plain["tag"]) as walk:
        kept = [
            entry.name
            for folder in ("/root", "/tmp", "/var/lib/apt/lists", "/var/cache/apt/archives")
            for entry, file in walk(folder)
            if file is not None and entry.size > 100_000
        ]
    assert kept == []


def test_output_of_a_failing_step_is_shown(engine: DockerEngine) -> None:
    nothing = f"{PREFIX}/nothing:1"
    _import_image(engine, nothing)
    try:
        done = coldstart("base", "cpu", "--from", nothing, "-t", f"{PREFIX}/never:1")
        assert done.code == 5
        assert "/bin/sh" in done.err
        assert "Traceback" not in done.err
        assert engine.image(f"{PREFIX}/never:1") is None
    finally:
        engine.remove_image(nothing)


def test_rendered_folders_build_to_the_same_image(
    build: Callable[..., Any], model: str, base: str, engine: DockerEngine, tmp_path: Path
) -> None:
    bare = build("smollm2:bare")
    tag = f"{PREFIX}/rendered:1"
    out = tmp_path / "out"
    flags = ("--base", base, "-t", tag, "--optimize", "startup")
    done = coldstart("render", "-o", str(out), model, *flags, "--", *ENGINE_ARGS)
    assert done.code == 0, done.err
    commands = done.out.strip().splitlines()
    assert len(commands) == 2
    try:
        for command in commands:
            subprocess.run([*command.split(), "-q"], check=True, env={**os.environ, "DOCKER_BUILDKIT": "0"})
        assert _tree(engine, tag) == _tree(engine, bare["tag"])
        ours, theirs = (dict(engine.require_image(name).config) for name in (bare["tag"], tag))
        for config in (ours, theirs):
            config.pop("Image", None)  # the parent's id: COPY layers carry their time
            config.pop("Hostname", None)
        assert ours == theirs
    finally:
        engine.remove_image(tag)


@pytest.fixture(scope="module")
def light_base(engine: DockerEngine, base: str) -> Iterator[str]:
    """Python and what a build asks of vLLM, without its 3.5 GB: for what never starts the engine."""
    tag = f"{PREFIX}/light-base:1"
    folder = "/usr/lib/python3/dist-packages/vllm"
    dockerfile = (
        f"FROM {base} AS full\nFROM coldstart-testbed/debian:bookworm\nCOPY --from=full /usr /usr\n"
        f"RUN mkdir -p {folder} && touch {folder}/__init__.py"
        f" && echo '__version__ = \"0.0\"' > {folder}/_version.py\n"
    )
    engine.build(Rendered(dockerfile, ()), tag, label=NO_LABEL, platform=None, reporter=SilentReporter())
    yield tag
    engine.remove_image(tag)


def test_image_is_pushed_to_a_real_registry(
    light_base: str, registry: str, engine: DockerEngine, tmp_path: Path
) -> None:
    model = str(write_model(tmp_path / "tiny"))
    tag = f"{registry}/{PREFIX}/tiny:pushed"
    done = coldstart("build", model, "--base", light_base, "-t", tag, "--push", "--json", "--no-prewarm")
    assert done.code == 0, done.err
    try:
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", done.json["digest"])
        info = engine.require_image(tag)
        assert any(name.endswith(done.json["digest"]) for name in info.repo_digests)
    finally:
        engine.remove_image(tag)
        engine.remove_image(done.json["weights_image"])


def test_push_without_a_registry_is_told(light_base: str, engine: DockerEngine, tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "tiny"))
    tag = "127.0.0.1:9/nobody/tiny:1"
    done = coldstart("build", model, "--base", light_base, "-t", tag, "--push", "--no-prewarm")
    engine.remove_image(tag)
    _remove_weights(engine, done.err)
    assert done.code == 5
    assert "refused" in done.err
    assert "Traceback" not in done.err


@pytest.fixture(scope="module")
def gpu_base(engine: DockerEngine, base: str) -> Iterator[str]:
    """Shaped like vllm/vllm-openai: root, its entrypoint and folder, vLLM in the system's Python, no GPU."""
    tag = f"{PREFIX}/vllm-openai-standin:1"
    pth = "/usr/local/lib/python3.11/dist-packages/vllm-of-the-standin.pth"
    dockerfile = (
        f"FROM {base}\n"
        f"RUN echo /opt/vllm/lib/python3.11/site-packages > {pth}\n"
        "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        "LABEL dev.coldstart.base.device=\n"
        'WORKDIR /vllm-workspace\nENTRYPOINT ["vllm", "serve"]\n'
    )
    engine.build(Rendered(dockerfile, ()), tag, label=NO_LABEL, platform=None, reporter=SilentReporter())
    yield tag
    engine.remove_image(tag)


def test_gpu_plan_builds_starts_and_refuses_without_a_gpu(
    gpu_base: str, model: str, engine: DockerEngine, start: Callable[..., Container]
) -> None:
    tag = f"{PREFIX}/smollm2:gpu"
    done = coldstart("build", model, "--base", gpu_base, "-t", tag, "--json", "--", "--max-model-len", "2048")
    assert done.code == 0, done.err
    try:
        manifest = done.json["manifest"]
        assert (manifest["device"], manifest["engine_args"]) == ("cuda", ["--max-model-len", "2048"])
        assert coldstart("verify", tag).code == 0
        container = start(tag)
        code, logs = container.wait(30), container.logs()
        container.remove()
        assert code == 3
        assert "no NVIDIA GPU is visible" in logs
        assert "--gpus all" in logs
    finally:
        engine.remove_image(tag)
        engine.remove_image(done.json["weights_image"])


def test_engine_argument_that_vllm_does_not_know(model: str, base: str) -> None:
    for arguments, words in (
        (("--no-such-flag", "3"), "unrecognized arguments: --no-such-flag"),
        (("--max-model-len", "many"), "--max-model-len"),
        (("--api-k", "abbreviated"), "unrecognized arguments: --api-k"),
    ):
        done = coldstart("build", model, "--base", base, "--", *arguments)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
        assert "Traceback" not in done.err


def _import_image(engine: DockerEngine, tag: str) -> None:
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    subprocess.run(["docker", "import", "-", tag], input=empty.getvalue(), check=True, capture_output=True)


def test_platform_that_the_base_is_not_for(model: str, base: str, engine: DockerEngine) -> None:
    done = coldstart("build", model, "--base", base, "--platform", "linux/s390x")
    assert (done.code, done.out) == (2, "")
    assert "linux/s390x is asked for" in done.err
    own = engine.require_image(base).platform
    done = coldstart("build", model, "--base", base, "--platform", own, "-t", f"{PREFIX}/platform:1")
    assert done.code == 0, done.err
    engine.remove_image(f"{PREFIX}/platform:1")


def test_base_without_python_or_without_vllm(model: str, base: str, engine: DockerEngine) -> None:
    before = _containers()
    no_python, no_vllm = f"{PREFIX}/no-python:1", f"{PREFIX}/no-vllm:1"
    _import_image(engine, no_python)
    engine.build(
        Rendered(f"FROM {base}\nENV PATH=/usr/bin:/bin\n", ()),
        no_vllm,
        label=NO_LABEL,
        platform=None,
        reporter=SilentReporter(),
    )
    try:
        for name, words in ((no_python, "no usable python3"), (no_vllm, "has no vLLM")):
            done = coldstart("build", model, "--base", name)
            assert done.code == 2
            assert words in done.err
    finally:
        engine.remove_image(no_python)
        engine.remove_image(no_vllm)
    assert _containers() == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["build", "./no/such/folder"], 3, "cannot find the model"),
        (["build", "MODEL", "--quantize", "gguf"], 2, "unknown quantization"),
        (["build", "MODEL", "--", "--api-key", "x"], 2, "holds a secret"),
        (["verify", "BASE"], 6, "was not made by coldstart"),
        (["verify", "no/such:image"], 2, "there is no image"),
        (["bench", "no/such:image"], 2, "there is no image"),
        (["build", "MODEL", "--push"], 2, "needs a tag"),
    ],
)
def test_wrong_input_is_one_message(
    arguments: list[str], code: int, words: str, model: str, base: str
) -> None:
    filled = [{"MODEL": model, "BASE": base}.get(argument, argument) for argument in arguments]
    if filled[0] == "build":
        filled[2:2] = ["--base", base]
    done = coldstart(*filled)
    assert done.code == code
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_missing_model_is_told_before_a_base_is_pulled() -> None:
    done = coldstart("build", "./no/such/folder")  # the default base is not here
    assert (done.code, done.out) == (3, "")
    assert "Pulling" not in done.err


def test_no_engine_answers(model: str) -> None:
    done = coldstart("build", model, env={"DOCKER_HOST": "unix:///no/engine.sock"})
    assert done.code == 4
    assert "no Docker Engine answers" in done.err


def test_corrupt_shard_leaves_nothing(tmp_path: Path, base: str, engine: DockerEngine) -> None:
    folder = write_model(tmp_path / "broken", shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    before = _dangling(engine), _containers()
    done = coldstart("build", str(folder), "--base", base)
    assert done.code == 3
    assert "model-00001-of-00002.safetensors is truncated or corrupt" in done.err
    assert (_dangling(engine), _containers()) == before


def test_quantizing_what_is_quantized_is_refused(tmp_path: Path, base: str) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    folder = write_model(tmp_path / "quantized", config=config)
    done = coldstart("build", str(folder), "--base", base, "--quantize", "awq")
    assert done.code == 3
    assert "quantized already" in done.err


@pytest.mark.parametrize(
    "step", ["Looking into", "Building the weights image", "Step 3/", f"Building {PREFIX}"]
)
def test_ctrl_c_leaves_nothing_half_made(step: str, tmp_path: Path, base: str, engine: DockerEngine) -> None:
    # A model of its own, so that its weights image is not there yet; large enough to be caught sending it.
    folder = write_model(tmp_path / f"model-{time.time_ns()}")
    _grow(folder, 200 << 20)
    before = _dangling(engine), _containers()
    tag = f"{PREFIX}/interrupted:1"
    code, text = _interrupt_at(step, "build", str(folder), "--base", base, "-t", tag)
    try:
        assert code == 130, text
        assert "interrupted" in text
        assert "Traceback" not in text
        assert engine.image(tag) is None
        assert (_dangling(engine), _containers()) == before
    finally:
        _remove_weights(engine, text)


def _grow(folder: Path, size: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    noise = np.random.default_rng(time.time_ns()).integers(0, 255, size, dtype=np.uint8)
    save_file({"noise": noise}, folder / "model.safetensors")


def _interrupt_at(words: str, *arguments: str) -> tuple[int, str]:
    """Run the command, send Ctrl-C when a line of its output starts with `words`; exit code and stderr."""
    command = [str(Path(sys.executable).parent / "coldstart"), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.strip().startswith(words):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        return process.wait(60), "".join(seen) + rest


def test_ctrl_c_while_quantizing_leaves_nothing(model: str, base: str, tmp_path: Path) -> None:
    cache = Path(os.environ["COLDSTART_CACHE"])
    copy = tmp_path / f"copy-{time.time_ns()}"  # another name, so that no earlier result fits
    shutil.copytree(model, copy)
    before = sorted(path.name for path in (cache / "quantized").iterdir() if path.is_dir())
    code, text = _interrupt_at("Quantizing to AWQ", "build", str(copy), "--base", base, "--quantize", "awq")
    assert code == 130, text
    assert "Traceback" not in text
    assert sorted(path.name for path in (cache / "quantized").iterdir() if path.is_dir()) == before
    ours = f"quantize_job.py {cache}"
    jobs = subprocess.run(["pgrep", "-f", ours], capture_output=True, text=True, check=False)
    assert jobs.stdout == ""


@pytest.mark.parametrize("sign", ["", "->8000/tcp"], ids=["any container", "the server"])
def test_ctrl_c_while_benchmarking_leaves_nothing(sign: str, plain: Any, tmp_path: Path) -> None:
    """The first container prepares the volume of a cold cache; the server is the one with a port."""
    before = _everything()
    path = tmp_path / "bench.json"
    command = [str(Path(sys.executable).parent / "coldstart"), "bench", plain["tag"], "--json", str(path)]
    command += ["--compile-cache", "cold"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not any(sign in ports for ports in _running_since(before[0])):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[1]
    assert process.returncode == 130, text
    assert "interrupted" in text
    assert "Traceback" not in text
    assert _everything() == before
    assert not path.exists() or BenchResult.model_validate_json(path.read_text()).runs


def _everything() -> tuple[set[str], ...]:
    """Containers, volumes and networks of the engine."""
    kinds = (("ps", "-a", "--no-trunc"), ("volume", "ls"), ("network", "ls", "--no-trunc"))
    lists = (
        subprocess.run(["docker", *kind, "-q"], capture_output=True, text=True, check=True) for kind in kinds
    )
    return tuple(set(found.stdout.split()) for found in lists)


def _running_since(before: set[str]) -> list[str]:
    """The published ports of each running container of ours that was not there before."""
    found = subprocess.run(
        ["docker", "ps", "--no-trunc", "--format", "{{.ID}};{{.Names}};{{.Ports}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(";") for line in found.stdout.splitlines()]
    return [ports for id, name, ports in rows if id not in before and name.startswith(CONTAINER_PREFIX)]


def test_bench_times_both_images_and_keeps_raw_samples(plain: Any, awq: Any, tmp_path: Path) -> None:
    path, page = tmp_path / "bench.json", tmp_path / "bench.html"
    baseline = ("--baseline", plain["tag"], "--max-regression", "10%")
    done = coldstart("bench", awq["tag"], *baseline, "--runs", "1", "--json", str(path), "--html", str(page))
    assert done.code == 0, done.out + done.err
    for words in (
        "weight_load",
        "engine_import",
        "unattributed",
        "first token",
        "not decided",
    ):
        assert words in done.out
    # Whatever takes longest on this machine, and how much of the whole.
    assert re.search(r"(are|is)\s+[0-9.]+\s+of\s+[0-9.]+\s+s\b", done.out)
    result = json.loads(path.read_text())
    assert [image["reference"] for image in result["images"]] == [plain["tag"], awq["tag"]]
    assert all(image["reference"] in page.read_text() for image in result["images"])
    assert [run["ok"] for run in result["runs"]] == [True, True]
    for run in result["runs"]:
        assert run["total_seconds"] > 0
        assert {"container_start", "weight_load", "first_token"} <= {
            event["phase"] for event in run["phases"]
        }
        assert run["exit_code"] == 0
        assert run["unattributed_seconds"] < 0.1 * run["total_seconds"]
