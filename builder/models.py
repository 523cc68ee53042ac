"""ModelRef -> ModelLock -> files on this machine, checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict

from builder.errors import ModelError
from builder.report import Reporter

if TYPE_CHECKING:
    from builder.calibration import Calibration

# What serving needs. Everything else in a repository (other formats, training state) stays out.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_CODE = ("*.py",)
_UNWANTED = ("training_args*", "trainer_state*", "optimizer*", "scheduler*", "rng_state*", "*.index.json.bak")
_UNWANTED_FOLDERS = frozenset({"original", "onnx", "openvino", "coreml", "gguf", "runs", "checkpoints"})
# Of trainers: each holds all the weights of a moment.
_CHECKPOINT_FOLDERS = ("checkpoint-*", "last-checkpoint", "global_step*")
# Not "model.fp16.safetensors", the same in another type, nor "consolidated.safetensors", the same again.
_SHARD = re.compile(r"model([-_].*)?\.safetensors")
_SAME_IN_ANOTHER_TYPE = re.compile(r"model[-_](bf16|fp?16|fp?32|fp8|int[48]|[48]bit)([-_].*)?\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_INDEX = "model.safetensors.index.json"
# Besides config.json vLLM reads these: of AutoGPTQ and AutoAWQ before they wrote there, and of ModelOpt.
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_MISTRAL_CONFIG = "params.json"
_PACKED = (".qweight", ".weight_packed")
_CARD = "README.md"
_YAML_NULL = "tag:yaml.org,2002:null"
_HASH_CHUNK = 1 << 20
# Foreign text is read whole, so it has a bound. The index of the largest model is a tenth of the first.
_MAX_JSON_BYTES = 64 << 20
_MAX_CARD_BYTES = 1 << 20

# The hub's rules: at most 96 characters a part, no "--" or "..", not ending in .git.
HUB_NAME = re.compile(
    r"(?!.*(?:--|\.\.))(?!.*\.git$)[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,94}[A-Za-z0-9_]|"
    r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_]",
    re.ASCII,
)


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a shard says of a tensor. dtype: safetensors' name of it, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]


Header = Mapping[str, TensorHeader]  # of one shard, by the tensor's name


class LockedFile(BaseModel):
    """One file of a snapshot: path relative to its root, size in bytes, hexadecimal sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    size: int
    sha256: str

    @property
    def is_shard(self) -> bool:
        return self.path.endswith(".safetensors")


class ModelLock(BaseModel):
    """What exactly is served: every file with size and digest, and what the configuration says.

    name: what clients call it; source: "hf://org/name" or "folder"; revision: commit SHA, None for a folder;
    parameters: how many numbers the weights are, None where packed weights hide it; remote_code: the
    repository's own Python comes along and runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    revision: str | None
    license: str | None
    architectures: tuple[str, ...]
    dtype: str | None
    parameters: int | None
    quantization: str | None
    remote_code: bool = False
    files: tuple[LockedFile, ...]

    def canonical(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(f.size for f in self.files)


@dataclass(frozen=True)
class ModelSnapshot:
    """A lock and the folder whose files it describes. calibration: the text for quantizing it, if any."""

    lock: ModelLock
    root: Path
    calibration: Calibration | None = None

    @property
    def config(self) -> dict[str, Any]:
        taken = {file.path for file in self.lock.files}
        return _read_config(self.root, taken.__contains__)


@dataclass(frozen=True)
class ModelRef:
    """A model as the user names it: a folder, or a hub repository at a branch, tag or commit."""

    text: str
    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None


def parse_ref(text: str, revision: str | None = None) -> ModelRef:
    """`org/name`, `org/name@revision`, `hf://…`, or a folder. Raises ModelError."""
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib's raises for an unknown user
    if os.path.isdir(path):  # noqa: PTH112 - pathlib's raises for a name that is too long
        if revision:
            raise ModelError(f"--revision does not go with a folder ({text})", fix="Leave it out.")
        return ModelRef(text, folder=path.resolve())
    bare = text.removeprefix("hf://")
    name, _, at = bare.partition("@")
    if at and revision and at != revision:
        raise ModelError(f"two revisions for {name}: {at} and {revision}", fix="Give one of them.")
    is_file = os.path.isfile(path)  # noqa: PTH113 - as above
    if text.startswith((".", "/", "~")) or is_file or not HUB_NAME.fullmatch(name):
        why = "It is a file." if is_file else "No such folder."
        raise ModelError(
            f"cannot find the model {text!r}",
            why=why,
            fix="Give a folder with config.json and *.safetensors, or a hub name such as Qwen/Qwen3-8B.",
        )
    return ModelRef(text, repo=name, revision=revision or at or None)


@dataclass(frozen=True)
class Choice:
    """Which of the files that serving needs are taken: shell patterns over the path. Empty include: all.

    remote_code: the repository's own Python too.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    remote_code: bool = False

    def keeps(self, path: str) -> bool:
        if self.include and not any(fnmatchcase(path, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(path, pattern) for pattern in self.exclude)


ALL = Choice()


def resolve(
    ref: ModelRef,
    reporter: Reporter,
    choice: Choice = ALL,
    accept: Callable[[Mapping[str, Any]], None] | None = None,
    *,
    examine: Callable[[ModelSnapshot], None] | None = None,
    weights: bool = True,
) -> ModelSnapshot:
    """Pin the model and have its files here, checked. Raises ModelError.

    accept: sees the configuration before any weight is fetched or read, and may raise.
    examine: sees a hub model's lock before its weights are fetched, where it can be had from headers.
    weights: False leaves a hub model's shards there, where it can: the hub's digests and their headers do.
    """
    if ref.folder is None:
        from builder import hub

        if examine and not hub.is_offline():
            examine(_resolve_hub(ref, reporter, choice, accept, weights=False))
        return _resolve_hub(ref, reporter, choice, accept, weights)
    if accept:
        accept(_read_config(ref.folder, choice.keeps))
    name = ref.folder.name
    return _snapshot(ref.folder, name=name, source="folder", revision=None, reporter=reporter, choice=choice)


def _resolve_hub(
    ref: ModelRef,
    reporter: Reporter,
    choice: Choice,
    accept: Callable[[Mapping[str, Any]], None] | None,
    weights: bool,
) -> ModelSnapshot:
    """Download, and fetch once more what does not have the bytes that the hub says it has."""
    from builder import hub

    left: list[str] = []

    def choose(paths: Iterable[str], fetch: Callable[[str], Path]) -> list[str]:
        there = list(paths)
        wanted = _wanted_paths(there, choice)
        _require_safetensors(str(ref.repo), wanted, there)
        wanted = _without_doubles(wanted, choice, fetch)
        left[:] = [path for path in wanted if path.endswith(".safetensors") and not weights]
        return [path for path in wanted if path not in left]

    fetched = hub.download(
        ref, choose, reporter, (lambda folder: accept(_read_config(folder, choice.keeps))) if accept else None
    )
    if not all(fetched.digests.get(path, "").startswith("sha256:") for path in left):
        # Kept in git: no sha256 to be had.
        return _resolve_hub(ref, reporter, choice, accept, weights=True)
    headers = hub.shard_headers(fetched, left) if left else {}
    remote = {
        LockedFile(
            path=path, size=fetched.sizes[path], sha256=fetched.digests[path].removeprefix("sha256:")
        ): headers[path]
        for path in left
    }

    def snapshot() -> ModelSnapshot:
        return _snapshot(
            fetched.root,
            name=str(ref.repo),
            source=f"hf://{ref.repo}",
            revision=fetched.commit,
            reporter=reporter,
            choice=choice,
            expected=fetched.digests,
            remote=remote,
        )

    try:
        return snapshot()
    except _DamagedError as first:
        if fetched.offline:
            raise hub.damaged(fetched, first.paths[0]) from None
        for path in first.paths:
            reporter.note(f"{path} is not what the hub has; fetching it again")
        hub.download_again(fetched, first.paths)
    try:
        return snapshot()
    except _DamagedError as second:
        raise hub.damaged(fetched, second.paths[0]) from None


class _DamagedError(Exception):
    """Files whose bytes are not what the hub says."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        super().__init__(", ".join(paths))


def snapshot_of_folder(root: Path, origin: ModelLock, reporter: Reporter) -> ModelSnapshot:
    """The snapshot of a folder that was derived from `origin` (quantized or resharded): same name, source."""
    derived = _snapshot(
        root,
        name=origin.name,
        source=origin.source,
        revision=origin.revision,
        reporter=reporter,
        choice=Choice(remote_code=origin.remote_code),
    )
    kept = {"license": origin.license, "parameters": origin.parameters}
    return ModelSnapshot(derived.lock.model_copy(update=kept), root)


def _snapshot(
    root: Path,
    *,
    name: str,
    source: str,
    revision: str | None,
    reporter: Reporter,
    choice: Choice = ALL,
    expected: Mapping[str, str] | None = None,
    remote: Mapping[LockedFile, Header] = MappingProxyType({}),
) -> ModelSnapshot:
    """remote: the shards that are not in `root`, with what is in them; either none or all."""
    paths = _wanted_paths(_relative_files(root), choice)
    paths = _without_doubles(paths, choice, lambda path: _inside(root, path))
    if remote:
        paths = [path for path in paths if not path.endswith(".safetensors")]
    for path in (*paths, "config.json", _CARD):
        _inside(root, path)
    files = []
    if expected:  # first of all, or a byte that the way here flipped would pass for the model's own fault
        card = [_CARD] if (root / _CARD).is_file() else []  # it says the licence
        files = _hash_files(root, [*paths, *card], reporter)
        damaged = [file.path for file in files if not _as_expected(root, file, expected.get(file.path))]
        if damaged:
            raise _DamagedError(damaged)
        files = files[: len(paths)]
    config = _read_config(root, paths.__contains__)
    if not remote:
        _require_safetensors(name, paths, list(_relative_files(root)))
    headers = {path: _header(root / path) for path in paths if path.endswith(".safetensors")}
    headers |= {file.path: header for file, header in remote.items()}
    _check_index(root, paths, headers)
    files = files or _hash_files(root, paths, reporter)
    quantization = describe_quantization(config) or _packing(headers.values())
    if config.get("auto_map") and not choice.remote_code:
        reporter.note("config.json names code of the repository; without --trust-remote-code it stays out")
    dtype = config.get("dtype") or config.get("torch_dtype")
    architectures = config.get("architectures")
    lock = ModelLock(
        name=name,
        source=source,
        revision=revision,
        license=_licence(root),
        architectures=tuple(map(_plain, architectures)) if isinstance(architectures, list) else (),
        dtype=_plain(dtype) if dtype else None,
        parameters=None if quantization else sum(map(_count, headers.values())),
        quantization=quantization,
        remote_code=choice.remote_code,
        files=tuple(sorted([*files, *remote], key=lambda file: file.path)),
    )
    return ModelSnapshot(lock, root)


def _hash_files(root: Path, paths: Sequence[str], reporter: Reporter) -> list[LockedFile]:
    sizes = {path: (root / path).stat().st_size for path in paths}
    files = []
    with reporter.task("Checking the model's files", sum(sizes.values())) as task:
        for path in paths:
            digest = hashlib.sha256()
            for chunk in _chunks(root / path):
                digest.update(chunk)
                task.advance(len(chunk))
            files.append(LockedFile(path=path, size=sizes[path], sha256=digest.hexdigest()))
    return files


def _as_expected(root: Path, file: LockedFile, digest: str | None) -> bool:
    """digest: "sha256:…", "git:…" (the id of git's blob, for files that the hub keeps in git), or None."""
    if digest is None:
        return True
    kind, _, value = digest.partition(":")
    if kind == "sha256":
        return file.sha256 == value
    blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    for chunk in _chunks(root / file.path):
        blob.update(chunk)
    return blob.hexdigest() == value


def _read_config(root: Path, taken: Callable[[str], bool]) -> dict[str, Any]:
    """config.json, with what other files say of quantization where it says nothing.

    taken: whether a file of the root is one of the model's; what stays out is not vLLM's to read either.
    """
    path = root / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{root} is not a model folder",
            why="It has no config.json.",
            fix="Point to the folder that `save_pretrained` or `hf download` wrote.",
        )
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", fix="Get the file again.")
    for name in (_MISTRAL_CONFIG, *_QUANTIZATION_FILES):
        if quantization_of(config) or not taken(name) or not (root / name).is_file():
            continue
        said = _read_json(root / name)
        if name == _MISTRAL_CONFIG:  # its own format says it here alone
            said = said.get("quantization") if isinstance(said, dict) else None
        config["quantization"] = said
    return config


def _read_json(path: Path) -> Any:
    """Raises ModelError, also for what is too large or too deep to be meant seriously."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES >> 20} MiB")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}", why=f"{error}.", fix="Get the file again.") from None


def _inside(root: Path, path: str) -> Path:
    """root / path. A link may not lead out of the folder; only the hub's cache has its files beside it."""
    real, root = Path(os.path.realpath(root / path)), root.resolve()  # resolve() raises for a loop of links
    inside, repository = [root], root.parents[min(1, len(root.parents) - 1)]
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        # models--org--name/blobs, which may link to the cache's store of blobs that repositories share.
        inside += [repository / "blobs", repository.parent / "blobs"]
    if not any(real.is_relative_to(folder) for folder in inside):
        raise ModelError(
            f"{path!r} of the model is a link to {real}, outside its folder",
            why="A foreign model could bring files of this machine into the image.",
            fix="Put the file itself in its place.",
        )
    return root / path


def _relative_files(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_file():
            yield path.relative_to(root).as_posix()


def _wanted_paths(paths: Iterable[str], choice: Choice) -> list[str]:
    """The files that serving needs, sorted. Raises ModelError on a name that no layer may carry."""
    wanted = []
    for path in paths:
        parts = Path(path).parts
        if any(part.startswith(".") or part in _UNWANTED_FOLDERS for part in parts):
            continue
        if any(_matches(part, _CHECKPOINT_FOLDERS) for part in parts[:-1]):
            continue
        wanted_names = _WANTED + (_CODE if choice.remote_code else ())
        if not _matches(parts[-1], wanted_names) or _matches(parts[-1], _UNWANTED):
            continue
        if not path.isprintable() or ".." in parts or Path(path).is_absolute():
            raise ModelError(f"the model has a file with an unusable name: {path!r}", fix="Rename it.")
        if choice.keeps(path):
            wanted.append(path)
    return sorted(wanted)


def _without_doubles(wanted: list[str], choice: Choice, fetch: Callable[[str], Path]) -> list[str]:
    """Without shards that the engine loads twice or not at all; an --include with their very name keeps them.

    fetch: has a file of the model here. Where there is an index, the engine loads what it names.
    """
    named: set[str] = set()
    if SHARD_INDEX in wanted:
        index = _read_json(fetch(SHARD_INDEX))
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if isinstance(weight_map, dict):
            # One that names nothing that is here is damaged, which is told later.
            named = set(map(str, weight_map.values())) & set(wanted)
    elif "model.safetensors" not in wanted:
        return wanted

    def serves(path: str) -> bool:
        if not path.endswith(".safetensors") or path in named or path in choice.include:
            return True
        if named and "/" not in path:
            return False
        name = path.rsplit("/", 1)[-1]
        return bool(_SHARD.fullmatch(name)) and not _SAME_IN_ANOTHER_TYPE.fullmatch(name)

    return [path for path in wanted if serves(path)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def _require_safetensors(name: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    """wanted: the chosen ones of all files that are there."""
    if any(path.endswith(".safetensors") for path in wanted):
        return
    if any(path.endswith(".safetensors") for path in _wanted_paths(there, ALL)):
        raise ModelError(
            f"--include and --exclude leave {name} without weights", fix="Keep its *.safetensors."
        )
    pickles = [path for path in there if _matches(path, _PICKLES) and not _matches(path, _UNWANTED)]
    if pickles:
        raise ModelError(
            f"{name} has its weights as pickles only ({pickles[0]})",
            why="Loading a pickle runs code from it.",
            fix="Use a revision with *.safetensors, or load it where that is safe and `save_pretrained` it.",
        )
    raise ModelError(
        f"{name} has no *.safetensors", why="There are no weights to serve.", fix="Get the whole model."
    )


def _count(header: Header) -> int:
    return sum(math.prod(tensor.shape) for tensor in header.values())


def _packing(headers: Iterable[Header]) -> str | None:
    """How tensors are quantized that no configuration says it of, or None."""
    for header in headers:
        for name, tensor in header.items():
            if tensor.dtype.startswith("F8"):
                return "fp8"
            if name.endswith(_PACKED):
                return "packed"
    return None


def _check_index(root: Path, paths: Sequence[str], headers: Mapping[str, Header]) -> None:
    """The index, where there is one, names tensors that are really there. headers: of every shard."""
    if SHARD_INDEX not in paths:
        return
    index = _read_json(root / SHARD_INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ModelError(f"{SHARD_INDEX} is damaged", why="It has no weight_map.", fix="Get it again.")
    wanted = {name: str(shard) for name, shard in weight_map.items()}
    for name, shard in sorted(wanted.items()):
        if shard not in headers:
            raise ModelError(
                f"the shard {ascii(shard[:200])[1:-1]} is missing",
                why=f"{SHARD_INDEX} names it.",
                fix="Get the whole model.",
            )
        if name not in headers[shard]:
            raise ModelError(
                f"{shard} has no tensor {name[:200]!r}",
                why=f"{SHARD_INDEX} says so.",
                fix="Get the shard again.",
            )


def _header(path: Path) -> Header:
    """Raises ModelError where the header does not parse or does not fit its file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {
                name: TensorHeader(str(tensor.get_dtype()), tuple(tensor.get_shape()))
                for name, tensor in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the shard {path.name} is truncated or corrupt", why=f"{error}.", fix="Get this file again."
        ) from None


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a configuration says of quantized weights, always with a `quant_method`; None if nothing."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = (
        config.get("quantization_config")
        or config.get("compression_config")  # compressed-tensors' older name
        or config.get("quantization")  # Mistral's own, or of another file
        or nested
    )
    if not found:
        return None
    if not isinstance(found, Mapping):
        return {"quant_method": "unknown"}
    inner = found.get("quantization")
    if isinstance(inner, Mapping) and "quant_method" not in found:
        # hf_quant_config.json: {"producer": …, "quantization": {"quant_algo": …}}
        return {"quant_method": "modelopt", **inner}
    guessed = "unknown"
    if any(str(key).startswith(("load_in_", "bnb_")) for key in found):
        guessed = "bitsandbytes"
    elif str(found.get("qformat_weight", "")).startswith("fp8"):
        guessed = "fp8"
    elif "w_bit" in found:  # AutoAWQ's first releases
        guessed = "awq"
    elif "desc_act" in found:  # AutoGPTQ's
        guessed = "gptq"
    return {"quant_method": guessed, **found}


def describe_quantization(config: Mapping[str, Any]) -> str | None:
    """What the configuration says of quantized weights, e.g. "compressed-tensors int4 g64", or None."""
    quantization = quantization_of(config)
    if quantization is None:
        return None
    words = [str(quantization["quant_method"])]
    groups = quantization.get("config_groups")
    bits = quantization.get("bits") or quantization.get("w_bit")
    group_size = quantization.get("group_size") or quantization.get("q_group_size")
    if isinstance(groups, Mapping) and groups:
        first = next(iter(groups.values()))
        weights = first.get("weights") if isinstance(first, Mapping) else None
        if isinstance(weights, Mapping):
            words.append(f"{weights.get('type', '')}{weights.get('num_bits', '')}")
            if weights.get("group_size"):
                words.append(f"g{weights['group_size']}")
    elif bits:
        words.append(f"int{bits}" + (f" g{group_size}" if group_size else ""))
    elif quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        words.append("4bit" if quantization.get("load_in_4bit") else "8bit")
    elif algorithm := quantization.get("quant_algo"):
        words.append(str(algorithm))
    return _plain(" ".join(words))


def _licence(root: Path) -> str | None:
    """The `license:` of the model card, where there is one: a word, or several."""
    card = root / _CARD
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        front = re.match(
            r"---[ \t]*\n(.*?\n)---[ \t]*$", file.read(_MAX_CARD_BYTES), re.DOTALL | re.MULTILINE
        )
    try:
        # Composed, not constructed: an alias stays a reference, so that no bomb is expanded.
        mapping = yaml.compose(front[1], Loader=yaml.SafeLoader) if front else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    if not isinstance(mapping, yaml.MappingNode):
        return None
    for key, value in mapping.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "license":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            words = [n.value for n in nodes if isinstance(n, yaml.ScalarNode) and n.tag != _YAML_NULL]
            return _plain(", ".join(words)) or None
    return None


def _plain(value: object) -> str:
    """Text that a lock brings back the same: JSON and YAML can write halves of a character."""
    return str(value).encode("utf-8", "replace").decode()


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK):
                yield chunk
    except OSError as error:
        raise ModelError(f"cannot read {path}", why=f"{error.strerror}.", fix="Check its mode.") from None
