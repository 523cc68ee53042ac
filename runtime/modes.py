"""The ways of running the engine that a recording may choose among: data by device and `--optimize`.

The rows for CUDA have not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from runtime import fingerprint, preflight, state
from runtime.settings import Settings, SettingsError, pairs
from runtime.state import Mode

# A faster engine is worth a longer start from here on, when neither is asked for before the other.
BALANCED_GAIN = 1.2

_EAGER = Mode("eager", ("--enforce-eager",))
_DEFAULT = Mode("default")
_COMPILED_CPU = Mode(
    "compiled",
    ("--no-enforce-eager",),
    {
        "TORCH_COMPILE_DISABLE": "0",
        # The header would be compiled again at every start: it lies outside of every cache.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    },
)
_PLAN: Mapping[str, str] = {"VLLM_ENABLE_STARTUP_PLAN": "1"}

# Without a recording: on CPUs what always answers right, on GPUs what vLLM does by itself.
_UNRECORDED: Mapping[str, Mode] = {"cpu": _EAGER, "cuda": _DEFAULT}
_CANDIDATES: Mapping[tuple[str, str], tuple[Mode, ...]] = {
    ("cpu", "startup"): (),
    ("cpu", "balanced"): (_COMPILED_CPU,),
    ("cpu", "throughput"): (_COMPILED_CPU,),
    ("cuda", "startup"): (Mode("few-graphs", ("-O1", "--max-cudagraph-capture-size", "8"), _PLAN),),
    ("cuda", "balanced"): (replace(_DEFAULT, environment=_PLAN),),
    ("cuda", "throughput"): (Mode("O3", ("-O3",), _PLAN), replace(_DEFAULT, environment=_PLAN)),
}
# vLLM's ways of bringing weights into memory, besides its own choice.
_SAFETENSORS: Mapping[str, tuple[str, ...]] = {
    "prefetch": ("--safetensors-load-strategy", "prefetch"),
    "4 threads": (
        "--model-loader-extra-config",
        '{"enable_multithread_load": true, "num_threads": 4}',
    ),
}
_LOADERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": _SAFETENSORS,
    "cuda": {
        **_SAFETENSORS,
        "fastsafetensors": ("--load-format", "fastsafetensors"),
        "runai_streamer": ("--load-format", "runai_streamer"),
    },
}
_OF_LOADING = ("--load-format", "--safetensors-load-strategy", "--model-loader-extra-config")


@dataclass(frozen=True)
class Measured:
    """A mode that answers right, and its tokens per second."""

    mode: Mode
    rate: float


def unrecorded(device: str) -> Mode:
    """How the engine is run where no recording is used."""
    return _UNRECORDED[device]


def find_recording(
    settings: Settings, facts: preflight.Facts, environ: Mapping[str, str]
) -> tuple[Settings, state.Recording | None]:
    """The settings with the mode to run in, and the recording that the mode comes from, if any."""
    if "recording" in settings.off:
        return unused(settings, "it is switched off by --off"), None
    if "VLLM_CACHE_ROOT" in environ:
        return unused(settings, "VLLM_CACHE_ROOT is set, and its caches are used"), None
    folder = state.folder()
    here = fingerprint.gather(
        settings, environ, state.variables(folder), gpus=facts.gpus, driver=facts.driver
    )
    try:
        recording = state.choose(here, folder)
    except state.StateError as error:
        return unused(settings, str(error)), None
    if recording is None:
        return replace(unused(settings, ""), recorded={"status": "none", "reason": "", "mode": ""}), None
    mode = recording.mode
    recorded = {"status": "used", "reason": "", "mode": mode.name, "key": recording.folder.name}
    return replace(settings, mode_args=mode.engine_args, recorded=recorded), recording


def unused(settings: Settings, reason: str) -> Settings:
    """The settings of a start without a recording."""
    mode = unrecorded(settings.manifest.device)
    recorded = {"status": "unused", "reason": reason, "mode": mode.name}
    return replace(settings, mode_args=mode.engine_args, recorded=recorded)


def reference(candidate: Mode | None = None) -> Mode:
    """What answers are compared with: eager, in the candidate's dtype.

    Without a candidate, what serves where none answers right.
    """
    args = candidate.engine_args if candidate else ()
    if "--dtype" not in args:
        return _EAGER
    dtype = args[args.index("--dtype") + 1]
    return Mode(f"eager-{dtype}", (*_EAGER.engine_args, "--dtype", dtype))


def named(settings: Settings, name: str) -> Mode:
    """The mode of this name, whatever `--optimize` is. Raises SettingsError."""
    known = {how for device, how in _CANDIDATES if device == settings.manifest.device}
    found = {mode.name: mode for how in known for mode in candidates(settings, how)} | {_EAGER.name: _EAGER}
    if name not in found:
        raise SettingsError(
            f"--mode {name}: no such mode for this image and these arguments; there are: "
            + ", ".join(sorted(found))
        )
    return found[name]


def candidates(settings: Settings, optimize: str | None = None) -> tuple[Mode, ...]:
    """Modes to try besides the reference, none that contradicts an argument of the user's.

    optimize: the image's own unless another is given.
    """
    manifest = settings.manifest
    given = dict(pairs((*manifest.engine_args, *settings.engine_args)))
    if "--enforce-eager" in given:
        return ()
    found = _CANDIDATES[manifest.device, optimize or manifest.optimize]
    # float32 tells apart what bf16 cannot, and compiled it may still be faster than eager.
    wider = manifest.quantization is None and manifest.dtype not in (None, "float32")
    if manifest.device == "cpu" and wider and "--dtype" not in given:
        found += tuple(
            Mode(f"{mode.name}-float32", (*mode.engine_args, "--dtype", "float32"), mode.environment)
            for mode in found
        )
    return found


def loaders(settings: Settings) -> Mapping[str, tuple[str, ...]]:
    """Name -> engine arguments; none where the user has chosen how weights are loaded."""
    given = dict(pairs((*settings.manifest.engine_args, *settings.engine_args)))
    chosen = any(flag.split(".", 1)[0] in _OF_LOADING for flag in given)
    return {} if chosen else _LOADERS[settings.manifest.device]


def choose(optimize: str, reference: Measured, right: Sequence[Measured]) -> Measured:
    """right: the candidates that answer like the reference, in order of preference."""
    if not right:
        return reference
    if optimize == "startup":
        return right[0]
    fastest = max((reference, *right), key=lambda measured: measured.rate)
    if optimize == "balanced" and fastest.rate < reference.rate * BALANCED_GAIN:
        return reference
    return fastest
