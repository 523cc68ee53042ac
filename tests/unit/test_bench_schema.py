"""The result file: what it looks like is documented, and what older versions wrote is still read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.schema import BenchResult, MeasuredPhase, Resources, Run, State, json_schema, read_result
from runtime.phases import Phase

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks/results/smollm2-2026-11-22.json"


def test_the_committed_json_schema_is_that_of_the_models() -> None:
    committed = (ROOT / "docs/bench-result.schema.json").read_text()
    assert committed == json_schema(), "python -m benchmarks.schema > docs/bench-result.schema.json"


def test_a_file_of_version_1_is_read_as_uncontrolled() -> None:
    old = json.loads(COMMITTED.read_text())
    assert (old["schema_version"], old["page_cache"]) == (1, "not controlled")
    result = BenchResult.model_validate(old)
    assert (result.schema_version, len(result.runs)) == (3, 15)
    assert {run.state for run in result.runs} == {State(page_cache="as_is", compile_cache="as_is")}


def test_a_file_of_version_2_is_read_without_what_it_lacks() -> None:
    path = ROOT / "benchmarks/results/smollm2-2026-11-23-warm.json"
    assert json.loads(path.read_text())["schema_version"] == 2
    result = read_result(path)
    assert (result.schema_version, len(result.runs)) == (3, 18)
    assert {run.wall_seconds for run in result.runs} == {None}
    assert {image.off for image in result.images} == {()}


@pytest.mark.parametrize("version", [0, 4, "1"])
def test_a_file_of_another_version_is_refused(version: object) -> None:
    data = json.loads(COMMITTED.read_text()) | {"schema_version": version}
    with pytest.raises(ValidationError, match="schema_version"):
        BenchResult.model_validate(data)


def _committed() -> list[Path]:
    """Results of bench since it reads the log of images that are not ours."""
    found = [(path, json.loads(path.read_text())) for path in sorted(ROOT.glob("benchmarks/results/*.json"))]
    return [path for path, data in found if isinstance(data, dict) and data.get("schema_version", 1) > 1]


@pytest.mark.parametrize("path", _committed(), ids=lambda path: path.stem)
def test_little_of_the_committed_starts_is_unattributed(path: Path) -> None:
    for run in read_result(path).runs:
        assert run.ok, run.error
        assert run.total_seconds is not None
        assert run.unattributed_seconds is not None
        assert run.unattributed_seconds <= 0.05 * run.total_seconds, (run.image, run.index)


def test_resources_of_a_phase_are_optional_and_kept() -> None:
    plain = MeasuredPhase(Phase.READY, 1.0, 1.0, "client", 7)
    used = MeasuredPhase(Phase.FIRST_TOKEN, 1.0, 2.0, "client", 7, resources=Resources(cpu_seconds=0.5))
    run = Run(image="a", index=0, order=0, ok=False, error="No.", created_at=0.0, phases=(plain, used))
    again = Run.model_validate_json(run.model_dump_json())
    assert again == run
    assert [phase.resources for phase in again.phases] == [None, Resources(cpu_seconds=0.5)]
