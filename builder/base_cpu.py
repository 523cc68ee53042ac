"""`coldstart base cpu`: vLLM built for CPUs on top of any Debian or python image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder import render
from builder.docker_engine import DockerEngine
from builder.errors import InputError
from builder.render import ContextFile, Rendered
from builder.report import Reporter
from builder.spec import VLLM_VERSION

TORCH_VERSION = "2.13.0"
_STAGE_LABEL = "dev.coldstart.base.stage=build"


@dataclass(frozen=True)
class CpuBase:
    """Variables of base-cpu.Dockerfile.j2."""

    image: str
    vllm_version: str
    torch_version: str
    has_wheels: bool
    has_ca: bool


def build_base_cpu(
    engine: DockerEngine,
    from_image: str,
    tag: str,
    *,
    wheels: Path | None,
    ca: Path | None,
    reporter: Reporter,
) -> str:
    """Build and tag the base; returns its image id. Raises InputError or BuildError.

    wheels: a folder of *.whl that pip may use besides its index; ca: a PEM bundle for pip. Neither is
    in the image afterwards.
    """
    engine.ensure_image(from_image, None, reporter)
    files = []
    if wheels:
        found = sorted(wheels.glob("*.whl"))
        if not found:
            raise InputError(f"{wheels} has no *.whl", fix="Give the folder that `pip download -d` wrote.")
        files += [ContextFile(f"wheels/{path.name}", path) for path in found]
    if ca:
        if not ca.is_file():
            raise InputError(f"{ca} is not a file", fix="Give a PEM bundle.")
        files.append(ContextFile("ca.pem", ca))
    base = CpuBase(from_image, VLLM_VERSION, TORCH_VERSION, has_wheels=bool(wheels), has_ca=bool(ca))
    rendered = Rendered(render.render_base_cpu(base=base), tuple(files))
    reporter.step(f"Building {tag} (about 4 GB, some minutes)")
    # pip must reach its index the way this host does.
    image = engine.build(rendered, tag, label=_STAGE_LABEL, platform=None, reporter=reporter, network="host")
    engine.remove_untagged(_STAGE_LABEL)  # the first stage, another 4 GB
    return image
