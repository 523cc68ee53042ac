"""The one way through: resolve, quantize, plan, render, execute. The CLI's commands are slices of it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from builder import context, lockfile, models, probe, render
from builder.errors import InputError, ModelError
from builder.files import exclusive, finished_folder, require_space
from builder.plan import BaseImage, BuildPlan, Device, make_plan
from builder.report import Reporter
from builder.spec import CPU_BASE, ImageSpec

if TYPE_CHECKING:
    from builder.calibration import Calibration
    from builder.docker_engine import DockerEngine
    from builder.quantize import Quantized
    from builder.recipe import Recipe

# Besides the weights: the runtime's layers, the engine's own bookkeeping, and some air.
_SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class BuiltImage:
    """What a build made. id: the engine's image id; digest: the registry's, after a push.

    mount: the folder to mount, of an image that has its weights from a mount; recording: which ways of
    running the engine were tried and which one was taken, of an image that was started here.
    """

    tag: str
    id: str
    digest: str | None
    plan: BuildPlan
    weights_reused: bool
    mount: Path | None
    recording: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "tag": self.tag,
            "id": self.id,
            "digest": self.digest,
            "weights": self.plan.spec.weights,
            "weights_image": self.plan.weights.tag if self.plan.baked else None,
            "weights_reused": self.weights_reused,
            "mount": str(self.mount) if self.mount else None,
            "recording": dict(self.recording) if self.recording else None,
            "model_digest": f"sha256:{self.plan.lock.digest}",
            "manifest": self.plan.manifest,
        }


def cache_folder() -> Path:
    """Quantized weights, the quantizer's environment and memos; safe to delete at any time."""
    chosen = os.environ.get("COLDSTART_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("coldstart", appauthor=False))


def model_ref(spec: ImageSpec) -> models.ModelRef:
    """Raises ModelError, or InputError for a folder that no container could download."""
    ref = models.parse_ref(spec.model, spec.revision)
    if ref.folder and spec.weights == "download":
        raise InputError(
            f"--weights download needs a hub model, and {spec.model} is a folder",
            fix="Bake or mount it, or push it to a hub repository and name that.",
        )
    return ref


def resolve_model(
    spec: ImageSpec,
    reporter: Reporter,
    *,
    base: BaseImage | None = None,
    lock_path: Path | None = None,
    locked: bool = False,
) -> models.ModelSnapshot:
    """The model as named, at the commit that the lock file holds; the lock is written where there is none.

    So with the dataset that it is calibrated on. base: where given, a model that cannot be quantized for it,
    or not on this machine, is refused before its weights are fetched; locked: raise InputError where the lock
    is missing, stale, or not of these files.
    """
    lock = (
        lockfile.require_locked(spec, lock_path)
        if locked
        else lockfile.read(lock_path)
        if lock_path
        else None
    )
    documents = _documents(spec, reporter, lockfile.pinned_calibration(spec, lock))
    if locked and lock:
        lockfile.require_same_calibration(lock, spec, documents)

    def accept(config: Mapping[str, Any]) -> None:
        assert base is not None
        _recipe(spec, config, base, None)

    def examine(snapshot: models.ModelSnapshot) -> None:
        assert base is not None
        _require_memory(spec, replace(snapshot, calibration=documents), base, reporter)

    early = spec.quantize is not None and base is not None
    snapshot = models.resolve(
        model_ref(lockfile.pinned(spec, lock)),
        reporter,
        models.Choice(spec.include, spec.exclude, spec.trust_remote_code),
        accept if early else None,
        examine=examine if early else None,
        weights=spec.weights != "download",
    )
    if locked and lock:
        lockfile.require_same(lock, snapshot.lock)
    elif lock_path:
        if lock:
            lockfile.require_constant(lock, spec, snapshot.lock, documents, reporter)
        lockfile.write(lock_path, spec, snapshot.lock, documents)
    return replace(snapshot, calibration=documents)


def _documents(spec: ImageSpec, reporter: Reporter, commit: str | None = None) -> Calibration | None:
    from builder import calibration

    if spec.quantize is None or spec.calibration is None:
        return None
    return calibration.load(spec.calibration, reporter, commit)


def _require_memory(
    spec: ImageSpec, snapshot: models.ModelSnapshot, base: BaseImage, reporter: Reporter
) -> None:
    """Raises as `choose_quantization` does, and HostError where quantizing would not fit into memory."""
    from builder.quantization_cost import require_memory
    from builder.quantize import finished_result

    recipe, _ = choose_quantization(spec, snapshot, base, reporter)
    if finished_result(snapshot, recipe, cache=cache_folder()) is None:
        require_memory(snapshot.lock, recipe)


def prepare_model(
    spec: ImageSpec, snapshot: models.ModelSnapshot, base: BaseImage, reporter: Reporter
) -> tuple[models.ModelSnapshot, Quantized | None]:
    """The snapshot that the image will carry: quantized and in smaller shards where asked for."""
    quantized = None
    if spec.quantize:
        snapshot, quantized = _quantize(spec, snapshot, base, reporter)
    if spec.max_shard_size:
        from builder.reshard import reshard

        snapshot = reshard(snapshot, spec.max_shard_size, cache=cache_folder(), reporter=reporter)
    return snapshot, quantized


def _quantize(
    spec: ImageSpec, snapshot: models.ModelSnapshot, base: BaseImage, reporter: Reporter
) -> tuple[models.ModelSnapshot, Quantized]:
    from builder.quantize import quantize

    recipe, documents = choose_quantization(spec, snapshot, base, reporter)
    reporter.step(f"Quantizing to {recipe.describe()}")
    done = quantize(snapshot, recipe, cache=cache_folder(), reporter=reporter, calibration=documents)
    reporter.note(done.measurements.quality.describe())
    done.require_quality(spec.max_perplexity_increase)
    quantized = models.snapshot_of_folder(done.folder, snapshot.lock, reporter)
    before, after = snapshot.lock.total_bytes, quantized.lock.total_bytes
    reporter.note(f"{before / 1e6:.0f} MB became {after / 1e6:.0f} MB")
    return quantized, done


def choose_quantization(
    spec: ImageSpec, snapshot: models.ModelSnapshot, base: BaseImage, reporter: Reporter
) -> tuple[Recipe, Calibration | None]:
    """The recipe that model, base and spec ask for. Raises ModelError or InputError."""
    documents = snapshot.calibration or _documents(spec, reporter)
    recipe = _recipe(spec, snapshot.config, base, documents)
    if packed := snapshot.lock.quantization:
        raise ModelError(
            f"the model is quantized already ({packed})",
            why="Its tensors are, although no configuration of it says so.",
            fix="Name the checkpoint that it was made from.",
        )
    return recipe, documents


def _recipe(
    spec: ImageSpec, config: Mapping[str, Any], base: BaseImage, documents: Calibration | None
) -> Recipe:
    from builder.kernels import tensor_parallel_size
    from builder.recipe import choose_recipe

    assert spec.quantize is not None
    try:
        return choose_recipe(
            config,
            method=spec.quantize,
            device=base.device,
            ranks=tensor_parallel_size(spec.engine_args),
            samples=spec.calibration_samples,
            tokens=spec.calibration_tokens,
            calibration=documents,
        )
    except (TypeError, ValueError, ArithmeticError) as error:  # a shape that is a text, a list, zero or NaN
        raise ModelError(
            "cannot choose a recipe for quantizing from config.json",
            why=f"{error}.",
            fix="Check the file, or build without --quantize.",
        ) from None


def guess_base(spec: ImageSpec) -> BaseImage:
    """The base as its name suggests, for plans made without an engine."""
    device: Device = "cpu" if spec.base.rsplit(":", 1)[0] == CPU_BASE.rsplit(":", 1)[0] else "cuda"
    _require_kernels(spec, device)
    return BaseImage(spec.base, None, device)


def _require_kernels(spec: ImageSpec, device: Device) -> None:
    if spec.quantize:
        from builder.recipe import require_device

        require_device(spec.quantize, device)


def inspect_base(spec: ImageSpec, engine: DockerEngine, reporter: Reporter) -> BaseImage:
    """The base as the engine sees it; its vLLM's parser has accepted the engine arguments."""
    reporter.step(f"Looking into {spec.base}")
    base = engine.base_image(spec.base, spec.platform, reporter)
    _require_kernels(spec, base.device)
    if spec.engine_args and not _accepted_before(base, spec.engine_args):
        reporter.step("Asking vLLM's parser about the engine arguments")
        engine.check_engine_args(base, spec.engine_args)
        _remember_accepted(base, spec.engine_args)
    return with_argument_list(base, engine, reporter)


def with_argument_list(base: BaseImage, engine: DockerEngine, reporter: Reporter) -> BaseImage:
    """The base with the list of its vLLM's arguments, which its parser is asked for once."""
    key = hashlib.sha256(f"{base.identity}\n{probe.LIST_ENGINE_ARGS}".encode()).hexdigest()
    memo = cache_folder() / "vllm-arguments" / key
    with suppress(OSError):
        return replace(base, vllm_arguments=memo.read_text())
    reporter.step("Asking vLLM's parser which arguments it takes")
    arguments = engine.list_engine_args(base)
    if arguments is None:
        reporter.note("It does not tell; a wrong flag at run time will be found by vLLM itself.")
        return base
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        part = memo.with_suffix(".part")
        part.write_text(arguments)
        part.replace(memo)
    return replace(base, vllm_arguments=arguments)


def build(
    spec: ImageSpec,
    engine: DockerEngine,
    reporter: Reporter,
    *,
    push: bool,
    lock_path: Path | None = None,
    locked: bool = False,
    prewarmed: bool = True,
) -> BuiltImage:
    """prewarmed: start the image once where this host can, and add what that start recorded."""
    # The cheapest checks first: a wrong name should not cost a pull, nor a wrong base or flag a download.
    model_ref(spec)
    if locked:
        lockfile.require_locked(spec, lock_path)
    base = inspect_base(spec, engine, reporter)
    snapshot = resolve_model(spec, reporter, base=base, lock_path=lock_path, locked=locked)
    if spec.quantize:  # before the long work; the exact check comes when the sizes are known
        _require_engine_space(engine.data_root, snapshot.lock.total_bytes)
    snapshot, quantized = prepare_model(spec, snapshot, base, reporter)
    plan = make_plan(spec, snapshot.lock, base, quantized.to_json() if quantized else None)
    reused = plan.baked and _weights_image(plan, snapshot.root, engine, reporter)
    mount = _mountable(snapshot, reporter) if spec.weights == "mount" else None
    reporter.step(f"Building {plan.tag}")
    image = engine.build(
        render.render_image(plan), plan.tag, label=plan.label, platform=spec.platform, reporter=reporter
    )
    recording: Mapping[str, Any] | None = None
    if prewarmed and spec.platform is None:
        image, recording = _prewarm(plan, image, mount, engine, reporter)
    digest = engine.push(plan.tag, reporter) if push else None
    _remember_last(plan.tag)
    if mount:
        gpus = "--gpus all " if base.device == "cuda" else ""
        volume = shlex.quote(f"{mount}:{plan.model_path}:ro")
        reporter.note(f"Start it with: docker run {gpus}-v {volume} -p {plan.port}:{plan.port} {plan.tag}")
    return BuiltImage(plan.tag, image, digest, plan, reused, mount, recording)


def _weights_image(plan: BuildPlan, root: Path, engine: DockerEngine, reporter: Reporter) -> bool:
    """Have the weights image; True when it was here already."""
    found = engine.image(plan.weights.tag)
    if found is not None and found.labels.get("dev.coldstart.weights.key") == plan.weights.key:
        reporter.step(f"Weights image {plan.weights.tag} is here already; no weight is sent")
        return True
    _require_engine_space(engine.data_root, plan.disk_bytes)
    reporter.step(f"Building the weights image {plan.weights.tag}")
    engine.build(
        render.render_weights(plan, root),
        plan.weights.tag,
        label=plan.label,
        platform=plan.spec.platform,
        reporter=reporter,
    )
    return False


def _mountable(snapshot: models.ModelSnapshot, reporter: Reporter) -> Path:
    """A folder with the locked files that a container can use: the snapshot's own, where it is one.

    The hub's cache is links that lead nowhere inside a container, and other files may be their owner's only.
    """
    sources = [snapshot.root / file.path for file in snapshot.lock.files]
    folders = {path.parent for path in sources}
    if all(not path.is_symlink() and path.stat().st_mode & 0o004 for path in sources) and all(
        path.stat().st_mode & 0o005 == 0o005 for path in folders
    ):
        return snapshot.root.absolute()
    folder = (cache_folder() / "mount" / snapshot.lock.digest[:16]).absolute()  # else a volume's name
    if folder.exists():
        return folder
    with exclusive(folder.with_suffix(".lock"), f"{folder} is being made", reporter):
        if folder.exists():
            return folder
        reporter.step(f"Making {folder}: links or copies that a container can read")
        with finished_folder(folder) as partial:
            partial.chmod(0o755)
            context.write_files(
                [render.ContextFile(file.path, snapshot.root / file.path) for file in snapshot.lock.files],
                partial,
            )
    return folder


def _prewarm(
    plan: BuildPlan, image: str, mount: Path | None, engine: DockerEngine, reporter: Reporter
) -> tuple[str, Mapping[str, Any] | None]:
    from builder.prewarm import obstacle, prewarm

    if why_not := obstacle(engine, plan.manifest, mount):
        reporter.note(f"Not started here to record its start: {why_not}. See `coldstart prewarm --help`.")
        return image, None
    made = prewarm(engine, plan.tag, label=plan.label, cache=cache_folder(), reporter=reporter, mount=mount)
    return made.id, made.report


def last_built() -> str | None:
    """The tag of the newest successful build on this machine."""
    path = cache_folder() / "last-built"
    return path.read_text().strip() if path.exists() else None


def _remember_last(tag: str) -> None:
    folder = cache_folder()
    with suppress(OSError):  # the image is built; only `bench` without a name would miss this
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "last-built").write_text(tag + "\n")


def _memo(base: BaseImage, arguments: tuple[str, ...]) -> Path:
    key = hashlib.sha256(json.dumps([base.identity, arguments]).encode()).hexdigest()
    return cache_folder() / "accepted-arguments" / key


def _accepted_before(base: BaseImage, arguments: tuple[str, ...]) -> bool:
    return base.id is not None and _memo(base, arguments).exists()


def _remember_accepted(base: BaseImage, arguments: tuple[str, ...]) -> None:
    memo = _memo(base, arguments)
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.touch()


def _require_engine_space(data_root: str, needed: int) -> None:
    """The engine's disk, when it is on this machine (a remote engine's is not ours to look at)."""
    if Path(data_root).exists():
        require_space(
            Path(data_root),
            needed + _SPARE_BYTES,
            what="the build needs",
            fix="Free some with `docker image prune`, or move the engine's data root.",
        )
