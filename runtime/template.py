"""The process that imports vLLM once; the API process, engine core and workers are forked from it.

multiprocessing's forkserver imports this module before its first fork. It has one thread, no event
loop, no ZeroMQ context and no device context at that moment, so a fork is safe; vLLM itself opens
those only later, in the forked processes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import sys
import traceback
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from runtime import (
    deferred,
    logs,
    processes,
    quantization_methods,
    record,
    shortcuts,
    state,
    switches,
    trace,
)
from runtime.phases import Phase
from runtime.settings import read_manifest
from runtime.switches import Switch

# What a served model needs in the API process, the engine core and the worker. What only the HTTP app needs,
# and the parser of its arguments, is imported in the API process, while the engine core starts.
_MODULES = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.utils",
    "vllm.v1.worker.gpu_worker",
    "vllm.engine.arg_utils",
)
_CPU_MODULES = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner")

# vLLM sets these for the engine processes of CPUs, which import torch after that; torch reads them once. One
# is in the name of what is compiled, so a process that is spawned would not find what a forked one made.
_CPU_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}


def _fork_from_template() -> None:
    """Make vLLM fork its processes from this one.

    vLLM knows "fork" (unsafe once the API process has threads) and "spawn" (imports everything again)
    and forces "spawn" on CPUs; multiprocessing's own forkserver is neither.
    """
    import vllm.utils.system_utils as system_utils

    system_utils.get_mp_context = processes.context
    if not Switch.TEMPLATE.on:
        return
    # A forked process would otherwise start a forkserver of its own: CPython's forgets in children that
    # one is running (it keeps the address but not the pid).
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]


def _inspect_in_fork() -> None:
    """Let vLLM look at a model class in a fork of this process.

    It does so in a new interpreter, so that a model module cannot open the GPU in the API process; that
    one imports everything again, for several seconds. A fork keeps the separation and is done at once.
    """
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = processes.call_in_fork


def _write_variables() -> None:
    """Write the names of the variables that compiled code depends on, where `warm` asks for them."""
    target = os.environ.get(record.VARIABLES_VARIABLE)
    if target:
        import vllm.envs

        names = {*vllm.envs.compile_factors(), *record.OF_COMPILERS}
        Path(target).write_text(json.dumps(sorted(names)))


def _import_model(folder: Path) -> None:
    """The model's class, and what loads quantized weights: the API process and the engine core need both."""
    import vllm.model_executor.layers.quantization as quantization
    import vllm.model_executor.models.registry as registry

    # What cannot be imported now, or is downloaded later, is imported where an error of it is reported.
    with contextlib.suppress(Exception):
        config = json.loads((folder / "config.json").read_text())
        for name in config["architectures"]:
            importlib.import_module(registry.ModelRegistry.models[name].module_name)
        if method := config.get("quantization_config", {}).get("quant_method"):
            quantization.get_quantization_config(method)


def _remember_generated(recording: Path | None) -> None:
    if recording:
        code = shortcuts.GeneratedCode({}, shortcuts.generated_writer(recording / shortcuts.GENERATED))
    else:
        code = shortcuts.GeneratedCode(shortcuts.read_generated(state.folder() / shortcuts.GENERATED))
    code.install()


def _methods() -> quantization_methods.Methods:
    known = quantization_methods.read(state.folder() / quantization_methods.FILE)
    if not (path := os.environ.get(quantization_methods.VARIABLE)):
        return quantization_methods.Methods(known)
    known |= quantization_methods.read(Path(path))
    return quantization_methods.Methods(known, quantization_methods.writer(Path(path)))


def _defer(recording: Path | None) -> None:
    """Have modules that the recorded start did not use imported later; while recording, all candidates."""
    if not Switch.DEFERRED_IMPORTS.on:
        return
    if recording:
        told = deferred.recorder(recording / deferred.TOUCHED)
        finder = deferred.Deferred(deferred.CANDIDATES, told, check=True)
    elif names := deferred.unused(state.folder() / deferred.TOUCHED):
        finder = deferred.Deferred(names)
    else:
        return
    sys.meta_path.insert(0, finder)
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        sys.meta_path.insert(0, shortcuts.without_compiler())


def _load() -> None:
    # A group of its own: PID 1 can end every engine process at once, and Ctrl-C reaches only PID 1.
    os.setpgid(0, 0)
    # Where the kernel takes several at once, PID 1 has to be there to say so.
    processes.go_before(os.getppid(), os.getpid())
    manifest = read_manifest()
    device = manifest.device
    if device == "cpu":
        os.environ.update(_CPU_ENVIRONMENT)
    # Imports make objects and no garbage: the collector looks at all of them again and again, a third of
    # the import time. Frozen, they are never looked at again, nor copied for that in a forked process.
    if Switch.GC_PAUSE.on:
        gc.disable()
    if logs.is_json():
        logs.configure(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # read once; vLLM hashes it for its compiled code
    recording = os.environ.get(record.VARIABLE)
    if recording:
        record.start(Path(recording))
    structures = shortcuts.ImportStructures({})
    if Switch.IMPORT_STRUCTURES.on:
        structures.known = shortcuts.read_structures(state.folder() / shortcuts.STRUCTURES)
        sys.meta_path.insert(0, structures)
    if Switch.GENERATED_CODE.on:
        _remember_generated(Path(recording) if recording else None)
    if Switch.LATE_VALIDATORS.on:
        sys.meta_path.insert(0, shortcuts.validate_later())
    if Switch.OPERATOR_SOURCES.on:
        sys.meta_path.insert(0, shortcuts.name_operators_quickly())
    methods = _methods()
    if Switch.QUANTIZATION_METHODS.on:
        sys.meta_path.insert(0, methods)
    global imports_remembered
    imports_remembered = bool(structures.known)
    _defer(Path(recording) if recording else None)
    # Making the process and Python's own start are part of it: from a cold page cache they are a tenth.
    remembering = structures.in_place() if Switch.IMPORT_STRUCTURES.on else contextlib.nullcontext()
    with trace.span(Phase.ENGINE_IMPORT, since=trace.launched()), remembering:
        _fork_from_template()
        if Switch.TEMPLATE.on and Switch.INSPECT_IN_FORK.on:
            _inspect_in_fork()
        for name in _MODULES + (_CPU_MODULES if device == "cpu" else ()):
            importlib.import_module(name)
        _import_model(Path(manifest.model_path))
        importlib.import_module("runtime.engine")
        # torch.distributed empties a cache of the compiler, and with it imports that, if it finds it there.
        deferred.forget("torch._dynamo")
    if logs.is_json():
        del os.environ["VLLM_CONFIGURE_LOGGING"]
    _write_variables()
    if recording:
        shortcuts.write_structures(Path(recording) / shortcuts.STRUCTURES, structures.known)
    missing = trace.install(device) + methods.missing
    if Switch.CORE_BESIDE_TOKENIZER.on and not shortcuts.make_structured_output_tokenizer_beside():
        missing.append("vllm.v1.structured_output.cached_tokenizer_from_config")
    if device == "cpu" and Switch.LAZY_KV_CACHE.on and not shortcuts.allocate_kv_cache_lazily():
        missing.append("vllm.v1.worker.utils.allocate_kv_cache")
    # Imported by now where the weights are quantized.
    quantized = device == "cpu" and shortcuts.CPU_4_BIT_KERNEL in sys.modules
    if quantized and Switch.BYTEWISE_REPACK.on and not shortcuts.repack_bytewise():
        missing.append(f"{shortcuts.CPU_4_BIT_KERNEL}.CPUWNA16LinearKernel")
    if device == "cpu" and os.environ.get("TORCH_COMPILE_DISABLE") == "0":
        shortcuts.load_compiled_on_cpu()
        if os.environ.get(state.USED_VARIABLE) and Switch.SHORT_WARMUP.on:
            shortcuts.warm_up_shortly()
    if Switch.GC_PAUSE.on:
        gc.freeze()
        gc.enable()
    if missing:
        print(
            f"coldstart: this vLLM lacks {', '.join(missing)}; its start is slower or less visible",
            flush=True,
        )


def _refuse_if_unsafe() -> None:
    """End the template where forking it is not safe: PID 1 then has every process import vLLM itself."""
    if reason := processes.why_not_fork():
        trace.refuse_fork(reason)
        os._exit(0)


# Whether the image's record of transformers' imports fits this installation, for the API process's metrics.
imports_remembered = False
# The forkserver swallows ImportError from a preloaded module; the API process reports this instead.
failure = ""


def load() -> None:
    """Import vLLM, as this start wants it, into this process. What goes wrong is kept in `failure`."""
    global failure
    try:
        _load()
    except Exception:
        failure = traceback.format_exc()


def _import_everything() -> None:
    """Start this process again without deferred imports: another vLLM may use what their list forbids."""
    print(f"{failure}coldstart: once more, with --off {Switch.DEFERRED_IMPORTS.label}", flush=True)
    trace.take_back_error()
    switches.turn_off(Switch.DEFERRED_IMPORTS)
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - multiprocessing's descriptors are inherited


if multiprocessing.current_process().name == "MainProcess" and os.environ.get(trace.SOCKET_VARIABLE):
    load()
    if failure and any(isinstance(finder, deferred.Deferred) for finder in sys.meta_path):
        _import_everything()
    if Switch.TEMPLATE.on:
        _refuse_if_unsafe()
