"""Several results in a folder as one history."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks.history import Series, marked, page, read_folder, series, svg, table
from benchmarks.schema import BenchResult, ImageFacts, State
from builder.errors import InputError
from tests.unit.test_bench_report import known_result, known_run

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/smollm2-2026-11-22.json"


def version(day: int, *totals: float, tag: str | None = None, cores: int = 2) -> tuple[str, BenchResult]:
    reference = f"reg:5000/team/app:{tag or f'v{day}'}"
    runs = [known_run(reference, 2 * i, total) for i, total in enumerate(totals)]
    result = known_result(*runs, images=(reference,))
    created = result.created.replace(day=day)
    machine = result.machine.model_copy(update={"cores": cores})
    return f"{day}.json", result.model_copy(update={"created": created, "machine": machine})


def marks(*results: tuple[str, BenchResult], allowed: float = 0.05) -> list[str]:
    (line,) = series(results, allowed)
    return [point.mark for point in line.points]


def test_tags_are_the_versions_of_a_repository() -> None:
    (line,) = series([version(1, 5.0), version(2, 5.0)])
    assert line.name == "reg:5000/team/app"
    assert [point.label for point in line.points] == ["v1", "v2"]


def test_images_of_one_repository_in_one_result_are_series_of_their_own() -> None:
    result = known_result(known_run("app:a", 0, 5.0), known_run("app:b", 1, 6.0), images=("app:a", "app:b"))
    lines = series([("1.json", result)])
    assert [(line.name, line.points[0].label) for line in lines] == [
        ("app:a", "2026-01-02"),
        ("app:b", "2026-01-02"),
    ]


def test_what_is_surely_slower_than_the_version_before_is_marked_and_what_is_surely_faster() -> None:
    found = marks(version(1, 5.0, 5.1, 5.2), version(2, 6.0, 6.1, 6.2), version(3, 5.0, 5.1, 5.2))
    assert found == ["", "regression", "improvement"]


def test_what_may_be_noise_or_is_allowed_is_not_marked() -> None:
    assert marks(version(1, 5.0, 5.5, 6.0), version(2, 5.6, 6.0, 6.6)) == ["", ""]
    assert marks(version(1, 5.0, 5.1, 5.2), version(2, 6.0, 6.1, 6.2), allowed=0.3) == ["", ""]
    assert marks(version(1, 5.0), version(2, 9.0)) == ["", ""]


def test_cold_and_warm_starts_are_not_versions_of_each_other() -> None:
    def under(state: State, item: tuple[str, BenchResult]) -> tuple[str, BenchResult]:
        runs = [run.model_copy(update={"state": state}) for run in item[1].runs]
        return item[0], item[1].model_copy(update={"runs": runs})

    warm = under(State(page_cache="warm"), version(1, 5.0, 5.1, 5.2))
    cold = under(State(page_cache="cold"), version(2, 6.0, 6.1, 6.2))
    lines = series([warm, cold])
    assert [(line.name, len(line.points)) for line in lines] == [
        ("reg:5000/team/app (page cache warm)", 1),
        ("reg:5000/team/app (page cache cold)", 1),
    ]
    assert marked(lines) == []


def test_versions_of_different_machines_are_not_compared() -> None:
    (line,) = series([version(1, 5.0, 5.0, 5.0), version(2, 9.0, 9.0, 9.0, cores=8)])
    assert line.points[1].change is None


@pytest.fixture
def lines() -> list[Series]:
    return series([version(1, 5.0, 5.1, 5.2), version(2, 6.0, 6.1, 6.2, tag="<b>")])


def test_every_report_names_versions_and_marks_the_regression(lines: list[Series]) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(lines))
    assert isinstance(console.file, io.StringIO)
    text, html, drawing = console.file.getvalue(), page(lines), svg(lines)
    for shown in (text, html, drawing):
        assert "v1" in shown
        assert "regression" in shown
    assert "<b>" in text
    assert "<b>" not in html + drawing
    assert marked(lines) == [
        "reg:5000/team/app <b>: regression, 1.20 times the version before (interval 1.15 to 1.24, 2.json)."
    ]


def test_the_plot_is_xml_with_a_dot_for_each_point(lines: list[Series]) -> None:
    root = ElementTree.fromstring(svg(lines))
    dots = [e for e in root.iter("{http://www.w3.org/2000/svg}circle") if e.get("r") == "4"]
    assert len(dots) == 2


def test_a_folder_is_read_in_the_order_of_measurement_and_other_files_are_told(tmp_path: Path) -> None:
    for name, day in (("a.json", 3), ("b.json", 1)):
        (tmp_path / name).write_text(version(day, 5.0)[1].model_dump_json())
    shutil.copy(COMMITTED, tmp_path / "old.json")
    (tmp_path / "other.json").write_text("{}")
    results, others = read_folder(tmp_path)
    assert [name for name, _ in results] == ["b.json", "a.json", "old.json"]
    assert others == ["other.json"]


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no results"):
        read_folder(tmp_path)


def test_an_image_that_never_started_has_no_point() -> None:
    result = known_result(images=("app:1",))
    assert isinstance(result.images[0], ImageFacts)
    assert series([("1.json", result)]) == []
