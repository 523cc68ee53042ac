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
_FLOAT32 = ("--dtype", "float32")
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
_OF_DTYPE = {"--dtype", "--kv-cache-dtype"}
_OF_LOADING = ("--load-format", "--safetensors-load-strategy", "--model-loader-extra-config")


@dataclass(frozen=True)
class Measured:
    """A mode that answers right, and its tokens per second."""

    mode: Mode
    rate: float


def unrecorded(settings: Settings) -> Mode:
    """How the engine is run where no recording is used."""
    mode = _UNRECORDED[settings.manifest.device]
    return _in_float32(mode) if settings.float32 else mode


def eager(settings: Settings) -> Mode:
    """What always answers right, so that answers are compared with it."""
    return _in_float32(_EAGER) if settings.float32 else _EAGER


def find_recording(
    settings: Settings, facts: preflight.Facts, environ: Mapping[str, str]
) -> tuple[Settings, state.Recording | None]:
    """The settings with the mode to run in, and the recording that the mode comes from, if any."""
    room = preflight.room_for_float32(settings, facts, environ)
    settings = replace(settings, float32=(_is_emulated(settings, facts) or None) if room else room)
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
    if settings.float32 is False and _is_in_float32(mode):
        return unused(settings, "it computes in float32, for which the memory is too small here"), None
    recorded = {"status": "used", "reason": "", "mode": mode.name, "key": recording.folder.name}
    return replace(settings, mode_args=mode.engine_args, recorded=recorded), recording


def unused(settings: Settings, reason: str) -> Settings:
    """The settings of a start without a recording."""
    mode = unrecorded(settings)
    recorded = {"status": "unused", "reason": reason, "mode": mode.name}
    return replace(settings, mode_args=mode.engine_args, recorded=recorded)


def reference(mode: Mode) -> Mode:
    """What the answers of a mode are compared with: eager, in its dtype."""
    return _in_float32(_EAGER) if _is_in_float32(mode) else _EAGER


def _in_float32(mode: Mode) -> Mode:
    return Mode(f"{mode.name}-float32", (*mode.engine_args, *_FLOAT32), mode.environment)


def _is_in_float32(mode: Mode) -> bool:
    return _FLOAT32[0] in mode.engine_args  # no mode has another dtype


def _is_16_bit(settings: Settings) -> bool:
    """Whether the model's own dtype is one, and nobody asks for another."""
    given = dict(pairs((*settings.manifest.engine_args, *settings.engine_args)))
    return settings.manifest.dtype in ("bfloat16", "float16") and not given.keys() & _OF_DTYPE


def _is_emulated(settings: Settings, facts: preflight.Facts) -> bool:
    """Whether this CPU would compute the model in software, several times slower than in float32."""
    plain = settings.manifest.quantization is None or facts.unpacks
    return facts.lacks_avx512 and plain and _is_16_bit(settings)


def named(settings: Settings, name: str) -> Mode:
    """The mode of this name, whatever `--optimize` is. Raises SettingsError."""
    known = {how for device, how in _CANDIDATES if device == settings.manifest.device}
    every = (eager(settings), *(mode for how in known for mode in candidates(settings, how)))
    found = {mode.name: mode for mode in every}
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
    wide = tuple(map(_in_float32, found))
    if settings.float32:
        return wide
    # float32 tells apart what bf16 cannot, and compiled it may still be faster than eager.
    plain = manifest.device == "cpu" and manifest.quantization is None and _is_16_bit(settings)
    return found + wide if plain and settings.float32 is None else found


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
