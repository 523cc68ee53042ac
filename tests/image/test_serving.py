"""A built image as its user runs it: real vLLM, real model, real signals."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI

from benchmarks.load import Target, shut_down_under_load, storm
from builder.docker_engine import Container, DockerEngine
from runtime.phases import Phase, PhaseEvent, covered_seconds
from tests.image.conftest import ask, get, wait_healthy, wait_ready, wait_until

# What happens at a start on a CPU with baked weights; `compile` does not, since CPU images start eager.
CPU_PHASES = {
    *(Phase.SERVER_BIND, Phase.CONFIG_PARSE, Phase.ENGINE_IMPORT, Phase.MODEL_DOWNLOAD, Phase.ENGINE_INIT),
    *(Phase.WEIGHT_LOAD, Phase.KV_CACHE_ALLOC, Phase.GRAPH_CAPTURE, Phase.TOKENIZER_INIT, Phase.READY),
}


@pytest.mark.parametrize("image", ["plain", "awq"])
def test_answers_a_question_with_no_network(
    image: str, request: pytest.FixtureRequest, start: Callable[..., Container]
) -> None:
    tag = request.getfixturevalue(image)["tag"]
    container = start(tag, network="none", publish=False)
    wait_healthy(container)
    answer = ask(container)
    assert answer["model"] == "SmolLM2-135M-Instruct"
    assert answer["chat"].strip()
    if image == "plain":  # what 4 bits leave of the model depends on the machine that quantized it
        assert "Paris" in answer["chat"]


def test_probes_phases_and_shutdown_of_one_start(plain: Any, start: Callable[..., Container]) -> None:
    container = start(plain["tag"], arguments=["--drain-delay", "1", "--drain-timeout", "120"])
    seen: set[str] = set()
    told: set[str | None] = set()

    def starting_is_over() -> bool:
        try:
            startup = get(container, "/startup")
        except OSError:
            return False
        if startup.status == 200:
            return True
        assert startup.status == 503
        seen.add(str(startup.json["phase"]))
        assert get(container, "/health").status == 200
        for path in ("/ready", "/v1/models", "/v1/chat/completions"):
            reply = get(container, path)
            if reply.status != 503:
                # The hand-over may happen between two requests; then the state has moved on, for good.
                assert get(container, "/startup").status == 200, (path, reply)
                return True
            assert reply.headers.get("retry-after") == "1"
            if path != "/ready":
                error = reply.json["error"]
                assert error["code"] == "starting"
                assert error["phase"] is None or f"({error['phase']})" in error["message"]
                told.add(error["phase"])
        return False

    wait_until(starting_is_over, container)
    wait_ready(container)
    assert Phase.ENGINE_IMPORT.value in seen & told
    assert told - {None} <= {phase.value for phase in Phase}
    for path in ("/health", "/ready", "/v1/models", "/startup"):
        assert get(container, path).status == 200
    _check_phases(get(container, "/startup").json)
    assert b"coldstart_phase_seconds" in get(container, "/metrics").body
    wait_until(lambda: container.health() == "healthy", container, seconds=60)
    _check_running_request_finishes(container)


def _check_phases(startup: Any) -> None:
    events = [PhaseEvent.from_json(event) for event in startup["phases"]]
    assert {event.phase for event in events} == CPU_PHASES
    assert {event.process for event in events} == {"pid1", "template", "api", "EngineCore"}
    assert all(startup["started"] <= event.start <= event.end for event in events)
    by_phase = {event.phase: event for event in events if event.process != "pid1"}
    assert by_phase[Phase.ENGINE_IMPORT].end <= by_phase[Phase.WEIGHT_LOAD].start
    assert by_phase[Phase.WEIGHT_LOAD].end <= by_phase[Phase.READY].start
    end = startup["started"] + startup["elapsed"]
    assert covered_seconds(events, startup["started"], end) > 0.8 * startup["elapsed"]


def _check_running_request_finishes(container: Container) -> None:
    """SIGTERM in the middle of a stream: readiness goes off, the stream comes to its end, exit code 0."""
    body = {
        "model": "SmolLM2-135M-Instruct",
        "prompt": "Once upon a time",
        "max_tokens": 200,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{container.host_port()}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    lines: list[str] = []
    first = threading.Event()

    def read() -> None:
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                lines.append(line.decode())
                first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(60)
    sent = len(lines)
    container.signal("SIGTERM")
    reader.join(120)
    chunks = [line for line in lines if line.startswith("data: {")]
    assert lines[-2].strip() == "data: [DONE]"
    assert len(chunks) > sent  # it really was under way
    assert json.loads(chunks[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert container.wait(60) == 0


def test_hand_over_in_a_storm_then_every_kind_of_route(plain: Any, start: Callable[..., Container]) -> None:
    container = start(plain["tag"])
    target = Target(container.address(), 8000, "SmolLM2-135M-Instruct")

    def last_phase() -> bool:
        startup = get(container, "/startup").json
        return "ready" in [item["phase"] for item in startup["running"] + startup["phases"]]

    wait_until(lambda: _up(container) and last_phase(), container)
    over: list[float] = []

    def until() -> bool:
        if get(container, "/ready").status == 200:
            over.append(time.monotonic())
        return bool(over) and time.monotonic() > over[0] + 3

    tally = asyncio.run(storm(target, 300, until))
    print(tally)
    assert (tally.lost, tally.refused) == ([], 0)
    assert set(tally.answers) == {200, 503}  # before the hand-over and after it
    assert sum(tally.answers.values()) > 600
    _check_routes(container)
    _check_orphans_are_reaped(container)
    _check_a_hung_server_is_seen(container)


def _up(container: Container) -> bool:
    try:
        return get(container, "/health").status == 200
    except OSError:
        return False


def _check_routes(container: Container) -> None:
    """Through the official client, streams included, and vLLM's routes beside the OpenAI ones."""
    root = f"http://127.0.0.1:{container.host_port()}"
    client = OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    fixed: Any = {"model": model, "temperature": 0}
    chat = client.chat.completions.create(messages=question, max_tokens=20, **fixed)
    assert "Paris" in chat.choices[0].message.content
    chunks = client.chat.completions.create(messages=question, max_tokens=20, stream=True, **fixed)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    text = client.completions.create(prompt="The capital of France is", max_tokens=4, **fixed)
    assert "Paris" in text.choices[0].text
    parts = client.completions.create(prompt="The capital of France is", max_tokens=4, stream=True, **fixed)
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
    response = client.responses.create(input=question, max_output_tokens=20, **fixed)
    assert "Paris" in response.output_text
    events = client.responses.create(input=question, max_output_tokens=20, stream=True, **fixed)
    assert "Paris" in "".join(event.delta for event in events if event.type == "response.output_text.delta")
    with pytest.raises(NotFoundError):
        client.completions.create(prompt="x", model="another")
    tokens = httpx.post(f"{root}/tokenize", json={"model": model, "prompt": "Hello"}).json()["tokens"]
    assert (
        httpx.post(f"{root}/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"] == "Hello"
    )
    assert "vllm:prompt_tokens_total" in httpx.get(f"{root}/metrics").text
    assert httpx.get(f"{root}/version").json()["version"].startswith("0.")


def _check_orphans_are_reaped(container: Container) -> None:
    assert container.run(["sh", "-c", "sleep 0.2 &"])[0] == 0
    wait_until(lambda: container.run(["sh", "-c", "grep -l sleep /proc/[0-9]*/comm"])[0] != 0, container)


def _check_a_hung_server_is_seen(container: Container) -> None:
    """By the image's own check, as by a liveness probe: nobody answers in time."""
    check = ["python3", "-m", "runtime", "health"]
    phases = get(container, "/startup").json["phases"]
    pid = next(event["pid"] for event in phases if event["process"] == "api")
    assert container.run(check)[0] == 0
    container.run(["sh", "-c", f"kill -STOP {pid}"])
    assert container.run(check)[0] == 1
    container.run(["sh", "-c", f"kill -CONT {pid}"])
    assert container.run(check)[0] == 0


def test_port_in_use_is_told(plain: Any, start: Callable[..., Container]) -> None:
    first = start(plain["tag"], network="host", publish=False, environment={"COLDSTART_PORT": "18431"})
    wait_until(lambda: "listening on" in first.logs(), first, seconds=30)
    second = start(plain["tag"], network="host", publish=False, environment={"COLDSTART_PORT": "18431"})
    assert second.wait(30) == 5
    assert "cannot listen on 0.0.0.0:18431: Address already in use" in second.logs()


def test_engine_death_ends_its_streams_with_an_error_and_then_the_container(
    plain: Any, start: Callable[..., Container]
) -> None:
    container = start(plain["tag"])
    wait_ready(container)
    kill = "import os,signal,json,urllib.request as u;"
    kill += "d=json.load(u.urlopen('http://127.0.0.1:8000/startup'));"
    kill += "os.kill(next(p['pid'] for p in d['phases'] if p['process']=='EngineCore'), signal.SIGKILL)"
    target = Target(container.address(), 8000, "SmolLM2-135M-Instruct")
    tally, code = asyncio.run(
        shut_down_under_load(
            target, lambda: container.run(["python3", "-c", kill]), lambda: container.wait(60), tokens=1000
        )
    )
    print(tally)
    assert code == 1
    assert tally.errors >= 1
    assert tally.lost == []
    assert "coldstart: exit 1: failed: the engine core" in container.logs().rstrip().rpartition("\n")[2]


def test_nothing_of_ours_is_left_running(engine: DockerEngine) -> None:
    names = subprocess.run(
        ["docker", "ps", "-a", "--filter", "name=coldstart-", "--format", "{{.Names}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert names.stdout.split() == []
