"""What one recorded start gives the next ones, and what makes every start fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from builder.docker_engine import Container, DockerEngine
from tests.image.conftest import PREFIX, coldstart, get, wait_ready

_LOOK = """
import json, os
from pathlib import Path
from runtime import prefetch, shortcuts

def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace(chr(0), " ")

pids = [int(p.name) for p in Path("/proc").glob("[0-9]*") if int(p.name) not in (1, os.getpid())]
lines = {pid: Path(f"/proc/{pid}/status").read_text().splitlines() for pid in pids}
status = {pid: dict(line.split(":", 1) for line in lines[pid]) for pid in pids}
templates = [pid for pid in pids if "forkserver" in command(pid) and int(status[pid]["PPid"]) == 1]
state = prefetch.STATE
print(json.dumps({
    "listed": (state / prefetch.FILE_LIST).read_text().splitlines(),
    "structures": len(shortcuts.read_structures(state / shortcuts.STRUCTURES)),
    "template_threads": [int(status[pid]["Threads"]) for pid in templates],
    "resident": sum(int(s.get("RssAnon", "0 kB").split()[0]) * 1024 for s in status.values()),
}))
"""


def _json(container: Container, command: list[str]) -> Any:
    code, output = container.run(command)
    assert code == 0, output
    return json.loads(output.strip().splitlines()[-1])


def test_a_recorded_start_helps_the_next(
    plain: Any, start: Callable[..., Container], engine: DockerEngine
) -> None:
    assert engine.require_image(plain["tag"]).labels["dev.coldstart.prewarmed"] == "yes"
    container = start(plain["tag"])
    wait_ready(container)
    assert b'coldstart_cache_hit{cache="imports"} 1.0' in get(container, "/metrics").body
    found = _json(container, ["python3", "-c", _LOOK])
    assert any(path.endswith("/libtorch_cpu.so") for path in found["listed"][:10])
    assert any(path.endswith(".pyc") for path in found["listed"])
    assert not any(path.startswith("/models/") for path in found["listed"])
    assert found["structures"] > 1  # of this very installation, or they would not be used
    assert found["template_threads"] == [1]
    assert found["resident"] < 2 << 30  # the KV cache alone is 2 GiB, and nobody has used it


def test_image_that_does_not_start_is_told(model: str, base: str, engine: DockerEngine) -> None:
    tag = f"{PREFIX}/never:1"
    done = coldstart("build", model, "--base", base, "-t", tag, "--", "--max-model-len", "999999")
    engine.remove_image(tag)
    assert done.code == 5
    assert "does not start here" in done.err
    assert "max_model_len" in done.err  # vLLM's own words
    assert "Traceback" not in done.err.split("error:")[-1]
