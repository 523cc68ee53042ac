"""What one recorded start gives the next ones, and what makes every start fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from builder.docker_engine import Container, DockerEngine
from runtime.switches import LABELS
from tests.image.conftest import PREFIX, ask, coldstart, get, wait_ready

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


_TREE = """
import json, os
from pathlib import Path

lines = [p.read_text() for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.name != str(os.getpid())]
print(json.dumps([sum(word in line for line in lines) for word in ("forkserver", "spawn_main")]))
"""


# Those that do not need the template, alone; then what a start without any of ours is.
@pytest.mark.parametrize(
    "off", ["template", ",".join(name for name in LABELS if name != "template"), ",".join(LABELS)]
)
def test_a_start_without_an_optimisation_answers_the_same(
    off: str, plain: Any, start: Callable[..., Container]
) -> None:
    container = start(plain["tag"], environment={"COLDSTART_OFF": off})
    wait_ready(container)
    assert ask(container)["chat"] == "The capital of France is Paris."
    # Each does leave out what it names.
    log, phases = container.logs(), get(container, "/startup").json["phases"]
    imports = {phase["process"] for phase in phases if phase["phase"] == "engine_import"}
    tree = _json(container, ["python3", "-c", _TREE])
    if "template" in off:
        assert imports == {"api", "EngineCore"}
        assert tree[0] == 0 < tree[1]
    else:
        assert imports == {"template"}
        assert tree[1] == 0 < tree[0]
    remembered = b'coldstart_cache_hit{cache="imports"} 1.0' in get(container, "/metrics").body
    assert remembered == ("import-structures" not in off)
    by_name = {(phase["phase"], phase["process"]): phase for phase in phases}
    tokenizer, core = by_name["tokenizer_init", "api"], by_name["engine_init", "api"]
    assert (core["start"] < tokenizer["end"]) == ("core-beside-tokenizer" not in off)
    if "lazy-kv-cache" in off:
        found = _json(container, ["python3", "-c", _LOOK])
        assert found["resident"] > 2 << 30
    assert "lacks" not in log


def test_image_that_does_not_start_is_told(model: str, base: str, engine: DockerEngine) -> None:
    tag = f"{PREFIX}/never:1"
    done = coldstart("build", model, "--base", base, "-t", tag, "--", "--max-model-len", "999999")
    engine.remove_image(tag)
    assert done.code == 5
    assert "does not start here" in done.err
    assert "max_model_len" in done.err  # vLLM's own words
    assert "Traceback" not in done.err.split("error:")[-1]
