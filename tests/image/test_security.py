"""What operators rely on: refusals in one line, a start with next to no rights, keys, limits, logs, spans."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.docker_engine import Container
from tests.image.conftest import FLOAT32, get, wait_ready, wait_until

RECEIVER = Path(__file__).parent / "otlp_receiver.py"
KEYS = ("sk-first-1b3f09", "sk-second-77aa20")
ORIGIN = "https://a.example"
WRONG_KEY = "sk-wrong-c0ffee"
RESTRICTED = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
)


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("options", "arguments", "code", "words"),
    [
        ((), ("--max-modle-len", "8"), 2, "did you mean --max-model-len?"),
        ((), ("--api-key", "secret"), 2, "--api-key cannot be set here"),
        ((), ("serv",), 2, "did you mean serve?"),
        (("-e", "COLDSTART_DRIAN_DELAY=1"), (), 2, "did you mean COLDSTART_DRAIN_DELAY?"),
        (("-e", "VLLM_SERVER_DEV_MODE=1"), (), 2, "VLLM_SERVER_DEV_MODE is set"),
        (("-e", "COLDSTART_API_KEY_FILE=/none"), (), 2, "cannot read the API keys in /none"),
        (("--read-only",), (), 3, "Add `--tmpfs /tmp:exec`"),
        (("--tmpfs", "/models"), (), 3, "A volume mounted over it hides the baked files"),
        (("--memory", "1g"), (), 3, "Give it more with `--memory 4g`"),
        ((), ("--tensor-parallel-size", "2"), 3, "2 does not divide the model's 9 attention heads"),
        ((), ("--tensor-parallel-size", "3"), 3, "Add `--shm-size 1g`"),
        ((), ("--distributed-executor-backend", "mp"), 3, "Add `--shm-size 1g`"),
    ],
)
def test_what_cannot_work_is_refused_with_one_line(
    plain: Any, options: tuple[str, ...], arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = _docker("run", "--rm", "--network", "none", *options, plain["tag"], *arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines  # neither a traceback nor anything of vLLM, which was not imported
    assert lines[0].startswith(f"coldstart: exit {code}: ")
    assert words in lines[0]


def test_a_home_folder_that_is_not_writable_is_told_and_no_reason_to_end(
    plain: Any, run: Callable[..., Container]
) -> None:
    container = run(("-e", "HOME=/root"), plain["tag"], ("--served-model-name", "one", "two"))
    wait_ready(container)
    reason = "/root, the home folder, is not writable: caches are kept for this start only"
    degraded = json.loads(get(container, "/startup").body)["degraded"]
    assert degraded[0] == reason
    assert len(degraded) == (2 if FLOAT32 else 1)
    assert f'coldstart_degraded_info{{reason="{reason}"}} 1.0' in get(container, "/metrics").body.decode()
    assert reason in container.logs()
    served = [model["id"] for model in json.loads(get(container, "/v1/models").body)["data"]]
    assert served == ["one", "two"]


def test_help_and_configuration_are_told_without_a_start(plain: Any) -> None:
    helped = _docker("run", "--rm", "--network", "none", plain["tag"], "--help")
    assert helped.returncode == 0
    for name in ("--drain-timeout, COLDSTART_DRAIN_TIMEOUT", "vLLM, ModelConfig:", "--max-model-len"):
        assert name in helped.stdout
    key = ("-e", f"VLLM_API_KEY={KEYS[0]}")
    shown = _docker("run", "--rm", "--network", "none", *key, plain["tag"], "--print-config=json")
    assert shown.returncode == 0
    rows = {row["name"]: (row["value"], row["from"]) for row in json.loads(shown.stdout)}
    assert rows["--max-model-len"] == ("2048", "image")
    assert rows["VLLM_API_KEY"] == ("***", "environment")
    assert KEYS[0] not in shown.stdout + shown.stderr


def test_wrong_value_of_an_engine_argument_exits_2(plain: Any, run: Callable[..., Container]) -> None:
    container = run((), plain["tag"], ("--max-model-len", "long"))
    assert container.wait(120) == 2
    assert "argument --max-model-len: invalid" in container.logs()
    assert "Traceback" not in container.logs()


def _ask(
    container: Container, method: str, path: str, key: str | None = None, **request: Any
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", container.host_port(), timeout=120)
    headers = {"content-type": "application/json", **request.pop("headers", {})}
    if key:
        headers["authorization"] = f"Bearer {key}"
    try:
        connection.request(method, path, headers=headers, **request)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_restricted_start_with_keys_limits_json_logs_and_spans(
    plain: Any, run: Callable[..., Container], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS) + "\n")
    keys.chmod(0o640)  # for root and group 0, as Kubernetes mounts secrets
    user = random.randint(10_000, 2_000_000_000)
    container = run(
        (
            *RESTRICTED,
            *("--user", f"{user}:0", "-v", f"{keys}:/run/secrets/keys:ro"),
            *("-e", "COLDSTART_API_KEY_FILE=/run/secrets/keys", "-e", "COLDSTART_LOG_FORMAT=json"),
            *("-e", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318"),
        ),
        plain["tag"],
        (
            *("--max-request-bytes", "100000", "--drain-delay", "0"),
            *("--allowed-origins", json.dumps([ORIGIN])),
        ),
    )
    assert _docker("exec", "-d", container.id, "python3", "-c", RECEIVER.read_text()).returncode == 0
    wait_ready(container)
    _check_rights(container, user)
    _check_answer(container)
    _check_every_route_wants_the_key(container)
    _check_body_limit(container)
    _check_sockets(container)
    startup = json.loads(_ask(container, "GET", "/startup")[1])
    _check_spans(container, startup)
    assert container.stop(60) == 0
    _check_logs(container.logs(), startup["start_id"])


def _check_rights(container: Container, user: int) -> None:
    status = dict(line.split(":\t", 1) for line in container.run(["cat", "/proc/1/status"])[1].splitlines())
    assert status["Uid"].split()[0] == str(user)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert container.run(["touch", "/opt/coldstart/x"])[0] != 0


def _check_answer(container: Container) -> None:
    question = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 30,
    }
    path = "/v1/chat/completions"
    for key in KEYS:
        status, body = _ask(container, "POST", path, key, body=json.dumps(question))
        assert status == 200
        assert "Paris" in json.loads(body)["choices"][0]["message"]["content"]
    assert _ask(container, "POST", path, WRONG_KEY, body=json.dumps(question))[0] == 401


def _check_every_route_wants_the_key(container: Container) -> None:
    """Every route that this vLLM mounts, by its own description of them."""
    routes = json.loads(_ask(container, "GET", "/openapi.json", KEYS[0])[1])["paths"]
    assert {"/v1/models", "/tokenize", "/invocations"} <= set(routes)
    open_routes = {"/health", "/metrics"}
    for path, methods in routes.items():
        for method in methods:
            wanted = 200 if path in open_routes else 401
            assert _ask(container, method.upper(), path)[0] == wanted, path
    for path in ("/docs", "/redoc", "/openapi.json", "/nothing"):
        assert _ask(container, "GET", path)[0] == 401
    for path in ("/health", "/ready", "/startup", "/metrics"):
        assert _ask(container, "GET", path)[0] == 200
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert _ask(container, "GET", "/v1/realtime", headers=upgrade)[0] == 401
    for origin, wanted in ((ORIGIN, 200), ("https://other.example", 400)):  # vLLM's CORS layer answers both
        preflight = {"origin": origin, "access-control-request-method": "POST"}
        assert _ask(container, "OPTIONS", "/v1/chat/completions", headers=preflight)[0] == wanted
    metrics = _ask(container, "GET", "/metrics")[1].decode()
    for line in ("coldstart_in_flight_requests 0.0", "coldstart_draining 0.0", "coldstart_phase_seconds{"):
        assert line in metrics
    assert "vllm:" in metrics


def _check_body_limit(container: Container) -> None:
    path, body = "/v1/completions", b"x" * 200_000
    for request in ({"body": body}, {"body": iter([body[:90_000], body[90_000:]]), "encode_chunked": True}):
        chunked = {"headers": {"transfer-encoding": "chunked"}} if "encode_chunked" in request else {}
        status, answer = _ask(container, "POST", path, KEYS[0], **request, **chunked)
        assert status == 413
        assert json.loads(answer)["error"]["code"] == "request_too_large"
    # Below the limit the engine's own parser answers.
    assert _ask(container, "POST", path, KEYS[0], body=b"x" * 90_000)[0] in (400, 422)


def _check_sockets(container: Container) -> None:
    """Of all that listens, only the served port is reachable from outside of the container."""
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in container.run(["cat", f"/proc/net/{table}"])[1].splitlines()[1:]:
            address, port = line.split()[1].split(":")
            loopback = ("0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F")
            if line.split()[3] == "0A" and address not in loopback:
                listening.add(int(port, 16))
    assert listening == {8000}


def _check_spans(container: Container, startup: Any) -> None:
    wait_until(lambda: container.run(["cat", "/tmp/spans.json"])[0] == 0, container, seconds=60)
    spans = json.loads(container.run(["cat", "/tmp/spans.json"])[1])
    root = next(span for span in spans if span["is_root"])
    assert (root["name"], root["start"]) == ("start", pytest.approx(startup["started"]))
    assert root["resource"]["service.name"] == "coldstart"
    assert root["resource"]["coldstart.start_id"] == startup["start_id"]
    phases = sorted(span["name"] for span in spans if not span["is_root"])
    assert phases == sorted(event["phase"] for event in startup["phases"])
    assert all(root["start"] <= span["start"] <= span["end"] for span in spans)


def _check_logs(logs: str, start_id: str) -> None:
    records = [json.loads(line) for line in logs.splitlines()]
    assert {record["start"] for record in records} == {start_id}
    for name in ("time", "level", "message", "logger", "process"):
        assert all(name in record for record in records)
    loggers = {record["logger"] for record in records}
    assert {"coldstart", "uvicorn.access", "vllm.v1.engine.core"} <= loggers
    assert {"pid1", "api", "EngineCore"} <= {record["process"] for record in records}
    summary = next(r["message"] for r in records if r["message"].startswith("ready after"))
    assert "engine_import" in summary
    assert "; recording " in summary
    messages = [record["message"] for record in records]
    assert not any("Started server process" in message for message in messages[messages.index(summary) :])
    assert records[-1]["message"] == "exit 0: stopped as asked"
    for key in (*KEYS, WRONG_KEY):
        assert key not in logs


def test_key_from_vllms_variable_is_not_handed_to_other_processes(
    plain: Any, run: Callable[..., Container]
) -> None:
    container = run(("-e", f"VLLM_API_KEY={KEYS[0]}"), plain["tag"], ("--metrics-auth", "key"))
    wait_ready(container)
    assert _ask(container, "GET", "/v1/models")[0] == 401
    assert _ask(container, "GET", "/v1/models", KEYS[0])[0] == 200
    assert _ask(container, "GET", "/metrics")[0] == 401
    assert _ask(container, "GET", "/metrics", KEYS[0])[0] == 200
    startup = json.loads(_ask(container, "GET", "/startup")[1])
    children = {event["pid"] for event in startup["phases"]} - {1}
    assert len(children) >= 3  # template, api, EngineCore
    for pid in children:
        environment = container.run(["cat", f"/proc/{pid}/environ"])[1]
        assert "PYTHONPATH=" in environment
        assert KEYS[0] not in environment
    assert KEYS[0] not in container.logs()
