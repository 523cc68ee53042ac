"""What must hold of a finished image once it runs: it starts from its recording, and answers as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder import prewarm
from builder.docker_engine import Container, DockerEngine
from builder.errors import BuildError
from builder.report import Reporter
from builder.verify import Check, read_manifest

_READY_SECONDS = 1800
_LOADED = "Directly load AOT compilation from path"


def verify_start(
    engine: DockerEngine, reference: str, reporter: Reporter, mount: Path | None = None
) -> list[Check]:
    """The image is started with no network. No check where this host cannot start it, and a note says so.

    mount: the model's folder, where the image has none.
    """
    if why_not := prewarm.obstacle(engine, read_manifest(engine, reference), mount):
        reporter.note(f"Not started here: {why_not}.")
        return []
    reporter.step(f"Starting {reference}")
    info = engine.require_image(reference)
    container = engine.start(
        reference,
        network="none",
        publish=False,
        volumes=prewarm.volumes(engine, reference, mount),
        gpus=info.labels.get("dev.coldstart.device") == "cuda",
    )
    try:
        if not container.wait_for(["python3", "-m", "runtime", "health"], _READY_SECONDS):
            last = container.logs().rstrip().rpartition("\n")[2]
            return [Check("starts", False, last)]
        return _checks(container, recorded=info.labels.get(prewarm.LABEL) == "yes")
    finally:
        container.remove()


def _checks(container: Container, *, recorded: bool) -> list[Check]:
    code, output = container.run(["python3", "-m", "runtime", "golden"])
    try:
        said: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise BuildError(
            "the running image does not tell how it started", why=f"exit code {code}", log=output
        ) from None
    checks = [Check("starts", True, "ready with no network")]
    if not recorded:
        return checks
    recording, compiled, golden = said["recording"], said["compiled"], said["golden"]
    used = recording["status"] == "used"
    checks.append(Check("recording", used, recording["mode"] if used else recording["reason"]))
    if compiled or said["has_compiled_code"]:
        loaded = bool(compiled) and all(detail.startswith("loaded") for detail in compiled)
        told = next((line for line in container.logs().splitlines() if _LOADED in line), "")
        found = f"vLLM says: {told[told.index(_LOADED) :]}" if told else ", ".join(compiled) or "nothing told"
        checks.append(Check("compiled code", loaded and bool(told), found))
    if golden:
        checks.append(Check("answers", golden["ok"], golden["says"]))
    return checks
