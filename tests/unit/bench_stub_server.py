"""A server that starts, answers and fails as its JSON argument says; the bench tests run it as a subprocess.

Prints its port once it listens, as a container engine would publish it. It reports known phases at known
offsets, so that what the harness records can be compared with them. An image test runs it in a container.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

from metronome import Metronome  # type: ignore[import-not-found] # beside this script

STARTED = time.time()
PLAN: dict[str, Any] = {
    "address": ["127.0.0.1", 0],
    "ready_after": 0.1,  # None: never
    "die_after": None,
    "die_in_answer": False,
    "models": None,  # the body of a 200, verbatim
    "models_status": 503,  # until ready
    "startup": "report",  # report | missing, or the body of a 200, verbatim
    "started_shift": 0.0,
    "stream": None,  # the body of the completion, verbatim, so many times
    "stream_times": 1,
    "completion_status": 200,
    "token_seconds": 0.0,  # before each
    "exit_code": 0,
    "vllm_log": False,  # sleep through known phases, logging as vLLM does; ready at the end
    "stamps": True,  # of that log's lines; a real container engine has its own
    "record": False,  # tell what happened when: see `tell`; at /recorded too
    **json.loads(sys.argv[1]),
}
EVENTS = [("server_bind", 0.0, 0.02), ("engine_import", 0.01, 0.06), ("weight_load", 0.05, 0.09)]
STARTING = b'{"error": {"code": "starting", "phase": "engine_import"}}'
TOKENS = ["", " Paris", "."]
RECORDED: list[list[Any]] = []
VLLM_PHASES = [
    ("engine_import", "APIServer pid=1", "non-default args: {}"),
    ("config_parse", "APIServer pid=1", "Resolved architecture: Stub"),
    ("engine_import", "EngineCore pid=2", "Initializing a V1 LLM engine"),
    ("engine_init", "EngineCore pid=2", "Starting to load model stub..."),
    ("weight_load", "EngineCore pid=2", "Loading weights took 0.05 seconds"),
    ("kv_cache_alloc", "EngineCore pid=2", "CPU KV cache size: 9 tokens"),
    ("graph_capture", "EngineCore pid=2", "init engine (profile, create kv cache, warmup model) took 0 s"),
    ("tokenizer_init", "APIServer pid=1", "Detected the chat template content format to be 'string'"),
]


def say(line: str) -> None:
    """At once, so that lines of several threads do not mix."""
    os.write(2, f"{line}\n".encode())


def log_as_vllm() -> None:
    for name, process, line in VLLM_PHASES:
        begin = time.time()
        time.sleep(0.06)
        end = time.time()
        # Stamped here, as a container engine stamps lines: how late it reads them is not the tool's error.
        stamp = f"@{end} " if PLAN["stamps"] else ""
        say(f"{stamp}({process}) INFO 01-01 00:00:00 [stub.py:1] {line}")
        tell(name, process.split()[0], begin, end)
    PLAN["logged"], PLAN["ready_after"] = end, 0


def tell(name: str, process: str, begin: float, end: float) -> None:
    """What the server itself knows of a phase, for whoever compares it with what was measured."""
    if PLAN["record"]:
        RECORDED.append([name, process, begin, end])
        say(f"recorded: {json.dumps(RECORDED[-1])}")


def ready() -> bool:
    return PLAN["ready_after"] is not None and time.time() - STARTED >= PLAN["ready_after"]


def startup_report() -> bytes:
    started = STARTED + PLAN["started_shift"]
    events = [
        {"phase": name, "start": started + a, "end": started + b, "process": "pid1", "pid": 1, "detail": ""}
        for name, a, b in EVENTS
        if time.time() - STARTED >= b
    ]
    status = "ready" if ready() else "starting"
    return json.dumps({"schema": 1, "status": status, "started": started, "phases": events}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ready_at = 0.0

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            status = 200 if ready() else PLAN["models_status"]
            listed = json.dumps({"object": "list", "data": [{"id": "stub"}]})
            self.reply(status, (PLAN["models"] or listed).encode() if status == 200 else STARTING)
            if status == 200:
                Handler.ready_at = time.time()
                if PLAN["vllm_log"]:
                    tell("ready", "APIServer", PLAN["logged"], Handler.ready_at)
        elif self.path == "/startup" and PLAN["startup"] != "missing":
            body = startup_report() if PLAN["startup"] == "report" else PLAN["startup"].encode()
            self.reply(200 if ready() else 503, body)
        elif self.path == "/recorded":
            self.reply(200, json.dumps(RECORDED).encode())
        else:
            self.reply(404, b"{}")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        say(f"asked: {json.dumps(request, sort_keys=True)}")
        if PLAN["completion_status"] != 200:
            self.reply(PLAN["completion_status"], b"no such thing")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if PLAN["stream"] is not None:
            for _ in range(PLAN["stream_times"]):
                self.chunk(PLAN["stream"])
        else:
            self.stream_tokens()
        self.chunk("")

    def stream_tokens(self) -> None:
        for number, token in enumerate(TOKENS):
            time.sleep(PLAN["token_seconds"])
            self.chunk(f"data: {json.dumps({'choices': [{'text': token}]})}\n\n")
            if number == 0:
                tell("first_token", "client", Handler.ready_at, time.time())
                tell("stalled", "machine", 0.0, metronome.worst if metronome else 0.0)
            if PLAN["die_in_answer"]:
                say("out of memory \x1b[31mhere\x1b[0m")
                leave(9)
        # A payload cut in two must be put together again.
        self.chunk("data: [DO")
        self.chunk("NE]\n\n")

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def leave(code: int) -> None:
    os._exit(code)


def on_term(signum: int, frame: FrameType | None) -> None:
    leave(PLAN["exit_code"])


def main() -> None:
    signal.signal(signal.SIGTERM, on_term)
    server = ThreadingHTTPServer(tuple(PLAN["address"]), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    tell("container_start", "client", 0.0, STARTED)
    if PLAN["startup"] == "report":
        for name, begin, end in EVENTS:
            tell(name, "pid1", STARTED + begin, STARTED + end)
    if PLAN["die_after"] is not None:
        threading.Timer(PLAN["die_after"], leave, [3]).start()
    if PLAN["vllm_log"]:
        threading.Thread(target=log_as_vllm, daemon=True).start()
    server.serve_forever()


metronome = Metronome() if PLAN["record"] else None
main()
