"""The process that imports vLLM once; the API process, engine core and workers are forked from it.

multiprocessing's forkserver imports this module before its first fork. It has one thread, no event
loop, no ZeroMQ context and no device context at that moment, so a fork is safe; vLLM itself opens
those only later, in the forked processes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from runtime import (
    deferred,
    logs,
    metas,
    processes,
    quantization_methods,
    record,
    shortcuts,
    state,
    switches,
    tokenizer,
    trace,
)
from runtime.phases import Phase
from runtime.settings import read_manifest
from runtime.switches import Switch

# What a served model needs in every process. What only the HTTP app needs, and the parser of its arguments,
# is imported in the API process, while the engine core starts.
_MODULES = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.utils",
    "vllm.engine.arg_utils",
    "runtime.engine",
)
# What only the engine core and the workers need: imported here too, but once the API process is forked.
_CORE_MODULES: Mapping[str, tuple[str, ...]] = {
    "cuda": ("vllm.v1.engine.core", "vllm.v1.core.sched.scheduler", "vllm.v1.worker.gpu_worker"),
    "cpu": (
        "vllm.v1.engine.core",
        "vllm.v1.core.sched.scheduler",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.worker.cpu_model_runner",
    ),
}

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


def _config(folder: Path) -> Mapping[str, Any]:
    """The model's; empty where it is downloaded later, or damaged, which is told when vLLM reads it."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((folder / "config.json").read_text()))
    return {}


def _import_quantization(config: Mapping[str, Any]) -> None:
    """What loads quantized weights. What cannot be imported now is imported where an error is reported."""
    import vllm.model_executor.layers.quantization as quantization

    with contextlib.suppress(Exception):
        if method := config.get("quantization_config", {}).get("quant_method"):
            quantization.get_quantization_config(method)


def _import_model(config: Mapping[str, Any]) -> None:
    """The model's class, in the same way."""
    import vllm.model_executor.models.registry as registry

    with contextlib.suppress(Exception):
        for name in config["architectures"]:
            importlib.import_module(registry.ModelRegistry.models[name].module_name)


def _remember_generated(recording: Path | None) -> None:
    if recording:
        code = shortcuts.GeneratedCode({}, shortcuts.generated_writer(recording / shortcuts.GENERATED))
    else:
        code = shortcuts.GeneratedCode(shortcuts.read_generated(state.folder() / shortcuts.GENERATED))
    code.install()


def _methods() -> quantization_methods.Methods:
    if not Switch.QUANTIZATION_METHODS.on:
        return quantization_methods.Methods({})
    known = quantization_methods.read(state.folder() / quantization_methods.FILE)
    if not (path := os.environ.get(quantization_methods.VARIABLE)):
        return quantization_methods.Methods(known)
    known |= quantization_methods.read(Path(path))
    return quantization_methods.Methods(known, quantization_methods.writer(Path(path)))


@functools.cache
def _metas() -> metas.Known:
    return metas.read(state.folder() / metas.FILE, shortcuts.of_installation())


def _defer(recording: Path | None) -> None:
    """Have modules that the recorded start did not use imported later; while recording, all candidates."""
    if not Switch.DEFERRED_IMPORTS.on:
        return
    known = _metas()
    if recording:
        told = deferred.recorder(recording / deferred.TOUCHED)
        finder = deferred.Deferred(deferred.CANDIDATES, told, check=True, known=known)
    elif names := deferred.unused(state.folder() / deferred.TOUCHED):
        finder = deferred.Deferred(names, known=known)
    else:
        return
    sys.meta_path.insert(0, finder)
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        sys.meta_path.insert(0, shortcuts.without_compiler())


class _Imports:
    """What is imported, in two steps, and what of vLLM is replaced after each."""

    def __init__(self) -> None:
        manifest = read_manifest()
        self._device = manifest.device
        self._config = _config(Path(manifest.model_path))
        recording = os.environ.get(record.VARIABLE)
        self._recording = Path(recording) if recording else None
        self._structures = shortcuts.ImportStructures({})
        self._methods = _methods()
        self._missing: list[str] = []

    def prepare(self) -> None:
        """What makes imports faster."""
        global imports_remembered, remembering
        if self._recording:
            record.start(self._recording)
        if Switch.IMPORT_STRUCTURES.on:
            self._structures.known = shortcuts.read_structures(state.folder() / shortcuts.STRUCTURES)
            sys.meta_path.insert(0, self._structures)
            remembering = self._structures.in_place
        if Switch.GENERATED_CODE.on:
            _remember_generated(self._recording)
        if Switch.LATE_VALIDATORS.on:
            sys.meta_path.insert(0, shortcuts.validate_later())
        if Switch.OPERATOR_SOURCES.on:
            sys.meta_path.insert(0, shortcuts.name_operators_quickly())
        if Switch.TOKENIZER_ONCE.on:
            sys.meta_path.insert(0, tokenizer.once())
        if Switch.QUANTIZATION_METHODS.on:
            sys.meta_path.insert(0, self._methods)
        if path := os.environ.get(metas.VARIABLE):
            sys.meta_path.insert(0, metas.Noting(Path(path), shortcuts.of_installation()))
        imports_remembered = bool(self._structures.known)
        _defer(self._recording)

    def for_all(self) -> None:
        """What every process needs."""
        # Making the process and Python's own start are part of it: from a cold page cache they are a tenth.
        with self._importing(trace.launched()):
            if self._device == "cpu":
                os.environ.update(_CPU_ENVIRONMENT)
            if logs.is_json():
                logs.configure(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
                os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # read once; vLLM hashes it for its compiled code
            _fork_from_template()
            if Switch.TEMPLATE.on and Switch.INSPECT_IN_FORK.on:
                _inspect_in_fork()
            for name in _MODULES:
                importlib.import_module(name)
            _import_quantization(self._config)
            metas.find_as_attributes(_metas())
            if logs.is_json():
                del os.environ["VLLM_CONFIGURE_LOGGING"]
            self._missing += [*self._methods.missing, *trace.install_in_api()]

    def for_core(self) -> None:
        """What the engine core and its workers need besides. Says what this vLLM lacks."""
        with self._importing(detail="what only the engine core needs"):
            for name in _CORE_MODULES[self._device]:
                importlib.import_module(name)
            _import_model(self._config)
            self._missing += [*trace.install_in_core(self._device), *self._shorten()]
        _write_variables()
        if self._recording:
            shortcuts.write_structures(self._recording / shortcuts.STRUCTURES, self._structures.known)
        if self._missing:
            lacking = ", ".join(self._missing)
            print(f"coldstart: this vLLM lacks {lacking}; its start is slower or less visible", flush=True)

    @contextlib.contextmanager
    def _importing(self, since: float | None = None, detail: str = "") -> Iterator[None]:
        # Imports make objects and no garbage: the collector looks at all of them again and again, a third of
        # the import time. Frozen, they are never looked at again, nor copied for that in a forked process.
        if Switch.GC_PAUSE.on:
            gc.disable()
        with trace.span(Phase.ENGINE_IMPORT, detail, since=since), remembering():
            yield
            # torch.distributed empties a cache of the compiler, and imports that, if it finds it there.
            deferred.forget("torch._dynamo")
        if Switch.GC_PAUSE.on:
            gc.freeze()
            gc.enable()

    def _shorten(self) -> list[str]:
        """Put in place what makes the engine core's start shorter. Returns the names that this vLLM lacks."""
        missing = []
        if Switch.TOKENIZER_ONCE.on and not tokenizer.make_structured_output_tokenizer_late():
            missing.append("vllm.v1.structured_output.cached_tokenizer_from_config")
        if self._device != "cpu":
            return missing
        if Switch.LAZY_KV_CACHE.on and not shortcuts.allocate_kv_cache_lazily():
            missing.append("vllm.v1.worker.utils.allocate_kv_cache")
        # Imported by now where the weights are quantized.
        quantized = shortcuts.CPU_4_BIT_KERNEL in sys.modules and not shortcuts.multiply_unpacked()
        if quantized and Switch.BYTEWISE_REPACK.on and not shortcuts.repack_bytewise():
            missing.append(f"{shortcuts.CPU_4_BIT_KERNEL}.CPUWNA16LinearKernel")
        if os.environ.get("TORCH_COMPILE_DISABLE") == "0":
            shortcuts.load_compiled_on_cpu()
            if os.environ.get(state.USED_VARIABLE) and Switch.SHORT_WARMUP.on:
                shortcuts.warm_up_shortly()
        return missing


# Whether the image's record of transformers' imports fits this installation, for the API process's metrics.
imports_remembered = False
# For a block that imports more of transformers.
remembering: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
# The forkserver swallows ImportError from a preloaded module; the API process reports this instead.
failure = ""
# What is still to be imported when the first process is forked.
_for_core: Callable[[], None] | None = None


def load(*, core_later: bool = False) -> Callable[[], None] | None:
    """Import vLLM, as this start wants it, into this process. What goes wrong is kept in `failure`.

    core_later: do not yet import what only the engine core needs, and return what does.
    """
    global failure
    try:
        # A group of its own: PID 1 can end every engine process at once, and Ctrl-C reaches only PID 1.
        os.setpgid(0, 0)
        # Where the kernel takes several at once, PID 1 has to be there to say so.
        processes.go_before(os.getppid(), os.getpid())
        imports = _Imports()
        imports.prepare()
        imports.for_all()
        if core_later:
            return imports.for_core
        imports.for_core()
    except Exception:
        failure = traceback.format_exc()
    return None


def _import_everything() -> None:
    """Start this process again without deferred imports: another vLLM may use what their list forbids."""
    print(f"{failure}coldstart: once more, with --off {Switch.DEFERRED_IMPORTS.label}", flush=True)
    trace.take_back_error()
    switches.turn_off(Switch.DEFERRED_IMPORTS)
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - multiprocessing's descriptors are inherited


def _refuse_if_unsafe() -> None:
    """End the template where forking it is not safe: PID 1 then has every process import vLLM itself."""
    if reason := processes.why_not_fork():
        trace.refuse_fork(reason)
        os._exit(0)


def _import_for_core() -> None:
    """After the first fork, which is the API process's. Until it returns, PID 1 waits, and so does a core."""
    if _for_core is None:
        return
    run = _for_core
    _forget_core()
    try:
        run()
    except Exception:
        traceback.print_exc()
        trace.take_back_error()
        trace.refuse_fork("since importing what the engine core needs failed")
        os._exit(0)
    _refuse_if_unsafe()


def _forget_core() -> None:
    global _for_core
    _for_core = None


def _become_template() -> None:
    global _for_core
    rest = load(core_later=Switch.TEMPLATE.on and Switch.CORE_IMPORTS_LATER.on)
    if failure and any(isinstance(finder, deferred.Deferred) for finder in sys.meta_path):
        _import_everything()
    if Switch.TEMPLATE.on:
        _refuse_if_unsafe()
    if rest:
        _for_core = rest
        os.register_at_fork(after_in_parent=_import_for_core, after_in_child=_forget_core)


if multiprocessing.current_process().name == "MainProcess" and os.environ.get(trace.SOCKET_VARIABLE):
    _become_template()
