"""Runs inside a container whose PID 1 is a sleeper: starts the runtime as an ordinary process, does
something to it at a certain moment, and tells how it ended and what it left. The namespace survives it.

argv: one JSON list of scenarios; prints one JSON list of results as its last line. Standard library only.
"""

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PORT = 8000
# Caches under $HOME serve the next start and are kept on purpose; they are no temporary files.
KEPT = {".cache", ".config", ".triton"}
LIMIT = 240
SERVING = "ready to serve"


def get(path: str) -> tuple[int, Any] | None:
    """(status, JSON body) or None while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except (OSError, ValueError):
        return None


def complete() -> Any:
    """Four tokens of the served model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def processes() -> dict[int, str]:
    """Name and state of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            found[int(stat.parent.name)] = text[text.index("(") :].split()[0] + text.rsplit(")", 1)[1][:2]
    return found


def listening() -> set[tuple[str, int]]:
    """Addresses and ports that somebody listens on."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                local, state = (line.split()[index] for index in (1, 3))
                if state == "0A":
                    address, port = local.split(":")
                    found.add((str(ip_address(address)), int(port, 16)))
    return found


def ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Of /proc/net/tcp: words of 32 bits, each in this machine's order of bytes."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return getattr(address, "ipv4_mapped", None) or address


def reachable() -> list[int]:
    """Ports that are open to others than this container."""
    return sorted({port for address, port in listening() if not ipaddress.ip_address(address).is_loopback})


def traces() -> dict[str, set[Any]]:
    return {
        "processes": {pid for pid in processes() if pid != os.getpid()},
        "files": {str(path) for path in Path("/tmp").iterdir() if path.name not in KEPT},
        "shared_memory": set(Path("/dev/shm").iterdir()),
        "ports": listening(),
    }


def damaged_model(kind: str, folder: Path) -> str:
    """A manifest of the image's model with its weights damaged."""
    manifest = json.loads(Path("/opt/coldstart/manifest.json").read_text())
    source = Path(manifest["model"]["path"])
    model = folder / "model"
    model.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, model / file.name)
            continue
        data = file.read_bytes()
        if kind == "truncated":
            data = data[: len(data) // 2]
        elif kind == "corrupt":
            data = b"\xff" * 64 + data[64:]
        (model / file.name).write_bytes(data)
        if kind == "unreadable":
            (model / file.name).chmod(0)
    manifest["model"]["path"] = str(model)
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest))
    return str(path)


def reached(startup: tuple[int, Any], when: str, pid1: int) -> bool:
    """Whether this answer of /startup has got to the phase `when`, running or already over.

    PID 1 binds and reads settings before anybody can ask: any other phase is one of another process.
    """
    status, body = startup
    if when == SERVING:
        return status == 200
    rows = [row for row in body["phases"] + body["running"] if row["pid"] != pid1 or when == "server_bind"]
    return when in [row["phase"] for row in rows]


def pid_of(role: str, body: Any) -> int:
    marks = {"template": "engine_import", "api": "tokenizer_init"}  # what each does, and only it
    for item in body["running"] + body["phases"]:
        if item["phase"] == marks.get(role) or item.get("process") == role:
            return int(item["pid"])
    raise LookupError(role)


def act(action: str, process: subprocess.Popen[bytes], body: Any) -> None:
    """action: "SIGTERM" to the runtime, "SIGKILL EngineCore" and the like to one of its processes,
    "FILL FOLDER"; several are separated by "; ".
    """
    for step in action.split("; "):
        name, _, what = step.partition(" ")
        if name == "FILL":
            fill(Path(what))
        else:
            os.kill(pid_of(what, body) if what else process.pid, getattr(signal, name))


FILLER = "filled-by-a-test"


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / FILLER).open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


def clean() -> None:
    """What the test itself has put there."""
    for folder in ("/dev/shm", "/tmp"):
        (Path(folder) / FILLER).unlink(missing_ok=True)


def run(scenario: dict[str, Any], folder: Path) -> dict[str, Any]:
    environment = {**os.environ, **scenario.get("environment", {})}
    if scenario.get("model"):
        environment["COLDSTART_MANIFEST"] = damaged_model(scenario["model"], folder)
    before = traces()
    command = [sys.executable, "-m", "runtime", *scenario.get("arguments", [])]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines: list[bytes] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    when, act_on = scenario.get("when"), scenario.get("act")
    # When it was done, or when the phase in which it shows had begun.
    fault_at: float | None = None
    healths: set[int] = set()
    details: set[str] = set()
    resident = 0
    answer, phases, ports = None, [], []
    begun = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - begun > LIMIT:
            process.kill()
        startup = get("/startup")
        if startup and fault_at is None:
            details |= {startup[1]["detail"], *(row["detail"] for row in startup[1]["running"])}
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                rss = next(line for line in status if line.startswith("VmHWM"))
                resident = max(resident, int(rss.split()[1]))
            if when and reached(startup, when, process.pid):
                phases = startup[1]["phases"]
                answer = complete() if when == SERVING else None
                ports = reachable()
                if act_on:
                    act(act_on, process, startup[1])
                fault_at = time.monotonic()
        health = get("/health")
        if health:
            healths.add(health[0])
        time.sleep(0.02)
    ended = time.monotonic()
    clean()
    reader.join(10)
    after = traces()
    log = b"".join(lines).decode(errors="replace")
    return {
        "name": scenario["name"],
        "code": process.returncode,
        "reached": fault_at is not None,
        "seconds": round(ended - (fault_at or begun), 2),
        "last_line": log.rstrip().rpartition("\n")[2],
        "log": log[-6000:],
        "healths": sorted(healths),
        "details": sorted(details),
        "answer": answer,
        "phases": phases,
        "reachable": ports,
        "resident_kib": resident,
        "left": {kind: sorted(map(str, after[kind] - before[kind])) for kind in after},
        "zombies": [pid for pid, text in processes().items() if text.endswith("Z")],
    }


def main() -> None:
    results = []
    for scenario in json.loads(sys.argv[1]):
        folder = Path("/tmp/scenario")
        folder.mkdir()
        try:
            results.append(run(scenario, folder))
        finally:
            shutil.rmtree(folder)
    print(json.dumps(results))


main()
