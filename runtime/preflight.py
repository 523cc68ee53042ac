"""What can be told in milliseconds, before anything is imported: may this start work at all?

`gather` looks at the machine once; `check` and all below it are pure. What could not be found out is None
and refuses nothing: vLLM then decides. The GPU checks have not yet run on a GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime import model_folder
from runtime.settings import Manifest, Settings

_T = TypeVar("_T")

_MIB = 1 << 20
_SHM = Path("/dev/shm")  # noqa: S108 - looked at, not written
# NVIDIA's container toolkit mounts the first; WSL 2 offers the second.
_GPU_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
# For all that may take its time: nvidia-smi, and beside it the digests of a mounted model.
_BUDGET_SECONDS = 0.8
# vLLM's ring buffers of ten chunks: one to the workers (16 MiB chunks), one back from each (24 MiB).
# vLLM asks for the space of each when it makes it, and a ring takes none before something is written, so
# the largest one must fit, however many workers there are; all of them together are what is advised.
_REQUEST_RING, _RESPONSE_RING = 160 * _MIB, 240 * _MIB
# What the processes take besides weights and cache: only in what is advised, not in what is refused.
_PROCESSES = 1536 * _MIB
# vLLM 0.32 needs 7.0; its kernels for int4 weights (AWQ among them) 7.5.
_MIN_CAPABILITY, _MIN_CAPABILITY_INT4 = (7, 0), (7, 5)
# The oldest Linux driver that runs any minor version of a CUDA release.
_MIN_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
_GPU_COLUMNS = "name,compute_cap,memory.total,memory.free"
_MULTIPLIERS = {
    **{"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12},
    **{"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40},
}


class PreflightError(Exception):
    """This container cannot serve this model. The message ends with what to change."""


@dataclass(frozen=True)
class Gpu:
    """capability: (major, minor); memory: total bytes; free: bytes of it, None where it is not told."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int | None = None


@dataclass(frozen=True)
class Facts:
    """The machine as this container sees it; sizes in bytes, None where it could not be told.

    driver: of NVIDIA, (major, minor); gpus: None where nvidia-smi did not answer in time; config: the model's
    config.json, None where it is not there; read_only: folders that must be writable and are not;
    model_problem: what is wrong with the folder that the model is mounted at, or downloaded to; home: the
    home folder where it is not writable, which no start needs; lacks_avx512: of a CPU that is to serve.
    """

    gpu_visible: bool
    gpu_count: int
    driver: tuple[int, int] | None
    gpus: tuple[Gpu, ...] | None
    memory: int | None
    shm_free: int | None
    read_only: tuple[str, ...]
    config: Mapping[str, Any] | None
    model_problem: str = ""
    home: str = ""
    lacks_avx512: bool = False

    @property
    def unpacks(self) -> bool:
        """Whether the model's 4-bit weights are unpacked, for want of a kernel for them."""
        return self.lacks_avx512 and _has_4_bits(self.config or {})


def gather(manifest: Manifest, environ: Mapping[str, str] = os.environ) -> Facts:
    """Takes less than a second, or what the file system takes to open a file."""
    deadline = time.monotonic() + _BUDGET_SECONDS
    cuda = manifest.device == "cuda"
    visible = any(node.exists() for node in _GPU_NODES)
    query = _ask_for_gpus() if cuda and visible else None
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    nodes = [node for node in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name)]
    config: dict[str, Any] | None = None
    with suppress(OSError, ValueError):
        config = json.loads((Path(manifest.model_path) / "config.json").read_bytes())
    shm_free: int | None = None
    with suppress(OSError):
        usage = os.statvfs(_SHM)
        shm_free = usage.f_bavail * usage.f_frsize
    temporary, home = environ.get("TMPDIR", "/tmp"), environ.get("HOME", "")  # noqa: S108
    model_problem = model_folder.problem(manifest, deadline)
    return Facts(
        gpu_visible=visible,
        gpu_count=len(chosen_gpus(nodes, chosen)),
        driver=parse_driver(_read("/proc/driver/nvidia/version")) if cuda else None,
        gpus=_answer(query, chosen, deadline) if query else None,
        memory=memory_limit(
            _read("/proc/meminfo"),
            _read("/sys/fs/cgroup/memory.max"),
            _read("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        ),
        shm_free=shm_free,
        read_only=() if _is_writable(temporary) else (temporary,),
        config=config,
        model_problem=model_problem,
        home="" if not home or _is_writable(home) else home,
        lacks_avx512=manifest.device == "cpu" and lacks_avx512(_read("/proc/cpuinfo")),
    )


def _has_4_bits(config: Mapping[str, Any]) -> bool:
    """Whether a model is quantized to 4 bits, as AWQ, GPTQ and compressed-tensors say so."""
    said = config.get("quantization_config") or {}
    groups = said.get("config_groups") or {}
    return 4 in (
        said.get("bits"),
        *((group.get("weights") or {}).get("num_bits") for group in groups.values()),
    )


def lacks_avx512(cpuinfo: str | None) -> bool:
    """Of an x86 processor, which lists its instruction sets as flags."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo or "", re.MULTILINE)
    return flags is not None and "avx512f" not in flags[1].split()


def shortcomings(settings: Settings, facts: Facts) -> Iterator[str]:
    """What a start does without here, and serves all the same."""
    if facts.home:
        yield f"{facts.home}, the home folder, is not writable: caches are kept for this start only"
    if facts.unpacks:
        yield (
            "this CPU lacks AVX-512, which vLLM's kernel for 4-bit weights needs: they are unpacked, "
            "and take as much memory as before they were quantized"
        )
    if settings.float32 and "float32" in settings.mode_args:
        yield (
            "this CPU lacks AVX-512, and computes 16-bit floats in software: float32 is taken, which is "
            "quicker but for one short request, and takes twice the memory (--dtype auto does without)"
        )


def room_for_float32(settings: Settings, facts: Facts, environ: Mapping[str, str]) -> bool | None:
    """Whether 16-bit weights fit in float32, and the longest request in the KV cache; None: unknown."""
    weights = settings.manifest.weight_bytes * (8 if facts.unpacks else 2)
    request = _float32_cache_of_one_request(settings, facts.config or {})
    if facts.memory is None or not weights or request is None:
        return None
    cache = cache_bytes(settings, environ)
    left = facts.memory - weights - _PROCESSES
    return cache <= left and request <= (cache or left // 2)


def _float32_cache_of_one_request(settings: Settings, config: Mapping[str, Any]) -> int | None:
    """Bytes, as if every layer had a plain cache, which takes the most; None: config.json does not say."""
    config = config.get("text_config") or config
    length = settings.engine_value("--max-model-len") or ""
    try:
        tokens = int(length) if length.isdigit() else int(config["max_position_embeddings"])
        heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
        width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        return tokens * int(config["num_hidden_layers"]) * 2 * heads * width * 4
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _is_writable(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def check(settings: Settings, facts: Facts, environ: Mapping[str, str]) -> None:
    """Raises PreflightError with the first thing that is wrong."""
    for problem in problems(settings, facts, environ):
        raise PreflightError(problem)


def problems(settings: Settings, facts: Facts, environ: Mapping[str, str]) -> Iterator[str]:
    """Everything that is wrong, the most telling first; each says what to change."""
    manifest = settings.manifest
    if manifest.device == "cuda":
        yield from _gpu_problems(settings, facts, environ)
    if facts.model_problem:
        yield facts.model_problem
    elif facts.config is None and manifest.weights == "bake":
        yield (
            f"the model is not at {manifest.model_path}. "
            "A volume mounted over it hides the baked files: mount it elsewhere."
        )
    for folder in facts.read_only:
        yield (
            f"{folder} is not writable, and vLLM keeps sockets and compiled code there. "
            f"Add `--tmpfs {folder}:exec` to `docker run`, or in Kubernetes mount an emptyDir at {folder}."
        )
    yield from _parallel_problems(settings, facts)
    yield from _memory_problems(settings, facts, environ)
    yield from _shm_problems(settings, facts, environ)


def _gpu_problems(settings: Settings, facts: Facts, environ: Mapping[str, str]) -> Iterator[str]:
    if not facts.gpu_visible:
        yield (
            "no NVIDIA GPU is visible in this container, and this image serves on one. "
            "Start it with `docker run --gpus all …` (NVIDIA Container Toolkit), or in Kubernetes "
            "request `nvidia.com/gpu: 1`; for a node without a GPU build with a CPU base image."
        )
    elif "CUDA_VISIBLE_DEVICES" in environ and not facts.gpus and not facts.gpu_count:
        yield (
            f"CUDA_VISIBLE_DEVICES is {environ['CUDA_VISIBLE_DEVICES']!r}, which hides every GPU of this "
            "container. Unset it, or choose with `docker run --gpus device=N`."
        )
    needed = minimum_driver(environ)
    if facts.driver and needed and facts.driver < needed:
        have, want = (".".join(map(str, version)) for version in (facts.driver, needed))
        yield (
            f"the node's NVIDIA driver is {have}, and CUDA {environ['CUDA_VERSION']} of this image "
            f"wants {want}. Update the driver, or build on a base image with an older CUDA."
        )
    int4 = "int4" in (settings.manifest.quantization or "") or "awq" in (settings.manifest.quantization or "")
    least = _MIN_CAPABILITY_INT4 if int4 else _MIN_CAPABILITY
    for gpu in facts.gpus or ():
        if gpu.capability < least:
            have, want = (f"{major}.{minor}" for major, minor in (gpu.capability, least))
            yield (
                f"the {gpu.name} has compute capability {have}, and this model needs {want}. "
                "Choose a newer GPU with `--gpus device=N` or a node selector."
            )


def _parallel_problems(settings: Settings, facts: Facts) -> Iterator[str]:
    tensor, pipeline = _parallel(settings)
    devices = len(facts.gpus) if facts.gpus is not None else facts.gpu_count
    if (
        settings.manifest.device == "cuda"
        and devices
        and tensor * pipeline > devices
        and not _multi_node(settings)
    ):
        yield (
            f"tensor parallel size {tensor} times pipeline parallel size {pipeline} needs "
            f"{tensor * pipeline} GPUs, and {devices} {'is' if devices == 1 else 'are'} visible. "
            "Add `--gpus all`, or lower --tensor-parallel-size."
        )
    config = facts.config or {}
    config = config.get("text_config") or config
    heads, kv_heads = config.get("num_attention_heads"), _shared_heads(config)
    if isinstance(heads, int) and heads % tensor:
        yield (
            f"tensor parallel size {tensor} does not divide the model's {heads} attention heads. "
            f"Give --tensor-parallel-size {_largest_divisor(heads, tensor)}."
        )
    elif kv_heads and max(kv_heads, tensor) % min(kv_heads, tensor):
        yield (
            f"tensor parallel size {tensor} does not fit the model's {kv_heads} key-value heads: one must "
            f"divide the other. Give --tensor-parallel-size {_largest_divisor(kv_heads, tensor)}."
        )
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and pipeline > layers:
        yield (
            f"pipeline parallel size {pipeline} is more than the model's {layers} layers. "
            f"Give --pipeline-parallel-size {layers} or less."
        )


def _memory_problems(settings: Settings, facts: Facts, environ: Mapping[str, str]) -> Iterator[str]:
    weights = settings.manifest.weight_bytes
    if settings.manifest.device == "cpu":
        cache = cache_bytes(settings, environ)
        if facts.memory is not None and weights + cache > facts.memory:
            yield (
                f"the weights take {_size(weights)} and the KV cache {_size(cache)}, "
                f"and this container may use {_size(facts.memory)}. "
                f"Give it more with `--memory {_gib(weights + cache + _PROCESSES)}g` (in Kubernetes "
                "resources.limits.memory), or shrink the cache with --kv-cache-memory-bytes."
            )
        return
    tensor, pipeline = _parallel(settings)
    offloaded = settings.engine_value("--cpu-offload-gb") is not None
    share = weights // (tensor * pipeline)
    asked = _utilization(settings)
    # vLLM takes the first ones, unless it is told which. What others hold of the rest is no matter.
    chosen = settings.engine_value("--device-ids") is not None
    for gpu in () if chosen else (facts.gpus or ())[: tensor * pipeline]:
        allowed = gpu.memory if asked is None else int(gpu.memory * asked)
        free = gpu.memory if gpu.free is None else gpu.free
        if asked is not None and allowed > free:  # vLLM refuses that as well
            yield (
                f"--gpu-memory-utilization {asked:g} asks for {_size(allowed)} of the {gpu.name}, and "
                f"{_size(free)} of it is free. Lower it, or end what else runs on that GPU."
            )
        if share > min(allowed, free) and not offloaded:
            have = f"has {_size(gpu.memory)}" + (f", {_size(free)} of it free" if free < gpu.memory else "")
            have += "" if asked is None else f"; --gpu-memory-utilization allows {_size(allowed)}"
            yield (
                f"the weights take {_size(share)} on each GPU, and the {gpu.name} {have}. "
                "Spread them with --tensor-parallel-size over more GPUs (`--gpus all`), "
                "or quantize the model."
            )


def _shm_problems(settings: Settings, facts: Facts, environ: Mapping[str, str]) -> Iterator[str]:
    tensor, pipeline = _parallel(settings)
    processes = tensor * pipeline
    backend = settings.engine_value("--distributed-executor-backend")
    several = backend in ("mp", None) and processes > 1
    if settings.manifest.device == "cpu" and environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1":
        several = several or backend in ("uni", None)
    if not several and backend != "mp":
        return
    if facts.shm_free is not None and facts.shm_free < max(_REQUEST_RING, _RESPONSE_RING):
        wanted = _REQUEST_RING + processes * _RESPONSE_RING
        yield (
            f"{_SHM} has {_size(facts.shm_free)} free, and {processes} worker "
            f"{'process' if processes == 1 else 'processes'} may use {_size(wanted)} of it. "
            f"Add `--shm-size {_gib(wanted)}g` to `docker run`, or in Kubernetes mount an emptyDir "
            "with medium Memory at /dev/shm."
        )


def minimum_driver(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """For the CUDA that the base image names; None where it names none or brings its compatibility driver."""
    major = environ.get("CUDA_VERSION", "").split(".")[0]
    compatible = environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "0") not in ("", "0")
    if not major.isdigit() or compatible or "/compat" in environ.get("LD_LIBRARY_PATH", ""):
        return None
    return _MIN_DRIVER.get(int(major))


def parse_driver(version: str | None) -> tuple[int, int] | None:
    """From /proc/driver/nvidia/version: "NVRM version: NVIDIA UNIX … Kernel Module  535.104.05 …"."""
    found = re.search(r"Kernel Module[^\n]*?\s(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def parse_gpus(output: str) -> tuple[Gpu, ...] | None:
    """From nvidia-smi, asked for _GPU_COLUMNS without a header and units (MiB)."""
    gpus = []
    for line in output.splitlines():
        try:
            name, capability, memory, free = (part.strip() for part in line.rsplit(",", 3))
            major, minor = capability.split(".")
            left = int(free) * _MIB if free.isdigit() else None
            gpus.append(Gpu(name, (int(major), int(minor)), int(memory) * _MIB, left))
        except ValueError:
            return None
    return tuple(gpus) or None


def chosen_gpus(gpus: Sequence[_T], chosen: str | None) -> Sequence[_T]:
    """Those that CUDA_VISIBLE_DEVICES leaves: by number, up to the first wrong one; by UUID just as many."""
    if chosen is None:
        return gpus
    entries = [entry.strip() for entry in chosen.split(",")]
    if not all(re.fullmatch(r"-?\d+", entry) for entry in entries):
        return gpus[: len([entry for entry in entries if entry])]
    valid = itertools.takewhile(lambda number: 0 <= number < len(gpus), map(int, entries))
    return [gpus[number] for number in valid]


def memory_limit(meminfo: str | None, cgroup_v2: str | None, cgroup_v1: str | None) -> int | None:
    """The least of the control group's limit and what the node has available, in bytes."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo or "", re.MULTILINE)
    limits = [int(found[1]) * 1024] if found else []
    limits += [int(text) for text in (cgroup_v2, cgroup_v1) if text and text.strip().isdigit()]
    return min(limits, default=None)


def cache_bytes(settings: Settings, environ: Mapping[str, str]) -> int:
    """The KV cache that is asked for; 0 where vLLM chooses."""
    legacy = environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if legacy.isdigit():
        return int(legacy) << 30
    found = re.fullmatch(
        r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", settings.engine_value("--kv-cache-memory-bytes") or ""
    )
    return int(float(found[1]) * _MULTIPLIERS.get(found[2], 1)) if found else 0


def _utilization(settings: Settings) -> float | None:
    """The share of a GPU's memory that is asked for; None where vLLM chooses, or refuses what is asked."""
    text = settings.engine_value("--gpu-memory-utilization", "--device-memory-utilization") or ""
    return float(text) if re.fullmatch(r"0?\.\d+|1(\.0+)?", text) else None


def _parallel(settings: Settings) -> tuple[int, int]:
    def size(*flags: str) -> int:
        text = settings.engine_value(*flags) or ""
        return int(text) if text.isdigit() and int(text) else 1  # vLLM tells what is no number

    return size("--tensor-parallel-size", "-tp"), size("--pipeline-parallel-size", "-pp")


def _shared_heads(config: Mapping[str, Any]) -> int | None:
    """Key-value heads to be spread over the ranks; None with latent attention, which has none."""
    heads = config.get("num_key_value_heads")
    return heads if isinstance(heads, int) and heads > 0 and "kv_lora_rank" not in config else None


def _multi_node(settings: Settings) -> bool:
    ray = settings.engine_value("--distributed-executor-backend") == "ray"
    return ray or settings.engine_value("--nnodes", "-n") is not None


def _largest_divisor(number: int, at_most: int) -> int:
    return max(n for n in range(1, at_most + 1) if number % n == 0)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / _MIB:.0f} MiB"


def _gib(count: int) -> int:
    """Whole GiB, rounded up."""
    return -(-count >> 30)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _ask_for_gpus() -> subprocess.Popen[str] | None:
    query = ["nvidia-smi", f"--query-gpu={_GPU_COLUMNS}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _answer(query: subprocess.Popen[str], chosen: str | None, deadline: float) -> tuple[Gpu, ...] | None:
    try:
        output, _ = query.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        query.kill()  # and not waited for: one that hangs in the driver does not end even so
        return None
    gpus = parse_gpus(output) if query.returncode == 0 else None
    return None if gpus is None else tuple(chosen_gpus(gpus, chosen))
