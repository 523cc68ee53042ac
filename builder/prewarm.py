"""Starts a finished image once and adds what that start recorded, as one small layer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from builder import render
from builder.docker_engine import Container, DockerEngine, ImageInfo
from builder.errors import BuildError, HostError, InputError
from builder.files import exclusive, finished_folder
from builder.report import Reporter
from builder.verify import read_manifest

LABEL = "dev.coldstart.prewarmed"
_MODE_LABEL = "dev.coldstart.mode"
_OUTPUT = "/tmp/coldstart-state"  # noqa: S108 - in a container of ours
_START_SECONDS = 3600
_POLL_SECONDS = 1.0
_LOG_LINES = 40
# What `warm` says of its progress and its choice.
_SAID = "coldstart: warm: "


@dataclass(frozen=True)
class Prewarmed:
    """The id of the image with its state, and what `warm` reported: modes tried, the chosen one, speeds."""

    id: str
    report: Mapping[str, Any]


def prewarm(
    engine: DockerEngine,
    tag: str,
    *,
    label: str,
    cache: Path,
    reporter: Reporter,
    mode: str | None = None,
    loaders: bool = False,
    mount: Path | None = None,
) -> Prewarmed:
    """Add the state to the image `tag`, which then names the result.

    label: "name=value" of the build, as for DockerEngine.build. mode: the one to record, in place of the one
    that the image's `--optimize` would choose. loaders: try vLLM's ways of loading weights, and record the
    quickest. mount: the model's folder, where the image has none. Raises
    HostError where this host cannot run the image, BuildError when it runs and does not become ready.
    """
    image = engine.require_image(tag)
    options = [*(("--mode", mode) if mode else ()), *(("--loaders",) if loaders else ())]
    name = "-".join([image.id.removeprefix("sha256:"), *(quote(option, safe="") for option in options)])
    folder = cache.absolute() / "state" / name
    with exclusive(folder.with_suffix(".lock"), "this image is being started", reporter):
        if not folder.is_dir():
            reporter.step(f"Starting {tag}, to record what a start needs")
            with finished_folder(folder) as partial:
                for name, data in _record(engine, tag, image, options, mount, reporter).items():
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    (partial / name).write_bytes(data)
    return add_state(engine, tag, folder, label=label, reporter=reporter)


def add_state(engine: DockerEngine, tag: str, folder: Path, *, label: str, reporter: Reporter) -> Prewarmed:
    """Add a folder that `python3 -m runtime warm` wrote to the image `tag`, which then names the result."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if not names:
        raise InputError(
            f"{folder} has no recorded state", fix="Give the folder that `python3 -m runtime warm` wrote."
        )
    report = _report(folder)
    name, _, value = label.partition("=")
    labels = [(name, value), (LABEL, "yes"), (_MODE_LABEL, report.get("chosen", "unknown"))]
    rendered = render.render_prewarm(tag, labels, folder, names)
    return Prewarmed(engine.build(rendered, tag, label=label, platform=None, reporter=reporter), report)


def obstacle(engine: DockerEngine, manifest: Mapping[str, object], mount: Path | None = None) -> str:
    """Why an image with this manifest cannot be started here; empty when it can.

    mount: the model's folder, which only an engine on this machine can mount.
    """
    weights = manifest.get("weights", "bake")
    if weights == "mount" and mount:
        if not engine.is_local:
            return "its weights are on this machine, and the engine is on another"
    elif weights != "bake":
        return "its weights are not in it"
    if manifest["device"] != "cpu" and not engine.has_gpus:
        return "it needs a GPU, and the engine here has none"
    return ""


def volumes(engine: DockerEngine, tag: str, mount: Path | None) -> dict[str, str]:
    """What to mount into a container of the image, as DockerEngine.start has it."""
    return {str(mount.absolute()): read_manifest(engine, tag)["model"]["path"]} if mount else {}


def _report(folder: Path) -> dict[str, Any]:
    """What the recording in a folder of state says of itself."""
    for path in sorted(folder.glob("recordings/*/recording.json")):
        try:
            return dict(json.loads(path.read_bytes())["report"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged", why=repr(error), fix="Record the start again.") from None
    return {}


def _record(
    engine: DockerEngine,
    tag: str,
    image: ImageInfo,
    options: Sequence[str],
    mount: Path | None,
    reporter: Reporter,
) -> dict[str, bytes]:
    container = engine.start(
        tag,
        arguments=["warm", "--output", _OUTPUT, *options],
        network="none",
        publish=False,
        volumes=volumes(engine, tag, mount),
        gpus=image.labels.get("dev.coldstart.device") == "cuda",
    )
    try:
        code = _follow(container, reporter)
        if code != 0:
            raise BuildError(
                f"{tag} is built, but its start could not be recorded",
                why=f"`python3 -m runtime warm` ended with exit code {code}.",
                fix="See its output above; `--no-prewarm` builds without this check.",
                log="\n".join(container.logs().splitlines()[-_LOG_LINES:]),
            )
        files = container.files(_OUTPUT)
    finally:
        container.remove()
    if not files:
        raise HostError(f"{tag} recorded nothing", fix="Build with --no-prewarm, and report this.")
    return files


def _follow(container: Container, reporter: Reporter) -> int:
    """Tell what `warm` says until it ends; its exit code."""
    told = 0
    deadline = time.monotonic() + _START_SECONDS
    while True:
        running = container.running() and time.monotonic() < deadline
        said = [line.removeprefix(_SAID) for line in container.logs().splitlines() if line.startswith(_SAID)]
        for line in said[told:]:
            reporter.note(line)
        told = len(said)
        if not running:
            code = container.exit_code()
            return container.stop(0) if code is None else code
        time.sleep(_POLL_SECONDS)
