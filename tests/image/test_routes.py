"""Every route of vLLM's, answered as vLLM's own server answers it, and vLLM's own examples as clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from builder.docker_engine import CONTAINER_PREFIX, Container, DockerEngine
from tests.image.conftest import ENGINE_ARGS, FLOAT32, coldstart, get, wait_ready, wait_until

# One of vLLM's examples asks for this model by name.
MODEL = "Qwen/Qwen3-8B"
# The examples wait for a minute: what a small model samples may run on for longer, on a slow machine.
TOOLS = (
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--override-generation-config", '{"max_new_tokens": 400}'),
)
_ASK = [{"role": "user", "content": "What is the capital of France?"}]
_TOOL = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_FIXED: dict[str, Any] = {"model": MODEL, "temperature": 0}
# The body of a request to each route; None has none. Streams are asked for beside it where there are any.
REQUESTS: dict[tuple[str, str], Any] = {
    ("GET", "/v1/models"): None,
    ("GET", "/version"): None,
    ("GET", "/load"): None,
    ("GET", "/kv_event_sources"): None,
    ("GET", "/ping"): None,
    ("POST", "/ping"): None,
    ("POST", "/tokenize"): {"model": MODEL, "prompt": "Hello"},
    ("POST", "/detokenize"): {"model": MODEL, "tokens": [19556]},
    ("POST", "/v1/completions"): {
        **_FIXED,
        "prompt": "The capital of France is",
        "max_tokens": 8,
        "logprobs": 2,
    },
    ("POST", "/v1/chat/completions"): {**_FIXED, "messages": _ASK, "max_tokens": 12},
    ("POST", "/v1/chat/completions/batch"): {**_FIXED, "messages": [_ASK, _ASK], "max_tokens": 8},
    ("POST", "/v1/responses"): {**_FIXED, "input": _ASK, "max_output_tokens": 12},
    ("GET", "/v1/responses/{response_id}"): None,  # nothing is stored, as both servers say
    ("POST", "/v1/responses/{response_id}/cancel"): None,
    ("POST", "/v1/messages"): {**_FIXED, "messages": _ASK, "max_tokens": 12},
    ("POST", "/v1/messages/count_tokens"): {"model": MODEL, "messages": _ASK},
    ("POST", "/invocations"): {**_FIXED, "messages": _ASK, "max_tokens": 8},
    ("POST", "/generative_scoring"): {
        "model": MODEL,
        "query": "q",
        "items": ["a", "b"],
        "label_token_ids": [1, 2],
    },
    ("POST", "/v1/systemone"): {"state": "x", "questions": {}},
    ("POST", "/scale_elastic_ep"): {},
    ("POST", "/is_scaling_elastic_ep"): None,
}
STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
MORE: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", {**_FIXED, "messages": _ASK, "max_tokens": 4, "n": 2, "logprobs": True}),
    (
        "/v1/chat/completions",
        {
            **_FIXED,
            "messages": _ASK,
            "max_tokens": 40,
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": _TOOL}}],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        },
    ),
    ("/v1/completions", {**_FIXED, "prompt": "x", "max_tokens": -1}),
    ("/v1/completions", {**_FIXED, "prompt": "x", "model": "another"}),
    ("/v1/completions", "not an object"),
    ("/no/such/route", {}),
)
# Not vLLM's words: PID 1 and the API process answer it alike, see docs/operating.md.
OURS = {("GET", "/health"), ("GET", "/metrics")}
# New with each answer.
_VOLATILE = {"id", "item_id", "response_id", "call_id", "created", "created_at", "completed_at"}


@pytest.fixture(scope="module")
def server(plain: Any, engine: DockerEngine) -> Iterator[Container]:
    container = engine.start(
        plain["tag"], arguments=TOOLS, environment={"COLDSTART_SERVED_MODEL_NAME": MODEL}
    )
    yield container
    container.remove()


@pytest.fixture(scope="module")
def stock(plain: Any, engine: DockerEngine) -> Iterator[Container]:
    """vLLM's own server in the same image, with the same arguments."""
    name = f"{CONTAINER_PREFIX}stock-{uuid.uuid4().hex[:8]}"
    arguments: tuple[str, ...] = (
        "--model",
        "/models/SmolLM2-135M-Instruct",
        "--served-model-name",
        MODEL,
        "--enforce-eager",
    )
    arguments += ("--dtype", "float32") if FLOAT32 else ()
    arguments += ("--kv-cache-memory-bytes", "2147483648", *ENGINE_ARGS, *TOOLS)
    command = ["docker", "run", "-d", "--name", name, "-p", "127.0.0.1::8000", "--entrypoint", "python3"]
    command += [plain["tag"], "-m", "vllm.entrypoints.openai.api_server", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    container = Container(engine._client, name, 0.0)
    yield container
    container.remove()


def _root(container: Container) -> str:
    return f"http://127.0.0.1:{container.host_port()}"


def _still(value: Any) -> Any:
    """An answer without what differs from one to the next."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _still(item) for key, item in value.items() if key not in _VOLATILE}
    return [_still(item) for item in value] if isinstance(value, list) else value


def _answer(container: Container, method: str, path: str, body: Any) -> tuple[int, str, Any]:
    """Status, media type, and the body: JSON, the events of a stream, or text."""
    path = path.replace("{response_id}", "resp_none")
    reply = httpx.request(method, _root(container) + path, json=body, timeout=120)
    media = reply.headers.get("content-type", "").split(";")[0]
    if media == "application/json":
        return reply.status_code, media, _still(reply.json())
    if media == "text/event-stream":
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
        return reply.status_code, media, [_still(json.loads(x)) if x.startswith("{") else x for x in lines]
    return reply.status_code, media, reply.text


def _names(container: Container) -> set[str]:
    text = httpx.get(_root(container) + "/metrics").text
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_every_route_answers_as_in_vllms_own_server(server: Container, stock: Container) -> None:
    wait_ready(server)
    wait_until(lambda: _models_answer(stock), stock)
    ours, theirs = (httpx.get(_root(c) + "/openapi.json").json() for c in (server, stock))
    assert ours == theirs
    routes = {(method.upper(), path) for path, methods in ours["paths"].items() for method in methods}
    assert routes - OURS == set(REQUESTS)  # a route that a release adds is to be asked here too
    asked = [(method, path, body) for (method, path), body in REQUESTS.items()]
    asked += [("POST", path, {**REQUESTS["POST", path], "stream": True}) for path in STREAMS]
    asked += [("POST", path, body) for path, body in MORE]
    for method, path, body in asked:
        expected = _answer(stock, method, path, body)
        print(method, path, expected[:2], str(expected[2])[:300])
        assert _answer(server, method, path, body) == expected
    assert _names(stock) <= _names(server)


def _models_answer(container: Container) -> bool:
    try:
        return httpx.get(_root(container) + "/v1/models").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def examples(server: Container) -> Iterator[Path]:
    """vLLM's examples, of the release in the image, out of its source distribution."""
    wait_ready(server)
    release = httpx.get(_root(server) + "/version").json()["version"].split("+")[0]
    with tempfile.TemporaryDirectory() as folder:
        # pip ends with an error, since it cannot build what it has unpacked; --no-clean leaves that there.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-clean"]
        command += ["--no-build-isolation", "--dest", folder, f"vllm=={release}"]
        done = subprocess.run(
            command, env={**os.environ, "TMPDIR": folder}, capture_output=True, text=True, check=False
        )
        found = list(Path(folder).glob("*/*/examples"))
        assert len(found) == 1, done.stdout + done.stderr
        yield found[0]


# Of its clients of a server these run with this model and without a network. The others want what is not
# here: a model that calls tools, reasons, sees, hears or reranks, LangChain, LlamaIndex, Gradio, Streamlit or
# a collector of traces, or several servers (rl/, scale_out/).
@pytest.mark.parametrize(
    ("example", "arguments", "words"),
    [
        ("basic/online_serving/openai_chat_completion_client.py", (), "ChatCompletion("),
        ("basic/online_serving/openai_chat_completion_client.py", ("--stream",), "ChatCompletionChunk("),
        ("basic/online_serving/openai_completion_client.py", (), "CompletionChoice("),
        ("basic/online_serving/openai_completion_client.py", ("--stream",), "CompletionChoice("),
        ("generate/batched_chat_completions_online.py", (), ""),
        ("reasoning/openai_responses_client.py", (), ""),
        ("features/structured_outputs/structured_outputs_client.py", ("--constraint", "choice", "regex"), ""),
    ],
)
def test_vllms_own_examples_run(
    server: Container, examples: Path, example: str, arguments: tuple[str, ...], words: str
) -> None:
    """Inside the container, which has their client, and whose port is where they look."""
    source = (examples / example).read_text()
    for _ in range(5):
        code, output = server.run(["env", f"VLLM_MODEL={MODEL}", "python3", "-c", source, *arguments])
        print(output[-2000:])
        # They sample, and read the answer as JSON: where a model this small runs on to the end of its
        # context, half a document is what was asked for. Another sample then; any other error ends the test.
        if "JSONDecodeError: Unterminated string" not in output:
            break
    assert code == 0
    assert words in output
    assert output.strip()


def test_an_image_for_embeddings_is_recorded_and_serves_vllms_own_client(
    build: Callable[..., Any], run: Callable[..., Container], examples: Path
) -> None:
    """Routes that a server of completions does not have, and none of what golden answers are asked by."""
    arguments = (*ENGINE_ARGS, "--runner", "pooling", "--convert", "embed")
    image = build("smollm2:embed", "--prewarm", engine_args=arguments)
    container = run((), image["tag"])
    wait_ready(container)
    assert json.loads(get(container, "/startup").body)["recording"]["status"] == "used"
    source = (examples / "pooling/embed/openai_embedding_client.py").read_text()
    code, output = container.run(["python3", "-c", source])
    assert code == 0, output
    first, second = (json.loads(line) for line in output.strip().splitlines())
    assert len(first) == len(second) > 100
    assert first != second
    assert coldstart("verify", image["tag"]).code == 0
