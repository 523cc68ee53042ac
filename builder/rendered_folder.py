"""A BuildPlan as folders that plain `docker build` understands."""

from __future__ import annotations

import shutil
from pathlib import Path

from builder import context, render
from builder.plan import BuildPlan


def write(plan: BuildPlan, root: Path, output: Path) -> None:
    """`output`/weights (where they are baked) and `output`/image, each a Dockerfile and its context.

    Nothing is left on failure.
    """
    existed = output.exists()
    try:
        if plan.baked:
            context.write_folder(render.render_weights(plan, root), output / "weights")
        context.write_folder(render.render_image(plan), output / "image")
    except BaseException:
        for name in ("weights", "image"):
            shutil.rmtree(output / name, ignore_errors=True)
        if not existed:
            shutil.rmtree(output, ignore_errors=True)
        raise
