"""What quantizing a model will take, predicted from its size, and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from builder.errors import HostError
from builder.methods import METHODS
from builder.models import ModelLock
from builder.recipe import HELD_OUT_BLOCKS, Recipe

GIB = 1024**3
# Limit, usage, and what of the usage is file cache that gives way: cgroup v2, then v1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class Cost:
    """A line through measured runs: peak memory over parameters, seconds over parameters times tokens.

    tokens: those calibrated on and those measured on. The seconds are those of two CPU cores.
    """

    bytes: float
    bytes_per_parameter: float
    seconds: float
    seconds_per_parameter_token: float


# Printed by `python -m benchmarks.quantization OUT.json --cost` for random Llamas of 53M and 172M parameters.
# The runs are in benchmarks/results/quantization-*.json; a test compares them with this.
COSTS: Mapping[str, Cost] = {
    "awq": Cost(6.30e8, 4.95, 12.1, 1.81e-10),
    "awq-gptq": Cost(6.24e8, 5.75, 12.7, 2.21e-10),
    "gptq": Cost(5.56e8, 4.17, 11.2, 7.90e-11),
    "rtn": Cost(4.17e8, 5.13, 7.68, 5.56e-11),
}


def _cost(method: str) -> Cost:
    """For a method that was not measured: the dearest of those that look at activations as it does."""
    alike = [cost for name, cost in COSTS.items() if METHODS[name].calibrated == METHODS[method].calibrated]
    return COSTS.get(method) or max(alike, key=lambda cost: cost.seconds_per_parameter_token)


@dataclass(frozen=True)
class Prediction:
    memory_bytes: int
    seconds: int

    def describe(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        return f"about {self.memory_bytes / GIB:.1f} GiB of memory and {minutes} min on two CPU cores"


def predict(parameters: int, recipe: Recipe) -> Prediction:
    cost = _cost(recipe.method)
    tokens = (recipe.calibration_samples + HELD_OUT_BLOCKS) * recipe.calibration_tokens
    return Prediction(
        memory_bytes=round(cost.bytes + cost.bytes_per_parameter * parameters),
        seconds=round(cost.seconds + cost.seconds_per_parameter_token * parameters * tokens),
    )


def require_memory(lock: ModelLock, recipe: Recipe) -> None:
    """Raises HostError where the predicted memory is more than what is available."""
    available = available_memory()
    if lock.parameters is None or available is None:
        return
    predicted = predict(lock.parameters, recipe)
    if predicted.memory_bytes > available:
        raise HostError(
            f"quantizing {lock.name} needs about {predicted.memory_bytes / GIB:.1f} GiB of memory",
            why=f"It has {lock.parameters / 1e9:.2f}e9 parameters, and {available / GIB:.1f} GiB are free.",
            fix="Use a machine with more memory, or name a checkpoint that its authors quantized.",
        )


def has_memory_to_widen(lock: ModelLock, recipe: Recipe) -> bool:
    """Whether 16-bit weights, and what is computed of them, could be float32 while they are quantized."""
    available = available_memory()
    if lock.parameters is None or available is None:
        return False
    return 2 * predict(lock.parameters, recipe).memory_bytes <= available


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a new process may use: the kernel's estimate, or less where a container is limited.

    root: stands in for "/" in tests. None where there is no such estimate (not Linux).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines if ":" in line)
    free = [int(sizes["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in sizes else []
    for limit, usage, statistics, cached in _CGROUPS:
        folder = root / "sys/fs/cgroup"
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            counters = dict(line.split() for line in (folder / statistics).read_text().splitlines())
        except (OSError, ValueError):  # no such version of cgroups, or "max"
            continue
        free.append(max(0, most - used + int(counters.get(cached, 0))))
    return min(free, default=None)
