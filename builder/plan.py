"""ImageSpec + ModelLock + BaseImage -> BuildPlan. Pure: no disk, no Docker, no clock."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from builder import __version__
from builder.models import LockedFile, ModelLock
from builder.spec import ImageSpec

Device = Literal["cuda", "cpu"]

MODELS_DIR = "/models"
COLDSTART_DIR = "/opt/coldstart"
MANIFEST_SCHEMA = 1
PORT = 8000
# Docker allows 127 layers; a GPU base has about 30, and the final image adds a handful.
MAX_WEIGHT_LAYERS = 64
_LABEL = "dev.coldstart"
_MAX_LABEL = 1024  # characters; Docker refuses a Dockerfile with a line of 64 KiB

# Defaults of a device, before the user's own arguments. On CPUs the KV cache is 2 GiB: vLLM would otherwise
# take 92 % of the host's memory, and refuse to start where less than that is free.
_ENGINE_DEFAULTS: Mapping[Device, tuple[str, ...]] = {
    "cuda": (),
    "cpu": ("--kv-cache-memory-bytes", "2147483648"),
}
_DEVICE_ENV: Mapping[Device, Mapping[str, str]] = {
    "cuda": {},
    # The engine core runs its one worker in process: the multi-process executor wants more /dev/shm
    # than `docker run` gives. An eager vLLM would still compile small functions when a request first needs
    # them, log-probabilities for one.
    "cpu": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"},
}


@dataclass(frozen=True)
class BaseImage:
    """The image to build on. id is None while no engine has looked at it.

    vllm_arguments: JSON of every argument that its vLLM takes; None where nobody could ask.
    """

    reference: str
    id: str | None
    device: Device
    vllm_version: str | None = None
    vllm_arguments: str | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        return self.id or self.reference


@dataclass(frozen=True)
class Layer:
    """Files that one COPY brings: from `source` in the build context to `target` in the image."""

    source: str
    target: str
    files: tuple[LockedFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class WeightsPlan:
    """The image that carries the model on top of the base; shared by every final image of both.

    No layers, and no such image, where the model comes at the start.
    """

    key: str
    layers: tuple[Layer, ...]
    labels: tuple[tuple[str, str], ...]

    @property
    def tag(self) -> str:
        return f"coldstart/weights:{self.key[:16]}"


@dataclass(frozen=True)
class BuildPlan:
    """Everything that decides the bytes of the image. Same plan, same Dockerfiles."""

    spec: ImageSpec
    lock: ModelLock
    base: BaseImage
    tag: str
    model_path: str
    served_model_name: str
    engine_args: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    labels: tuple[tuple[str, str], ...]
    weights: WeightsPlan
    health_start_period: str
    quantization: Mapping[str, Any] | None = None
    port: int = PORT
    user: str = "2000:0"

    @property
    def baked(self) -> bool:
        return self.spec.weights == "bake"

    @property
    def parent(self) -> str:
        """What the server image is FROM."""
        return self.weights.tag if self.baked else self.base.reference

    @property
    def compiles(self) -> bool:
        """Whether the base's Python can run during the build: not where it is for another platform."""
        return self.spec.platform is None

    @property
    def own_folders(self) -> tuple[str, ...]:
        """Folders that the image's user, and any other of its group, may write."""
        return (MODELS_DIR, self.model_path) if self.spec.weights == "download" else ()

    @property
    def label(self) -> str:
        """What every image of this plan carries, unfinished ones too, as "name=value"."""
        return f"{_LABEL}.weights.key={self.weights.key}"

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of /opt/coldstart/manifest.json."""
        return {
            "schema": MANIFEST_SCHEMA,
            "coldstart_version": __version__,
            "device": self.base.device,
            "weights": self.spec.weights,
            "optimize": self.spec.optimize,
            "engine_args": list(self.engine_args),
            "base": {
                "reference": self.base.reference,
                "id": self.base.id,
                "vllm_version": self.base.vllm_version,
            },
            "model": {
                "path": self.model_path,
                "served_name": self.served_model_name,
                "lock_digest": self.lock.digest,
                **self.lock.model_dump(mode="json"),
            },
            "quantization": self.quantization,
        }

    @property
    def manifest_bytes(self) -> bytes:
        return json.dumps(self.manifest, indent=2, sort_keys=True).encode() + b"\n"

    @property
    def disk_bytes(self) -> int:
        """What the build writes: the engine keeps the received context and the layers made from it."""
        return 2 * sum(layer.bytes for layer in self.weights.layers)


def make_plan(
    spec: ImageSpec, lock: ModelLock, base: BaseImage, quantization: Mapping[str, Any] | None = None
) -> BuildPlan:
    """quantization: how the weights of the lock were quantized here and what it cost, for the manifest."""
    folder = _folder_name(lock.name)
    model_path = f"{MODELS_DIR}/{folder}"
    environment = {
        "PYTHONPATH": COLDSTART_DIR,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Any UID may run the image: a home that exists everywhere, and a name for what asks for one.
        "HOME": "/tmp",  # noqa: S108
        "USER": "coldstart",
        **_DEVICE_ENV[base.device],
    }
    if spec.weights != "download":  # whose engine processes are offline too, once the files are there
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    baked = lock.files if spec.weights == "bake" else ()
    weights = _plan_weights(lock, base, model_path, spec.max_layer_bytes, baked)
    labels = _labels(lock, base)
    if not baked:  # else inherited
        labels[f"{_LABEL}.weights.key"] = weights.key
    return BuildPlan(
        spec=spec,
        lock=lock,
        base=base,
        tag=spec.tag or default_tag(lock, spec),
        model_path=model_path,
        served_model_name=spec.served_model_name or lock.name,
        engine_args=(
            *_ENGINE_DEFAULTS[base.device],
            *(("--trust-remote-code",) if lock.remote_code else ()),
            *spec.engine_args,
        ),
        environment=tuple(sorted(environment.items())),
        labels=tuple(sorted((labels | _quantization_labels(quantization)).items())),
        quantization=quantization,
        weights=weights,
        # A download is a part of the start.
        health_start_period="1h" if spec.weights == "download" else "10m",
    )


def default_tag(lock: ModelLock, spec: ImageSpec) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", _folder_name(lock.name).lower()).strip("-")
    return f"coldstart/{name or 'model'}:{spec.quantize or 'latest'}"


def _folder_name(name: str) -> str:
    """A path and tag component: only characters that need no quoting anywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rsplit("/", 1)[-1]).strip("-.") or "model"


def _labels(lock: ModelLock, base: BaseImage) -> dict[str, str]:
    labels = {
        "org.opencontainers.image.title": lock.name,
        "org.opencontainers.image.source": lock.source,
        "org.opencontainers.image.revision": lock.revision or f"sha256:{lock.digest}",
        "org.opencontainers.image.licenses": lock.license or "unknown",
        "org.opencontainers.image.base.name": base.reference,
        f"{_LABEL}.version": __version__,
        f"{_LABEL}.device": base.device,
        f"{_LABEL}.model.digest": f"sha256:{lock.digest}",
        f"{_LABEL}.quantization": lock.quantization or "none",
        f"{_LABEL}.remote-code": "yes" if lock.remote_code else "no",
        f"{_LABEL}.vllm": base.vllm_version or "unknown",
    }
    if base.id:
        labels["org.opencontainers.image.base.digest"] = base.id
    return {name: _one_line(value) for name, value in labels.items()}


def _one_line(text: str) -> str:
    """A label is a short printable line; what a foreign card, config or folder name says need not be."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:_MAX_LABEL]


def _quantization_labels(quantization: Mapping[str, Any] | None) -> dict[str, str]:
    if quantization is None:
        return {}
    return {
        f"{_LABEL}.quantization.method": quantization["method"],
        f"{_LABEL}.quantization.recipe": quantization["description"],
        f"{_LABEL}.quantization.perplexity-increase": f"{quantization['quality']['perplexity_increase']:.4f}",
        f"{_LABEL}.quantization.same-next-token": f"{quantization['quality']['top1_agreement']:.4f}",
    }


def _plan_weights(
    lock: ModelLock, base: BaseImage, model_path: str, max_bytes: int, baked: Sequence[LockedFile]
) -> WeightsPlan:
    layers = tuple(
        Layer(source=f"layers/{index:02d}", target=model_path, files=files)
        for index, files in enumerate(pack_layers(baked, max_bytes))
    )
    key = hashlib.sha256(f"{base.identity}\n{lock.digest}\n{max_bytes}".encode()).hexdigest()
    labels = {
        f"{_LABEL}.role": "weights",
        f"{_LABEL}.weights.key": key,
        f"{_LABEL}.model.digest": f"sha256:{lock.digest}",
    }
    return WeightsPlan(key=key, layers=layers, labels=tuple(sorted(labels.items())))


def pack_layers(files: Sequence[LockedFile], max_bytes: int) -> list[tuple[LockedFile, ...]]:
    """Small files in one layer, shards in the layers after it, each at most `max_bytes` where a file allows.

    Never more than MAX_WEIGHT_LAYERS: the bound doubles until they suffice. Order is by path, so
    the same lock always gives the same layers.
    """
    small = tuple(sorted((f for f in files if not f.is_shard), key=lambda f: f.path))
    shards = sorted((f for f in files if f.is_shard), key=lambda f: f.path)
    bound = max_bytes
    while True:
        layers: list[tuple[LockedFile, ...]] = [small] if small else []
        current: list[LockedFile] = []
        for shard in shards:
            if current and sum(f.size for f in current) + shard.size > bound:
                layers.append(tuple(current))
                current = []
            current.append(shard)
        if current:
            layers.append(tuple(current))
        if len(layers) <= MAX_WEIGHT_LAYERS:
            return layers
        bound *= 2
