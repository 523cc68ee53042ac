"""Compiled code is baked, used where it fits and answers right, and never else: real vLLM, real compiling."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.docker_engine import CONTAINER_PREFIX, Container, DockerEngine
from builder.report import SilentReporter
from runtime import modes
from tests.image.conftest import EAGER, FLOAT32, PREFIX, TINY_ARGS, ask, coldstart, get, wait_ready

ANSWER = "The capital of France is Paris."
RECORDING = "/opt/coldstart/state/recordings/*/recording.json"
LOADERS = {"vLLM's own": (), **modes._LOADERS["cpu"]}
READ_ONLY = ("--read-only", "--cap-drop", "ALL", "--user", "12345:0")


@pytest.fixture(scope="module")
def balanced(build: Callable[..., Any]) -> Any:
    """As `coldstart build` makes it when nothing else is asked for."""
    return build("smollm2:balanced", "--prewarm", "--optimize", "balanced")


@pytest.fixture(scope="module")
def compiled(build: Callable[..., Any]) -> str:
    """The tag of an image that serves with compiled code, whether or not that is faster on this machine."""
    tag = build("smollm2:compiled")["tag"]
    done = coldstart("prewarm", tag, "--mode", "compiled-float32")
    assert done.code == 0, done.err
    return str(tag)


@pytest.fixture
def derived(engine: DockerEngine) -> Iterator[Callable[[str, str], str]]:
    """derived(image, shell command) -> an image that is it after root ran the command."""
    tags: list[str] = []

    def make(image: str, command: str) -> str:
        tags.append(f"{PREFIX}/derived:{len(tags)}")
        dockerfile = f"FROM {image}\nUSER root\nRUN {command}\nUSER 2000:0\n"
        subprocess.run(
            ["docker", "build", "-q", "-t", tags[-1], "-"],
            input=dockerfile.encode(),
            capture_output=True,
            timeout=300,
            check=True,
        )
        return tags[-1]

    yield make
    for tag in tags:
        engine.remove_image(tag)


def recording(container: Container) -> Any:
    return get(container, "/startup").json["recording"]


def hits(container: Container) -> dict[str, str]:
    lines = get(container, "/metrics").body.decode().splitlines()
    found = (line for line in lines if line.startswith("coldstart_cache_hit{"))
    return {line.split('"')[1]: line.rsplit(" ", 1)[1] for line in found}


def test_vllm_takes_the_arguments_of_every_mode(base: str, engine: DockerEngine) -> None:
    """Those for GPUs too, which cannot be started here."""
    image = engine.base_image(base, None, SilentReporter())
    every = {mode.engine_args for found in modes._CANDIDATES.values() for mode in found} - {()}
    assert len(every) >= 3
    for arguments in every:
        engine.check_engine_args(image, arguments)


def test_the_build_says_what_it_tried_and_why_it_chose(balanced: Any) -> None:
    """bf16 begins one answer with the other of two tokens that it cannot tell apart; float32 can."""
    report = balanced["recording"]
    tried = {mode["mode"]: mode for mode in report["modes"]}
    assert tried[EAGER]["tokens_per_second"] > 0
    assert set(tried) == {EAGER, "compiled-float32"} or not FLOAT32
    right = {"compiled-float32"} if FLOAT32 else {"compiled"}
    bf16 = {} if FLOAT32 else tried["compiled"]["golden"]
    # Its own first tokens decide, whatever the processor computes: where one differs it must be refused.
    assert FLOAT32 or bf16["ok"] == (not bf16["begun_differently"]), bf16
    if bf16 and not bf16["ok"]:
        assert tried["compiled"]["tokens_per_second"] is None
        assert report["chosen"] != "compiled"
        assert f"{len(bf16['begun_differently'])} of {bf16['prompts']} answers begin" in bf16["says"]
        assert "which this dtype cannot tell apart" in bf16["says"]
        if "to record what a start needs" in balanced["stderr"]:  # not where an earlier build did
            assert f"compiled: refused; {bf16['says']}" in balanced["stderr"]
        right = {"compiled-float32"}
    assert all(tried[mode]["golden"]["ok"] for mode in right)
    rates = {mode: tried[mode]["tokens_per_second"] for mode in right | {EAGER}}
    fastest = max(rates, key=lambda mode: rates[mode])
    gain = rates[fastest] / rates[EAGER]
    assert report["chosen"] == (fastest if gain >= modes.BALANCED_GAIN else EAGER)
    assert report["golden"]["ok"]
    assert report["golden"]["prompts"] >= 32


def test_an_unknown_mode_is_refused_with_those_that_there_are(compiled: str) -> None:
    done = coldstart("prewarm", compiled, "--mode", "fast")
    assert done.code == 5
    there_are = ("compiled-float32", EAGER) if FLOAT32 else ("compiled", "compiled-float32", EAGER)
    assert f"there are: {', '.join(there_are)}" in done.err


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ((), ()),
        ((*READ_ONLY, "--tmpfs", "/tmp:exec"), ()),
        ((), ("--log-format", "json", "--uvicorn-log-level", "warning")),
        ((), ("--off", "template")),  # where forking is not safe
    ],
)
def test_what_was_compiled_is_loaded(
    options: tuple[str, ...], arguments: tuple[str, ...], compiled: str, run: Callable[..., Container]
) -> None:
    container = run(options, compiled, arguments)
    wait_ready(container)
    assert recording(container)["status"] == "used"
    assert hits(container) | {"imports": ""} == {"recording": "1.0", "compile": "1.0", "imports": ""}
    assert "Directly load AOT compilation from path" in container.logs()
    assert ask(container)["chat"] == ANSWER


def test_verify_shows_the_hit_and_the_answers(compiled: str, derived: Callable[[str, str], str]) -> None:
    done = coldstart("verify", compiled, "--json")
    assert done.code == 0, done.err
    checks = {check["name"]: check for check in done.json["checks"]}
    assert "Directly load AOT compilation from path" in checks["compiled code"]["found"]
    assert checks["answers"]["ok"]
    assert checks["starts"]["ok"]
    damaged = derived(compiled, f"sed -i s/avx2/avx3/g {RECORDING}")
    done = coldstart("verify", damaged, "--json")
    assert done.code == 6
    failed = [check["name"] for check in done.json["checks"] if not check["ok"]]
    assert failed == ["recording"]


def test_verify_finds_that_vllm_compiles_again(compiled: str, derived: Callable[[str, str], str]) -> None:
    """The recording fits and is used, and what vLLM looks for first is not in it."""
    forget = (
        "import json, pathlib; "
        f"(p,) = pathlib.Path('/').glob('{RECORDING[1:]}'); d = json.loads(p.read_text()); "
        "kept = {n: e for n, e in d['files'].items() if not n.endswith('/model')}; "
        "assert 0 < len(kept) < len(d['files']); d['files'] = kept; p.write_text(json.dumps(d))"
    )
    done = coldstart("verify", derived(compiled, f'python3 -c "{forget}"'), "--json")
    assert done.code == 6, done.out
    checks = {check["name"]: check for check in done.json["checks"]}
    assert checks["recording"]["ok"], checks
    assert not checks["compiled code"]["ok"], checks


@pytest.fixture
def recorded_elsewhere(build: Callable[..., Any], tiny_folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """The tag of an image without a recording, and the folder that `docker run IMAGE warm` wrote for it.

    It looked for the quickest loader, too.
    """
    tag = build("tiny:elsewhere", folder=tiny_folder, engine_args=TINY_ARGS)["tag"]
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)  # for the image's user
    name = f"{CONTAINER_PREFIX}warm-{uuid.uuid4().hex[:8]}"
    command = ["docker", "run", "--rm", "--name", name, "--network", "none", "-v", f"{state}:/out"]
    done = subprocess.run(
        [*command, tag, "warm", "--output", "/out", "--loaders"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0
    assert "the rest was in memory still" not in done.stdout  # else no start was a cold one
    return str(tag), state


def test_a_start_recorded_by_docker_run_is_added_and_used(
    recorded_elsewhere: tuple[str, Path], engine: DockerEngine
) -> None:
    """As documented for nodes that the build host is not one of."""
    tag, state = recorded_elsewhere
    (path,) = state.glob("recordings/*/recording.json")
    recorded = json.loads(path.read_bytes())
    seconds, loader = recorded["report"]["loaders"], recorded["report"]["loader"]
    assert {name: len(starts) for name, starts in seconds.items()} == dict.fromkeys(LOADERS, 3)
    assert tuple(recorded["mode"]["engine_args"]) == ("--enforce-eager", *LOADERS[loader])
    done = coldstart("prewarm", tag, "--from", str(state))
    assert done.code == 0, done.err
    assert engine.require_image(tag).labels["dev.coldstart.prewarmed"] == "yes"
    done = coldstart("verify", tag, "--json")
    assert done.code == 0, done.out
    checks = {check["name"]: check for check in done.json["checks"]}
    assert checks["recording"]["found"] == "eager"
    assert checks["answers"]["ok"]


@pytest.mark.parametrize(
    ("change", "options", "arguments", "reason"),
    [
        (f"sed -i 's/avx2/avx2 amx_tile/' {RECORDING}", (), (), "processor: here without amx_tile"),
        (f"sed -i 's/x86_64\\|aarch64/riscv/' {RECORDING}", (), (), "processor"),
        (f"sed -i '1,5d' {RECORDING}", (), (), "is damaged"),
        ("find /opt/coldstart/state -name model -exec sed -i 's/a/b/' {} +", (), (), "is damaged"),
        ("find /opt/coldstart/state -name model -exec truncate -s 1000 {} +", (), (), "is damaged"),
        ("find /opt/coldstart/state -name model -delete", (), (), "cannot be copied"),
        ("", (*READ_ONLY, "--tmpfs", "/tmp"), (), "noexec"),
        ("", (*READ_ONLY, "--tmpfs", "/tmp:exec,size=3m"), (), "cannot be copied"),
        ("", ("-e", "VLLM_USE_AOT_COMPILE=0"), (), "VLLM_USE_AOT_COMPILE"),
        ("", (), ("--max-num-seqs", "8"), "engine arguments"),
        ("", (), ("--off", "recording"), "--off"),
    ],
)
def test_what_does_not_fit_is_not_used_and_the_server_is_ready_all_the_same(
    change: str,
    options: tuple[str, ...],
    arguments: tuple[str, ...],
    reason: str,
    compiled: str,
    derived: Callable[[str, str], str],
    run: Callable[..., Container],
) -> None:
    image = derived(compiled, change) if change else compiled
    container = run(options, image, arguments)
    wait_ready(container)
    said = recording(container)
    assert (said["status"], said["mode"]) == ("unused", EAGER)
    assert reason in said["reason"]
    assert f"what was recorded is not used: {said['reason']}" in container.logs()
    assert hits(container)["recording"] == "0.0"
    assert ask(container)["chat"] == ANSWER


def test_an_image_carries_recordings_for_several_machines(
    compiled: str, derived: Callable[[str, str], str], run: Callable[..., Container]
) -> None:
    state = "/opt/coldstart/state/recordings"
    other = derived(
        compiled,
        f"cp -r {state}/* {state}/other && sed -i 's/avx2/avx2 amx_tile/' {state}/other/recording.json",
    )
    container = run((), other)
    wait_ready(container)
    assert recording(container)["status"] == "used"


def test_a_numeric_defect_in_compiled_code_is_refused(
    base: str, build: Callable[..., Any], derived: Callable[[str, str], str], tiny_folder: Path
) -> None:
    """The base's Llama, changed so that only the compiled one scales what a layer gives by 3 %.

    Of a model in float32, where compiled code answers right without the defect.
    """
    change = (
        "import pathlib, sysconfig; "
        "p = pathlib.Path(sysconfig.get_path('purelib'), 'vllm/model_executor/models/llama.py'); "
        "s = p.read_text(); line = 'hidden_states = self.mlp(hidden_states)'; assert line in s; "
        "p.write_text(s.replace(line, line + ' * (1.03 if torch.compiler.is_compiling() else 1.0)'))"
    )
    wrong = f'python3 -c "{change}"'
    seeded = derived(base, wrong)
    tag = build("seeded:1", base=seeded, folder=tiny_folder, engine_args=TINY_ARGS)["tag"]
    done = coldstart("prewarm", tag, "--mode", "compiled")
    assert done.code == 5
    assert "eager: " in done.err
    assert "compiled: refused; answers differently" in done.err
    assert "--mode compiled is refused" in done.err
    assert not DockerEngine().require_image(tag).labels.get("dev.coldstart.prewarmed")
