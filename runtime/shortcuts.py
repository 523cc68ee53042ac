"""What vLLM and its libraries do slowly at a start, done later, beforehand or not at all.

Each shortcut replaces a function of a library before it is called, in the template process or in the API
process, and none changes an answer. A release that lacks the function starts without the shortcut.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.machinery
import marshal
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

CPU_4_BIT_KERNEL = "vllm.model_executor.kernels.linear.mixed_precision.cpu"
STRUCTURES = "transformers-imports.marshal"
GENERATED = "generated-code.marshal"
# Smaller tensors come from the allocator's own pages.
_LAZY_BYTES = 64 << 20
_WARM_UP_TOKENS = 16
_DIGEST_BYTES = 16
# Of 4-bit weights without zero points.
_MIDDLE = 8

Structures = dict[tuple[str | None, ...], Any]


def allocate_kv_cache_lazily() -> bool:
    """Let the kernel zero a CPU's KV cache page by page as it is used, instead of all of it at the start.

    False where this vLLM lacks the function. To be called once vLLM is imported.
    """
    runner: Any = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    utils: Any = importlib.import_module("vllm.v1.worker.utils")
    allocate = vars(utils).get("allocate_kv_cache")
    if allocate is None or vars(runner).get("allocate_kv_cache") is not allocate:
        return False
    utils.allocate_kv_cache = runner.allocate_kv_cache = _with_lazy_zeros(allocate)
    return True


def _with_lazy_zeros(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        import torch

        zeros = torch.zeros
        torch.zeros = _lazy_zeros(zeros)
        try:
            return allocate(*args, **kwargs)
        finally:
            torch.zeros = zeros

    return wrapper


def _lazy_zeros(zeros: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def lazy(size: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
        bytes_only = isinstance(size, int) and dtype is torch.int8 and size >= _LAZY_BYTES
        if bytes_only and torch.device(device or "cpu").type == "cpu":
            return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)
        return zeros(size, dtype=dtype, device=device, **kwargs)

    return lazy


def repack_bytewise() -> bool:
    """Let a CPU's 4-bit kernel reorder weights by moving bytes: its own way makes an int32 of each first.

    The first layer is done both ways; where the two differ, vLLM's own stays. False where this vLLM lacks the
    function. To be called once the kernel's module is imported.
    """
    module: Any = importlib.import_module(CPU_4_BIT_KERNEL)
    kernel: Any = getattr(module, "CPUWNA16LinearKernel", None)
    own = vars(kernel).get("_process_gptq_weights_w4a16") if kernel else None
    if own is None or not hasattr(module, "_get_isa_hint"):
        return False

    def quick(self: Any, layer: Any) -> None:
        packed = getattr(layer, self.w_q_name)
        layer.isa_hint = module._get_isa_hint(getattr(layer, self.w_s_name).dtype)
        packed.data = blocks_of_16_outputs(packed.data)

    @functools.wraps(own)
    def first(self: Any, layer: Any) -> None:
        import torch

        packed = getattr(layer, self.w_q_name)
        before = packed.data
        own(self, layer)
        same = self.config.weight_type.size_bits == 4 and torch.equal(
            blocks_of_16_outputs(before), packed.data
        )
        kernel._process_gptq_weights_w4a16 = quick if same else own

    kernel._process_gptq_weights_w4a16 = first
    return True


def multiply_unpacked() -> bool:
    """Let a CPU that vLLM has no kernel for 4-bit weights for, one without AVX-512, serve them unpacked.

    vLLM chooses the kernel there all the same, starts, and dies at the first request. False where the kernel
    is there. To be called once the kernel's module is imported.
    """
    import torch

    module: Any = importlib.import_module(CPU_4_BIT_KERNEL)
    kernel: Any = getattr(module, "CPUWNA16LinearKernel", None)
    names = ("_process_gptq_weights_w4a16", "apply_weights")
    if hasattr(torch.ops._C, "cpu_gemm_wna16") or not all(name in vars(kernel) for name in names):
        return False

    def unpack(self: Any, layer: Any) -> None:
        packed, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name).data
        zeros = nibbles(getattr(layer, self.w_zp_name).data) if self.config.zero_points else _MIDDLE
        packed.data = unpacked(nibbles(packed.data.t()), scales, zeros)

    def multiply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        return torch.nn.functional.linear(x, getattr(layer, self.w_q_name), bias)

    kernel._process_gptq_weights_w4a16, kernel.apply_weights = unpack, multiply
    return True


def nibbles(packed: Any) -> Any:
    """uint8 of (rows, columns * 8) from int32 of (rows, columns), the first in the lowest bits."""
    import torch

    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).view(len(packed), -1)


def unpacked(weights: Any, scales: Any, zeros: Any) -> Any:
    """Weights in the dtype of `scales`: (outputs, inputs), as `weights` has them in integers.

    scales: (groups, outputs); zeros: the same, or one number.
    """
    grouped = weights.to(scales.dtype).view(len(weights), len(scales), -1)
    middle = zeros if isinstance(zeros, int) else zeros.t().to(scales.dtype).unsqueeze(-1)
    return ((grouped - middle) * scales.t().unsqueeze(-1)).view(weights.shape)


def blocks_of_16_outputs(packed: Any) -> Any:
    """4-bit weights, from eight inputs in an int32 to eight outputs in one, blocked.

    packed: (inputs / 8, outputs), the first input in the lowest bits, as GPTQ and compressed-tensors have it.
    Returns (outputs / 16, inputs * 2): for each input in turn, the block's 16 outputs.
    """
    import torch

    inputs, outputs = packed.shape[0] * 8, packed.shape[1]
    # A byte holds inputs 2i, in its low half, and 2i + 1; two rows of them are outputs 2j and 2j + 1.
    pairs = packed.t().contiguous().view(torch.uint8).view(outputs // 16, 8, 2, inputs // 2)
    even, odd = pairs[:, :, 0], pairs[:, :, 1]
    blocks = torch.empty(outputs // 16, inputs // 2, 2, 8, dtype=torch.uint8)
    blocks[:, :, 0] = ((even & 0x0F) | (odd << 4)).transpose(1, 2)
    blocks[:, :, 1] = ((even >> 4) | (odd & 0xF0)).transpose(1, 2)
    return blocks.view(outputs // 16, inputs * 8).view(torch.int32)


def start_core_beside_tokenizer(log_stats: bool, then: Callable[[Any], object]) -> None:
    """Have AsyncLLM launch the engine core first, and make the tokenizer while that one starts.

    then: called with vLLM's renderer, which has the tokenizer, once that is made, in its thread, while the
    core still starts. For the API process.
    """
    import vllm.v1.engine.async_llm as module

    if not (hasattr(module, "renderer_from_config") and hasattr(module, "EngineCoreClient")):
        return
    make_renderer, make_client = module.renderer_from_config, module.EngineCoreClient.make_async_mp_client

    def beside(config: Any) -> Any:
        if config.model_config.is_multimodal_model:  # the client wants its renderer when the core starts
            return make_renderer(config)
        wanted = {"vllm_config": config, "executor_class": module.Executor.get_class(config)}
        with ThreadPoolExecutor(1) as pool:
            renderer = pool.submit(make_renderer, config)
            pool.submit(lambda: then(renderer.result()))
            client = make_client(**wanted, log_stats=log_stats)
        try:
            made = renderer.result()
        except BaseException:
            client.shutdown()
            raise

        def take(**asked: Any) -> Any:
            same = all(asked[name] is value for name, value in wanted.items())
            if same and asked["log_stats"] == log_stats and not asked.get("client_addresses"):
                return client
            client.shutdown()
            return make_client(**asked)

        module.EngineCoreClient.make_async_mp_client = staticmethod(take)
        return made

    module.renderer_from_config = beside


def load_compiled_on_cpu() -> bool:
    """Let vLLM load on a CPU what it compiled there before.

    It calls a method that torch's class for CPUs lacks and compiles everything again (vLLM 0.32, torch 2.13).
    False where nothing is to be mended.
    """
    try:
        module: Any = importlib.import_module("torch._dynamo.aot_compile_types")
        kind = module.BundledAOTAutogradSerializableCallable
    except (ImportError, AttributeError):
        return False
    if hasattr(kind, "finalize_loading"):
        return False
    kind.finalize_loading = lambda self, config: None  # noqa: ARG005
    return True


def warm_up_shortly() -> bool:
    """Let a CPU's warm-up run take a few tokens instead of a whole batch: its code is compiled already.

    Only where the KV cache has a given size: otherwise vLLM sizes it by the memory that the run took.
    """
    module: Any = importlib.import_module("vllm.v1.worker.cpu_model_runner")
    runner = module.CPUModelRunner
    warm_up = vars(runner).get("warming_up_model")
    if warm_up is None:
        return False

    @functools.wraps(warm_up)
    def wrapper(self: Any) -> None:
        tokens = self.max_num_tokens
        if self.cache_config.kv_cache_memory_bytes is not None:
            self.max_num_tokens = min(tokens, _WARM_UP_TOKENS)
        try:
            warm_up(self)
        finally:
            self.max_num_tokens = tokens

    runner.warming_up_model = wrapper
    return True


class AfterImport(MetaPathFinder):
    """Calls a function with a module once that is imported. To be put on sys.meta_path before."""

    def __init__(self, functions: Mapping[str, Callable[[Any], None]]) -> None:
        self._functions = functions

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        function = self._functions.get(name)
        if function is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            function(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def without_compiler() -> AfterImport:
    """Where torch.compile is disabled (TORCH_COMPILE_DISABLE=1), its decorators return the function itself.

    So do torch's own, once they have imported the compiler, which is an eighth of what vLLM imports.
    """

    def itself(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else itself

    def replace(*names: str) -> Callable[[Any], None]:
        return lambda module: vars(module).update({name: itself for name in names if hasattr(module, name)})

    decorators = ("disable", "allow_in_graph", "assume_constant_result")
    return AfterImport({"torch": replace("compile"), "torch.compiler": replace(*decorators)})


def validate_later() -> AfterImport:
    """Pydantic makes the validator of a class when it is first used, not when the class is defined.

    Most of what vLLM defines for its routes, a server that answers some of them never uses. openai's own
    classes have this set by themselves.
    """

    def replace(module: Any) -> None:
        module.BaseModel.model_config["defer_build"] = True

    return AfterImport({"pydantic.main": replace})


def name_operators_quickly() -> AfterImport:
    """Which module registers an operator, and at which line, torch takes from the frame that does.

    It asks `inspect` for them, which at each operator looks at every module that there is, and at the source.
    """

    import inspect

    class Quick(ModuleType):
        """`inspect`, as torch.library knows it."""

        @staticmethod
        def getmodule(frame: FrameType) -> ModuleType | None:
            return sys.modules.get(frame.f_globals["__name__"])

        def __getattr__(self, name: str) -> Any:
            return getattr(inspect, name)

    def source(stacklevel: int) -> str:
        frame = sys._getframe(stacklevel)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def replace(**quick: Any) -> Callable[[Any], None]:
        def update(module: Any) -> None:
            vars(module).update({name: it for name, it in quick.items() if hasattr(module, name)})

        return update

    functions = {
        "torch._library.utils": replace(get_source=source),
        "torch.library": replace(inspect=Quick("inspect")),
    }
    return AfterImport(functions)


class GeneratedCode:
    """What `dataclasses` writes and compiles for each class, a tenth of what vLLM's imports take, remembered.

    known: digest of the source -> digest of its code and the code, marshalled, so that no two functions share
    one. found: called with what is new.
    """

    def __init__(
        self,
        known: Mapping[bytes, memoryview],
        found: Callable[[bytes, bytes], None] = lambda _source, _code: None,
    ) -> None:
        self._known, self._found = known, found

    def install(self) -> None:
        """The module calls `exec` with source and namespaces, and its own names come before Python's."""
        vars(dataclasses)["exec"] = self._execute

    def _execute(self, source: str, *namespaces: Any) -> None:
        known = self._known.get(key := _digest(source.encode()))
        # Damaged code could do anything.
        if known is not None and _digest(known[_DIGEST_BYTES:]) == known[:_DIGEST_BYTES]:
            code = marshal.loads(known[_DIGEST_BYTES:])  # noqa: S302
        else:
            code = compile(source, "<string>", "exec", dont_inherit=True)
            self._found(key, marshal.dumps(code))
        exec(code, *namespaces)  # noqa: S102 - what dataclasses would have compiled


class ImportStructures(AfterImport):
    """What transformers finds by reading the text of all its 2,600 model files, remembered.

    It does so twice at every import; twice it lists their folders for old names, and once it reads what each
    distribution says of itself. To be put on sys.meta_path before transformers is imported. known: from an
    earlier start of the same installation; what is asked for beyond it is found and added.
    """

    def __init__(self, known: Structures) -> None:
        super().__init__({"transformers.utils.import_utils": self._replace})
        self.known = known

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs, what transformers asks of the standard library is remembered too."""
        from importlib import metadata

        distributions, rglob = metadata.packages_distributions, Path.rglob

        def remembered_distributions() -> Any:
            return self._remember(("distributions",), lambda: dict(distributions()))

        def remembered_rglob(path: Path, pattern: str) -> Iterator[Path]:
            if path.parts[-2:] != ("transformers", "models"):
                return rglob(path, pattern)
            found = self._remember(
                ("files", str(path), pattern), lambda: [str(file) for file in rglob(path, pattern)]
            )
            return map(Path, found)

        metadata.packages_distributions = remembered_distributions
        Path.rglob = remembered_rglob  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            metadata.packages_distributions = distributions
            Path.rglob = rglob  # type: ignore[method-assign]

    def _replace(self, module: Any) -> None:
        if hasattr(module, "define_import_structure"):
            module.define_import_structure = self._remembered(module.define_import_structure)

    def _remembered(self, define: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(define)
        def wrapper(module_path: Any, prefix: str | None = None) -> Any:
            return self._remember((str(module_path), prefix), lambda: define(module_path, prefix))

        return wrapper

    def _remember(self, key: tuple[str | None, ...], find: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]


@functools.cache
def _installation() -> tuple[str, ...]:
    """What must be the same for remembered structures to hold: Python, distributions, transformers' files."""
    spec = importlib.machinery.PathFinder.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    package = Path(spec.origin)
    stats = [path.stat() for path in (package, package.parent / "models")]
    folders = [Path(folder) for folder in sys.path]
    distributions = sorted(str(path) for folder in folders for path in folder.glob("*-info"))
    return (
        *(sys.version, str(package)),
        *(f"{s.st_size}:{s.st_mtime_ns}" for s in stats),
        *distributions,
    )


def read_structures(path: Path) -> Structures:
    """Empty where there are none, or damaged ones, or those of another installation."""
    try:
        data = path.read_bytes()
    except OSError:
        return {}
    header = of_installation()
    data, digest = data[len(header) + _DIGEST_BYTES :], data[: len(header) + _DIGEST_BYTES]
    return dict(marshal.loads(data)) if digest == header + _digest(data) else {}  # noqa: S302


def write_structures(path: Path, structures: Structures) -> None:
    data = marshal.dumps(structures)
    path.write_bytes(of_installation() + _digest(data) + data)


def read_generated(path: Path) -> dict[bytes, memoryview]:
    """What `generated_writer` wrote; empty where that was of another installation."""
    try:
        data = memoryview(path.read_bytes())
    except OSError:
        return {}
    header = of_installation()
    if data[: len(header)] != header:
        return {}
    known, end = {}, len(header)
    while (start := end + _DIGEST_BYTES + 4) <= len(data):
        size = int.from_bytes(data[start - 4 : start], "little")
        if start + size > len(data):  # its writer was killed
            break
        known[bytes(data[end : start - 4])] = data[start : start + size]
        end = start + size
    return known


def generated_writer(path: Path) -> Callable[[bytes, bytes], None]:
    """For GeneratedCode: adds to a file. For this process and those forked from it."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.write(log, of_installation())
    written: set[bytes] = set()

    def found(source: bytes, code: bytes) -> None:
        if source not in written:
            written.add(source)
            entry = _digest(code) + code
            os.write(log, source + len(entry).to_bytes(4, "little") + entry)

    return found


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def of_installation() -> bytes:
    """A digest of what must be the same for anything remembered to hold: 16 bytes."""
    return _digest(repr(_installation()).encode())
