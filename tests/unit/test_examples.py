"""Every example is loaded and rendered as its comment says, with a tiny model in place of the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builder import build, models, render
from builder.plan import make_plan
from builder.report import SilentReporter
from builder.spec import CPU_BASE, load_spec
from tests.models import write_model

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/coldstart.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_example_renders(path: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    here = Path(shutil.copy(path, tmp_path))
    spec = load_spec(here, {})
    snapshot = models.resolve(models.parse_ref(str(tmp_path / "model")), SilentReporter())
    plan = make_plan(spec, snapshot.lock, build.guess_base(spec))
    assert plan.base.device == ("cpu" if spec.base == CPU_BASE else "cuda")
    text = render.render_image(plan).dockerfile + render.render_weights(plan, snapshot.root).dockerfile
    assert f"FROM {spec.base}" in text
    assert set(spec.engine_args) <= set(plan.engine_args)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
