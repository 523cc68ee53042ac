"""What went wrong, in a line that an operator can act on: the reason, and what to do next. Pure."""

from __future__ import annotations

import re
import signal

# The first that matches. docs/faults.md lists what is tested.
_NEXT_STEPS = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), step)
    for pattern, step in (
        (
            r"/dev/shm|shared memory",  # noqa: S108
            "Give the container more shared memory: `docker run --shm-size 1g`, or in Kubernetes an emptyDir "
            "with `medium: Memory` at /dev/shm.",
        ),
        (
            r"out of memory|MemoryError|can't allocate memory|cannot allocate memory",
            "Raise the container's memory limit, or lower --kv-cache-memory-bytes or --max-model-len.",
        ),
        (r"no space left|ENOSPC|Errno 28", "Free the disk, or mount a larger volume at $HOME and /tmp."),
        (
            r"read-only file system|usable temporary directory",
            "Mount a writable /tmp: `docker run --tmpfs /tmp`.",
        ),
        (
            r"permission denied|Errno 13",
            "Let the container's user read the file: `chmod a+r`, and a+rx for the folders above it.",
        ),
        (
            r"safetensor|index-sized integer|JSONDecodeError|weight_load",
            "The weights are damaged or do not fit config.json: copy them again, or build the image again.",
        ),
        (
            r"KV cache|cache blocks|max_model_len|max seq len",
            "Lower --max-model-len, or give the KV cache more memory with --kv-cache-memory-bytes.",
        ),
        (
            r"NUMA nodes",
            "Say which cores each worker gets, one list a worker: `-e VLLM_CPU_OMP_THREADS_BIND='0-3|4-7'`.",
        ),
        (
            r"can't start new thread|Errno 11\b|resource temporarily unavailable",
            "Allow the container more processes: `docker run --pids-limit`, in Kubernetes the kubelet's "
            "podPidsLimit.",
        ),
        (r"AF_UNIX path too long", "Give TMPDIR a shorter path, such as /tmp."),
        (
            r"no progress",
            "Look at what holds it up, or give a slow phase more time: --phase-timeout PHASE=SECONDS.",
        ),
        (
            r"SIGKILL",
            "If it was the kernel, for want of memory: raise the container's memory limit.",
        ),
        (r"does not accept", "Mend the arguments after the image's name."),
        (
            r"\bdied\b|Engine core initialization failed",
            "The engine's output above has the details; where it has none, something killed the process: "
            "look at the node's kernel log, or raise the container's memory limit.",
        ),
    )
)


def ended(name: str, code: int | None) -> str:
    """How a process ended. code: as multiprocessing tells it; the forkserver says 255 for any signal."""
    if code is not None and code < 0:
        return f"{name} was killed by {signal.Signals(-code).name}"
    return f"{name} ended with code {code}"


def with_next_step(reason: str) -> str:
    """The reason as one line, and after it what to do."""
    line = " ".join(reason.split())[:600]
    line = line if line.endswith((".", "!", "?")) else line + "."
    for pattern, step in _NEXT_STEPS:
        if pattern.search(line):
            return f"{line} {step}"
    return f"{line} The engine's output above has the details."
