"""BuildPlan -> Dockerfile text and the list of context files. Pure but for reading templates/.

Also the one Jinja environment: what else is rendered from templates/ goes through `render_page`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from builder.plan import COLDSTART_DIR, BuildPlan

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class ContextFile:
    """One entry of a build context: its path there, and its bytes or where to read them."""

    path: str
    source: Path | bytes


@dataclass(frozen=True)
class Rendered:
    """A Dockerfile and what its COPY instructions need."""

    dockerfile: str
    files: tuple[ContextFile, ...]


def dockerfile_string(value: object) -> str:
    """Double-quoted, for ENV and LABEL: nothing in it is expanded or ends the string."""
    text = str(value)
    if not text.isprintable():
        raise ValueError(f"not printable, so it cannot be in a Dockerfile: {text!r}")
    for character in ("\\", '"', "$"):
        text = text.replace(character, "\\" + character)
    return f'"{text}"'


def exec_form(words: list[str]) -> str:
    """A JSON array, as CMD and ENTRYPOINT take it: no shell is involved."""
    return json.dumps(words)


def render_weights(plan: BuildPlan, root: Path) -> Rendered:
    """The weights image: FROM the base, one COPY per layer. root: the snapshot's folder."""
    files = tuple(
        ContextFile(f"{layer.source}/{file.path}", root / file.path)
        for layer in plan.weights.layers
        for file in layer.files
    )
    return Rendered(_template("weights.Dockerfile.j2").render(plan=plan), files)


def render_image(plan: BuildPlan) -> Rendered:
    """The final image: FROM the weights image, with runtime, manifest and configuration."""
    files = [ContextFile("coldstart/manifest.json", plan.manifest_bytes)]
    if plan.base.vllm_arguments:
        files.append(ContextFile("coldstart/vllm-arguments.json", plan.base.vllm_arguments.encode()))
    files += [ContextFile(f"coldstart/runtime/{path.name}", path) for path in _runtime_files()]
    text = _template("image.Dockerfile.j2").render(plan=plan, coldstart_dir=COLDSTART_DIR)
    return Rendered(text, tuple(files))


def render_prewarm(
    image: str, labels: Sequence[tuple[str, str]], folder: Path, names: Sequence[str]
) -> Rendered:
    """The recorded state on top of a server image. folder: where its files, `names`, are."""
    text = _template("prewarm.Dockerfile.j2").render(image=image, labels=labels, coldstart_dir=COLDSTART_DIR)
    return Rendered(text, tuple(ContextFile(f"state/{name}", folder / name) for name in names))


def render_base_cpu(**variables: object) -> str:
    return _template("base-cpu.Dockerfile.j2").render(**variables)


def render_page(template: str, **variables: object) -> str:
    """An HTML page; every value is escaped."""
    return _template(template).render(**variables)


def _runtime_files() -> list[Path]:
    import runtime

    return sorted(Path(runtime.__path__[0]).glob("*.py"))


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    here = Path(__file__).parent
    folders = [here / "templates", here.parent / "templates"]  # in a wheel; in a checkout
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Dockerfiles are no HTML; every value in them goes through a quoting filter.
        autoescape=jinja2.select_autoescape(("html.j2",), default=False, default_for_string=False),
    )
    environment.filters.update(quote=dockerfile_string, exec_form=exec_form, q=shlex.quote)
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)
