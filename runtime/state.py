"""State that was recorded when the image was built: compiled code, and how the engine is run with it.

An image may carry several recordings, one for each kind of machine. The one whose facts are those of this
start is used; its files are checked and copied to a writable folder, because vLLM and Inductor write even
when they find everything. Whatever is wrong with it, the server starts without it, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.fingerprint import Facts, differences

# Set by `warm`, to start with what it has just recorded.
FOLDER_VARIABLE = "_COLDSTART_STATE"
# Set by PID 1 where a recording is used.
USED_VARIABLE = "_COLDSTART_RECORDING"
RECORDINGS = "recordings"
RECORDING = "recording.json"
FILES = "cache"
# Which folder below a cache's root each library keeps its own in.
CACHE_VARIABLES: Mapping[str, str] = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "CUDA_CACHE_PATH": "cuda",
}
# Where vLLM keeps what torch compiled of the model, below the folders above.
_COMPILED = "torch_compile_cache/"
# Of any name for what is written anew at each use, or by whoever waits.
_TRANSIENT = (".lock", ".tmp")


class StateError(Exception):
    """A recording cannot be used here; the message says why."""


@dataclass(frozen=True)
class Mode:
    """How the engine is run: arguments after the image's and before the user's, and variables."""

    name: str
    engine_args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """One recording as its recording.json has it.

    files: path below FILES -> (size in bytes, sha256, time of change in ns of the epoch: ninja, by which
    FlashInfer compiles, takes a library that is older than its sources for stale).
    """

    folder: Path
    facts: Facts
    variables: tuple[str, ...]
    mode: Mode
    files: Mapping[str, tuple[int, str, int]]
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_compiled_code(self) -> bool:
        """Whether vLLM compiled the model when this was recorded."""
        return any(_COMPILED in path for path in self.files)

    @classmethod
    def read(cls, folder: Path) -> Recording:
        """Raises StateError."""
        try:
            data = json.loads((folder / RECORDING).read_bytes())
            mode = data["mode"]
            return cls(
                folder=folder,
                facts={str(name): str(value) for name, value in data["facts"].items()},
                variables=tuple(data["variables"]),
                mode=Mode(mode["name"], tuple(mode["engine_args"]), dict(mode["environment"])),
                files={
                    path: (int(size), str(digest), int(changed))
                    for path, (size, digest, changed) in data["files"].items()
                },
                report=data["report"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{folder / RECORDING} is damaged: {error!r}") from None

    def write(self) -> None:
        data = {
            "facts": dict(self.facts),
            "variables": list(self.variables),
            "mode": asdict(self.mode),
            "files": {path: list(entry) for path, entry in self.files.items()},
            "report": dict(self.report),
        }
        (self.folder / RECORDING).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def key(facts: Facts) -> str:
    """The name of a recording's folder."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


def folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE, "/opt/coldstart/state"))


def recordings(state: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in (state / RECORDINGS).iterdir() if path.is_dir())
    return []


def variables(state: Path) -> tuple[str, ...]:
    """Every variable that some recording depends on."""
    names: set[str] = set()
    for folder in recordings(state):
        with suppress(StateError):
            names |= set(Recording.read(folder).variables)
    return tuple(sorted(names))


def choose(here: Facts, state: Path) -> Recording | None:
    """The recording that was made for these facts; None where the image has none at all.

    Raises StateError with what differs from the nearest one.
    """
    reasons = []
    for folder in recordings(state):
        try:
            recording = Recording.read(folder)
        except StateError as error:
            reasons.append(str(error))
            continue
        reason = differences(recording.facts, here)
        if not reason:
            return recording
        reasons.append(reason)
    if reasons:
        raise StateError(min(reasons, key=len))
    return None


def install(recording: Recording, target: Path) -> None:
    """Copy the files below `target`, each checked. Raises StateError, and leaves nothing then."""
    try:
        target.mkdir(parents=True)
        if os.statvfs(target).f_flag & os.ST_NOEXEC:
            raise StateError(f"{target.parent} is mounted noexec, and the recording is compiled code")
        for path, (size, digest, changed) in recording.files.items():
            copy = target / path
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise StateError(f"{path} is outside the recording")
            data = (recording.folder / FILES / path).read_bytes()
            if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                raise StateError(f"{path} is damaged")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
            os.utime(copy, ns=(changed, changed))
    except StateError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise StateError(f"its files cannot be copied to {target}: {error.strerror or error}") from None


def collect(root: Path) -> Iterator[tuple[str, bytes, int]]:
    """(path, content, time of change in ns) of every file below `root` that is worth keeping, sorted."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.endswith(_TRANSIENT):
            yield str(path.relative_to(root)), path.read_bytes(), path.stat().st_mtime_ns


def cache_environment(root: Path) -> dict[str, str]:
    """Where each library is to keep what it compiles."""
    return {name: str(root / folder) for name, folder in CACHE_VARIABLES.items()}
