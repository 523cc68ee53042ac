"""What of a start cannot be avoided on this machine, beside what bench measured of each phase.

    python -m benchmarks.floor IMAGE WARM.json COLD.json OUT.json

IMAGE: a recorded CPU image of ours, which WARM.json has starts of with a warm page cache and COLD.json with a
cold one: what that adds is held to the bytes that were read, at the fastest that any phase read. A floor does
the least that a phase must: start a process in a container, start Python, load the libraries and the bytecode
that the recorded start lists, copy the weights' bytes from the page cache into new memory, parse the
tokenizer. It runs alone on an idle machine, where the phases share two cores. Seconds, medians.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import bake
from benchmarks.harness import describe_machine
from benchmarks.schema import BenchResult, Run, read_result
from builder.docker_engine import DockerEngine
from runtime.phases import Phase

_RUNS = 7
_READY_SECONDS = 300
# phase -> what its floor is made of, and in words
_FLOORS: Mapping[Phase, tuple[tuple[str, ...], str]] = {
    Phase.CONTAINER_START: (("container",), "`docker run` of `true`, to its exit"),
    Phase.SERVER_BIND: (("python",), "Python starts and does nothing"),
    Phase.ENGINE_IMPORT: (("libraries", "bytecode"), "libraries loaded, bytecode read and unmarshalled"),
    Phase.TOKENIZER_INIT: (("tokenizer",), "tokenizer.json parsed"),
    Phase.WEIGHT_LOAD: (("weights",), "the weights' bytes copied once into new memory"),
}
# Inside the image, once a run; each part in a process of its own, so that none finds what another did.
_MEASURE = """
import json, subprocess, sys, time
PRELUDE = '''
import ctypes, gc, json, marshal, mmap, sys, time
from pathlib import Path
gc.disable()
model = Path(json.loads(Path("/opt/coldstart/manifest.json").read_bytes())["model"]["path"])
listed = Path("/opt/coldstart/state/files.txt").read_text().splitlines()
def libraries():
    for path in listed:
        if ".so" in path:
            try: ctypes.CDLL(path)
            except OSError: pass
def bytecode():
    kept = [marshal.loads(Path(path).read_bytes()[16:]) for path in listed if path.endswith(".pyc")]
def weights():
    kept = []
    for path in model.glob("*.safetensors"):
        kept.append(mmap.mmap(-1, path.stat().st_size))
        with path.open("rb", buffering=0) as file:
            done = 0
            while read := file.readinto(memoryview(kept[-1])[done:]): done += read
def tokenizer(load):
    load(str(model / "tokenizer.json"))
'''
found = {}
start = time.perf_counter()
subprocess.run([sys.executable, "-c", "pass"], check=True)
found["python"] = time.perf_counter() - start
for name in ("libraries", "bytecode", "weights", "tokenizer"):
    ready, call = "", f"{name}()"
    if name == "tokenizer":
        ready, call = "from tokenizers import Tokenizer", "tokenizer(Tokenizer.from_file)"
    code = f"{PRELUDE}\\n{ready}\\nstart = time.perf_counter()\\n{call}\\nprint(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found[name] = float(done.stdout)
print(json.dumps(found))
"""


def _container(image: str) -> float:
    start = time.monotonic()
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "true", image]
    subprocess.run(command, check=True)
    return time.monotonic() - start


def measure(image: str) -> list[dict[str, float]]:
    """One dict a run: part -> seconds."""
    samples = [{"container": _container(image)} for _ in range(_RUNS)]
    container = DockerEngine().start(image, network="none", publish=False)
    try:
        if not container.wait_for(["python3", "-m", "runtime", "health"], _READY_SECONDS):
            raise SystemExit(container.logs()[-2000:])
        for sample in samples:
            code, output = container.run(["python3", "-c", _MEASURE])
            if code:
                raise SystemExit(output)
            sample.update(json.loads(output.strip().splitlines()[-1]))
    finally:
        container.remove()
    return samples


def reading(image: str, warm: Sequence[Run], cold: BenchResult) -> dict[str, float]:
    """What a cold page cache costs beside what the disk needs for its bytes; bytes, per second, seconds."""
    runs = cold.measured(image)
    read = median(
        sum(event.resources.read_bytes or 0 for event in run.phases if event.resources) for run in runs
    )
    rate = bake.disk_of(cold)
    slow, quick = (median(run.total_seconds or 0.0 for run in each) for each in (runs, warm))
    return {"read_bytes": read, "rate": rate, "floor_seconds": read / rate, "added_seconds": slow - quick}


def main(image: str, warm: Path, cold: Path, output: Path) -> None:
    runs = read_result(warm).measured(image)
    if not runs:
        raise SystemExit(f"{warm} has no start of {image}")
    samples = measure(image)
    rows: list[dict[str, Any]] = []
    for phase in Phase:
        took = median(run.seconds_in(phase) for run in runs)
        parts, words = _FLOORS.get(phase, ((), ""))
        floor = sum(median(sample[part] for sample in samples) for part in parts)
        if round(took, 2):
            rows.append({"phase": phase.value, "seconds": took, "floor_seconds": floor, "floor": words})
    machine = describe_machine().model_dump()
    result: dict[str, Any] = {
        **{"schema": 2, "image": image, "machine": machine, "bench": [warm.name, cold.name]},
        **{"samples": samples, "phases": rows, "cold": reading(image, runs, read_result(cold))},
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    print("| phase | seconds | floor | which is |\n|---|---:|---:|---|")
    for row in rows:
        print(f"| {row['phase']} | {row['seconds']:.2f} | {row['floor_seconds']:.2f} | {row['floor']} |")
    print("a cold page cache: " + ", ".join(f"{name} {value:.4g}" for name, value in result["cold"].items()))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]))
