"""Modules that vLLM imports and this start does not use, imported when something first needs them.

A deferred module is the real module object, not yet executed. Whoever touches an attribute of it executes it,
once, under the lock that an import would take; an error of it appears there, and at each further touch. What
`from module import name` takes of a deferred module is a DeferredName until then, and the real object in
every module's globals afterwards.

Which modules are deferred is measured: `runtime warm` starts with all CANDIDATES deferred and records which
process touched which, in a start and a request. Later starts defer those that none touched, and those that
the API process alone did: it executes them while the engine core starts, which does not wait for them.
Without that record nothing is deferred. Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from runtime import metas
from runtime.phases import API_PROCESS

TOUCHED = "touched.txt"

# Of vLLM 0.32 and what it uses: a module, and the names that are taken of it where vLLM imports it. Each was
# read for what executing it does to others: nothing, but registering operators that only it and its users
# call. A name may be called, subclassed, or tested against; one that is used otherwise at import, in an
# annotation that pydantic evaluates for one, does not belong here.
CANDIDATES: Mapping[str, tuple[str, ...]] = {
    "torch._inductor": (),
    "torch._dynamo": (),
    "torch._dynamo.symbolic_convert": ("InliningInstructionTranslator",),
    metas.MODULE: (),
    "torch.utils.cpp_extension": ("load_inline",),
    "transformers.models.whisper.tokenization_whisper": ("LANGUAGES",),
    "transformers.conversion_mapping": (
        "get_checkpoint_conversion_mapping",
        "register_checkpoint_conversion_mapping",
    ),
    "transformers.generation.utils": ("GenerationMixin",),
    "transformers.masking_utils": ("ALL_MASK_ATTENTION_FUNCTIONS",),
    "transformers.modeling_utils": (
        "ALL_ATTENTION_FUNCTIONS",
        "PreTrainedAudioTokenizerBase",
        "PreTrainedModel",
    ),
    "transformers.models.auto.image_processing_auto": ("get_image_processor_config",),
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter": ("OTLPSpanExporter",),
    "opentelemetry.exporter.otlp.proto.http.trace_exporter": ("OTLPSpanExporter",),
    "compressed_tensors.logger": ("LoggerConfig", "configure_logger", "logger"),
    "compressed_tensors.offload.load": ("load_offloaded_model",),
    "cv2": (),
    "httpcore2": (),
    "requests": ("Response", "Session"),
    "xgrammar": ("CompiledGrammar", "Grammar", "GrammarMatcher", "StructuralTag"),
    "openai": (),
    "openai.types": (),
    "loguru": ("logger",),
    "vllm.transformers_utils.processor": (
        "cached_get_processor",
        "cached_processor_from_config",
        "get_video_processor_cls_name",
    ),
    "vllm.assets.base": ("get_cache_dir",),
    "vllm.entrypoints.serve": (),
    "vllm.entrypoints.serve.elastic_ep": (),
    "vllm.entrypoints.serve.elastic_ep.middleware": ("get_scaling_elastic_ep", "set_scaling_elastic_ep"),
    "vllm.multimodal.media.connector": (
        "MEDIA_CONNECTOR_REGISTRY",
        "MediaConnector",
        "merge_media_io_kwargs",
    ),
    "vllm.entrypoints.mcp.tool": ("HarmonyBrowserTool", "HarmonyPythonTool", "Tool"),
    "vllm.model_executor.layers.quantization.modelopt": ("ModelOptQuantConfigBase",),
    "vllm.model_executor.layers.quantization.online.base": ("OnlineQuantizationConfig",),
    "vllm.model_executor.warmup.kernel_warmup": ("kernel_warmup",),
    "vllm.models.deepseek_v4": (),
    "vllm.models.deepseek_v4.common": (),
    "vllm.models.deepseek_v4.common.eplb_util": ("dspark_draft_supports_eplb",),
    "vllm.parser": (),
    "vllm.parser.engine": (),
    "vllm.parser.engine.adapters": ("ParserEngineReasoningAdapter",),
    "vllm.v1.worker.gpu.warmup": ("warmup_kernels",),
    "vllm.v1.spec_decode.dflash": ("DFlashProposer",),
    "vllm.v1.spec_decode.draft_model": ("DraftModelProposer",),
    "vllm.v1.spec_decode.eagle": ("EagleProposer",),
    "vllm.v1.spec_decode.extract_hidden_states": ("ExtractHiddenStatesProposer",),
    "vllm.v1.spec_decode.gemma4": ("Gemma4Proposer",),
    "vllm.v1.spec_decode.medusa": ("MedusaProposer",),
    "vllm.v1.spec_decode.step3p5": ("Step3p5MTPProposer",),
    "vllm.v1.spec_decode.suffix_decoding": ("SuffixDecodingProposer",),
}
# Submodules that may be imported while their package is deferred, since they need nothing of it. Any other
# has its package executed first, as ever.
_STANDALONE = re.compile(r"torch\._inductor\.custom_graph_pass$|openai\.")
# Functions that patch a deferred package whenever vLLM is imported, and the submodule that they patch: they
# are told that it is not there, and called once it is.
_POSTPONED = {
    ("vllm.env_override", "_patch_inductor_fallback_allow_list"): (
        "torch._inductor",
        "torch._inductor.lowering",
    ),
}
# What the import system itself looks at.
_PLAIN = frozenset(
    {
        "__class__",
        "__dict__",
        "__doc__",
        "__file__",
        "__loader__",
        "__name__",
        "__package__",
        "__path__",
        "__spec__",
    }
)

Names = Mapping[str, Sequence[str]]


class DeferredName:
    """What `from module import name` gives while `module` is deferred: forwards all that is done to it."""

    __slots__ = ("_module", "_name")

    def __init__(self, module: _DeferredModule, name: str) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        if name == "__dict__":  # vLLM looks into that of each object in every namespace for kernels
            raise AttributeError(name)
        return getattr(_real(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_real(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_real(self), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _real(self)(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_real(self),)

    # Nothing is an instance, or a subclass, of a class whose module has not run.
    def __instancecheck__(self, instance: Any) -> bool:
        return not _is_deferred(self) and isinstance(instance, _real(self))

    def __subclasscheck__(self, subclass: type) -> bool:
        return not _is_deferred(self) and issubclass(subclass, _real(self))

    def __getitem__(self, item: Any) -> Any:
        return _real(self)[item]

    def __or__(self, other: Any) -> Any:
        return _real(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | _real(self)

    def __eq__(self, other: object) -> bool:
        return bool(_real(self) == (_real(other) if isinstance(other, DeferredName) else other))

    def __hash__(self) -> int:
        return hash(_real(self))

    def __repr__(self) -> str:
        if not _is_deferred(self):
            return repr(_real(self))
        module, name = (object.__getattribute__(self, key) for key in DeferredName.__slots__)
        return f"{module.__name__}.{name}"  # a data class writes its annotations into its documentation


def _is_deferred(name: DeferredName) -> bool:
    return type(object.__getattribute__(name, "_module")) is _DeferredModule


def _real(name: DeferredName) -> Any:
    module: ModuleType = object.__getattribute__(name, "_module")
    execute(module)
    return getattr(module, object.__getattribute__(name, "_name"))


class _DeferredModule(ModuleType):
    """A module whose code has not run yet; the first touch runs it."""

    def __getattribute__(self, name: str) -> Any:
        if name in _PLAIN:
            return object.__getattribute__(self, name)
        loader = object.__getattribute__(self, "__spec__").loader
        own = type(loader) is _Deferring and loader.owner == threading.get_ident()
        if own or type(loader) is not _Deferring:  # its own code asks, or another thread has just executed it
            return object.__getattribute__(self, name)
        if loader.owner is None and name in loader.names:
            return loader.given.setdefault(name, DeferredName(self, name))
        execute(self)
        return getattr(self, name)


class _Deferring(Loader):
    """Makes a module as `loader` would, and executes it when asked by `execute`.

    given: the names that were taken of it; owner: the thread that executes it, while one does.
    """

    def __init__(self, loader: Any, names: Sequence[str], told: Callable[[str], None]) -> None:
        self.loader, self.names, self.told = loader, frozenset(names), told
        self.given: dict[str, DeferredName] = {}
        self.owner: int | None = None
        self.operators: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:  # what inspect and pkgutil ask a loader
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _DeferredModule
        if self.operators:
            metas.stand_in(self.operators, lambda: execute(module))


class _Imported(Loader):
    """For a module that is there already. The import system would execute it again if it had its spec."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__
        module.__spec__ = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:  # noqa: ARG002
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def execute(module: ModuleType) -> None:
    """Run the code of a deferred module; nothing to do for any other. Raises what the code raises."""
    if type(module) is not _DeferredModule:
        return
    spec = module.__spec__
    assert spec is not None
    package = spec.name.rpartition(".")[0]
    if package:  # comes first in every import
        execute(importlib.import_module(package))
    if spec.name != metas.MODULE and package.partition(".")[0] == "torch" and metas.MODULE in sys.modules:
        execute(sys.modules[metas.MODULE])  # as in torch's own order
    current = sys.modules.setdefault(spec.name, module)
    if current is not module:  # it was forgotten, and imported again
        execute(current)
        vars(module).update(vars(current))
        object.__setattr__(module, "__class__", ModuleType)
        return
    # The import system's own lock of this module: it sees a deadlock between two importing threads.
    with importlib._bootstrap._ModuleLockManager(spec.name):  # type: ignore[attr-defined]
        loader: Any = spec.loader
        if type(module) is not _DeferredModule or loader.owner is not None:
            return  # another thread did it, or this one is doing it
        loader.told(spec.name)
        loader.owner = threading.get_ident()
        try:
            loader.loader.exec_module(module)
        finally:
            loader.owner = None
        spec.loader = module.__loader__ = loader.loader
        if type(module) is _DeferredModule:
            object.__setattr__(module, "__class__", ModuleType)
    real = {id(name): getattr(module, key) for key, name in loader.given.items()}
    if _waiting is None:
        _replace(real)
    else:
        _waiting.update(real)


# What is to be put in place of deferred names, by their ids; while somebody collects it.
_waiting: dict[int, Any] | None = None


@contextmanager
def replacing_at_the_end() -> Iterator[None]:
    """For a block that executes many modules: the names taken of them are replaced once, after it."""
    global _waiting
    _waiting = {}
    try:
        yield
    finally:
        real, _waiting = _waiting, None
        _replace(real)


def _replace(real: Mapping[int, Any]) -> None:
    """Put the real objects where the names taken of a module stand."""
    if not real:
        return
    for other in list(sys.modules.values()):
        if isinstance(other, ModuleType) and type(other) is not _DeferredModule:
            for key, value in list(vars(other).items()):
                if type(value) is DeferredName and id(value) in real:
                    vars(other)[key] = real[id(value)]


def forget(name: str) -> None:
    """Take a deferred module out of sys.modules, for those who ask there whether it was imported."""
    if type(sys.modules.get(name)) is _DeferredModule:
        del sys.modules[name]
        package, _, child = name.rpartition(".")
        if package:
            vars(sys.modules[package]).pop(child, None)


class Deferred(MetaPathFinder):
    """To be put on sys.meta_path.

    told: called with the name of each deferred module that is executed; check: look first whether its source
    is as CANDIDATES wants it, and tell of it if not; known: to metas.py, without which its module is
    not deferred.
    """

    def __init__(
        self,
        names: Names,
        told: Callable[[str], None] = lambda _: None,
        *,
        check: bool = False,
        known: metas.Known | None = None,
    ) -> None:
        self._metas = known or metas.Known()
        self._names = {name: names[name] for name in names if self._metas.operators or name != metas.MODULE}
        self._told, self._check = told, check
        self._postponed = {where: what for where, what in _POSTPONED.items() if what[0] in names}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        first = sys.modules.get(metas.MODULE if name in self._metas.modules else name.rpartition(".")[0])
        if type(first) is _DeferredModule and not _STANDALONE.match(name) and name not in self._names:
            execute(first)
            if name in sys.modules:  # it was imported meanwhile
                return importlib.machinery.ModuleSpec(name, _Imported(sys.modules[name]))
        after = [where for where, (_, patched) in self._postponed.items() if patched == name]
        if name not in self._names and not after:
            return None
        for where, (patched, _) in self._postponed.items():
            if patched == name and _called_by(*where):
                raise ImportError(f"{name} is not imported for this", name=name)
        spec = self._find_with_others(name, path, target)
        if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
            return spec
        if after:
            run = _then_call(spec.loader.exec_module, after)
            spec.loader.exec_module = run  # type: ignore[method-assign,assignment]
        if name in self._names:
            if self._check and not _is_as_listed(spec.loader.get_source(name) or "", self._names[name]):
                self._told(name)
            else:
                spec.loader = loader = _Deferring(spec.loader, self._names[name], self._told)
                loader.operators = self._metas.operators if name == metas.MODULE else ()
        return spec

    def _find_with_others(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                return spec
        return None


def _is_as_listed(source: str, names: Iterable[str]) -> bool:
    """Whether a module's code has these names, and does not put something else in the module's place."""
    had = r"^(class |def |from \S+ import (.*\W)?|    (?=\w+,$))?"
    defined = all(re.search(rf"{had}{name}\b", source, re.MULTILINE) for name in names)
    return defined and "sys.modules[__name__]" not in source


def _called_by(module: str, function: str) -> bool:
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    code: CodeType | None = frame.f_code if frame is not None else None
    return code is not None and code.co_name == function and frame.f_globals.get("__name__") == module


def _then_call(
    run: Callable[[ModuleType], None], functions: Iterable[tuple[str, str]]
) -> Callable[[ModuleType], None]:
    def wrapper(module: ModuleType) -> None:
        run(module)
        for name, function in functions:
            getattr(sys.modules.get(name), function, lambda: None)()

    return wrapper


def unused(path: Path) -> dict[str, tuple[str, ...]]:
    """The candidates that no process but the API process touched in an earlier start, which wrote `path`.

    None without that.
    """
    if (touched := _touched(path)) is None:
        return {}
    return {name: names for name, names in CANDIDATES.items() if touched.get(name, set()) <= {API_PROCESS}}


def of_api_process(path: Path) -> list[str]:
    """Those of `unused` that the API process touched, in its order."""
    return [name for name, processes in (_touched(path) or {}).items() if processes == {API_PROCESS}]


def _touched(path: Path) -> dict[str, set[str]] | None:
    """Deferred modules by name: the processes that touched them. None where nothing was recorded."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    touched: dict[str, set[str]] = {}
    for line in lines:
        name, _, process = line.partition(" ")
        touched.setdefault(name, set()).add(process)
    return touched


def recorder(path: Path) -> Callable[[str], None]:
    """A function that notes in `path` which candidates this process and its children touch."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def told(name: str) -> None:
        process = multiprocessing.current_process().name
        os.write(log, f"{name} {process if process == API_PROCESS else 'other'}\n".encode())

    return told
