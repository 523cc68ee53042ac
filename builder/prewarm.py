"""Starts a finished image once and adds what that start recorded, as one small layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from builder import render
from builder.docker_engine import DockerEngine, ImageInfo
from builder.errors import BuildError, HostError, InputError
from builder.files import exclusive, finished_folder
from builder.report import Reporter

_LABEL = "dev.coldstart.prewarmed"
_OUTPUT = "/tmp/coldstart-state"  # noqa: S108 - in a container of ours
_START_SECONDS = 1800
_LOG_LINES = 40


def prewarm(engine: DockerEngine, tag: str, *, label: str, cache: Path, reporter: Reporter) -> str:
    """Add the state to the image `tag`, which then names the result. Returns its id.

    label: "name=value" of the build, as for DockerEngine.build. Raises HostError where this host cannot run
    the image, BuildError when it runs and does not become ready.
    """
    image = engine.require_image(tag)
    folder = cache.absolute() / "state" / image.id.removeprefix("sha256:")
    with exclusive(folder.with_suffix(".lock"), "this image is being started", reporter):
        if not folder.is_dir():
            reporter.step(f"Starting {tag} once, to record what a start needs")
            with finished_folder(folder) as partial:
                for name, data in _record(engine, tag, image).items():
                    (partial / name).write_bytes(data)
    return add_state(engine, tag, folder, label=label, reporter=reporter)


def add_state(engine: DockerEngine, tag: str, folder: Path, *, label: str, reporter: Reporter) -> str:
    """Add a folder that `python3 -m runtime warm` wrote. Returns the id of the image that `tag` now names."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not names:
        raise InputError(
            f"{folder} has no recorded state", fix="Give the folder that `python3 -m runtime warm` wrote."
        )
    name, _, value = label.partition("=")
    rendered = render.render_prewarm(tag, [(name, value), (_LABEL, "yes")], folder, names)
    return engine.build(rendered, tag, label=label, platform=None, reporter=reporter)


def obstacle(engine: DockerEngine, manifest: Mapping[str, object]) -> str:
    """Why an image with this manifest cannot be started here by itself; empty when it can."""
    if manifest.get("weights", "bake") != "bake":
        return "its weights are not in it"
    if manifest["device"] != "cpu" and not engine.has_gpus:
        return "it needs a GPU, and the engine here has none"
    return ""


def _record(engine: DockerEngine, tag: str, image: ImageInfo) -> dict[str, bytes]:
    container = engine.start(
        tag,
        arguments=["warm", "--output", _OUTPUT],
        network="none",
        publish=False,
        gpus=image.labels.get("dev.coldstart.device") == "cuda",
    )
    try:
        code = container.wait(_START_SECONDS)
        if code != 0:
            raise BuildError(
                f"{tag} was built, but does not start here",
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
