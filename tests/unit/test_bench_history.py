"""Several results in a folder as one history."""

from __future__ import annotations

import io
import shutil
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks.history import Series, marked, page, read_folder, series, svg, table
from benchmarks.schema import BenchResult, ImageFacts, State
from builder.errors import InputError
from tests.unit.test_bench_report import known_result, known_run

FOLDER = Path(__file__).parents[2] / "benchmarks/results"
COMMITTED = FOLDER / "smollm2-2026-11-22.json"
SVG = "{http://www.w3.org/2000/svg}"


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


def test_arguments_of_the_server_belong_to_the_series() -> None:
    (line,) = series([version(day, 5.0, tag=f"v{day} --model a:b --dtype float32") for day in (1, 2)])
    assert line.name == "reg:5000/team/app --model a:b --dtype float32"
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


def spans(drawing: str) -> list[tuple[float, float, str]]:
    """Where each text begins and ends, by the mean width of a character that the drawings count with."""
    found = []
    for element in ElementTree.fromstring(drawing).iter(f"{SVG}text"):
        text, x = element.text or "", float(element.attrib["x"])
        width = len(text) * float(element.attrib["font-size"]) * 0.58
        begin = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[element.attrib["text-anchor"]]
        found.append((begin, begin + width, text))
    return found


def height(drawing: str) -> float:
    return float(ElementTree.fromstring(drawing).attrib["height"])


def test_every_text_of_the_committed_history_is_within_the_canvas() -> None:
    drawing = svg(series(read_folder(FOLDER)[0]))
    assert [span for span in spans(drawing) if span[0] < 0 or span[1] > 1000] == []
    assert height(drawing) > height(svg(series([version(1, 5.0)])))


def test_labels_of_many_long_tags_stay_within_the_canvas_and_apart() -> None:
    tags = [f"v{number}.0.0-long-tag" for number in range(10, 24)]
    for count in range(1, len(tags) + 1):
        drawing = svg(series([version(day + 1, 5.0, tag=tag) for day, tag in enumerate(tags[:count])]))
        found = sorted(spans(drawing))
        assert found[-1][1] <= 1000
        labels = [span for span in found if span[2].startswith("v")]
        assert all(one[1] < other[0] for one, other in pairwise(labels))


def test_a_name_that_no_row_can_hold_keeps_its_end() -> None:
    name = f"registry.example.com/{'long/' * 40}app:a"
    result = known_result(known_run(name, 0, 5.0), images=(name,))
    (span,) = (span for span in spans(svg(series([("1.json", result)]))) if span[2].startswith("…"))
    assert span[1] <= 1000
    assert span[2].endswith("/app")


def at(hour: int, minute: int, item: tuple[str, BenchResult]) -> tuple[str, BenchResult]:
    created = item[1].created.replace(hour=hour, minute=minute, second=7)
    return item[0], item[1].model_copy(update={"created": created})


def test_results_of_one_date_are_told_apart_by_their_times() -> None:
    def variants(day: int) -> tuple[str, BenchResult]:
        runs = [known_run("app:a", 0, 5.0), known_run("app:b", 1, 6.0)]
        result = known_result(*runs, images=("app:a", "app:b"))
        return f"{day}.json", result.model_copy(update={"created": result.created.replace(day=day)})

    lines = series([variants(1), at(9, 30, variants(2)), at(18, 5, variants(2))])
    labels = ["2026-01-01", "2026-01-02 09:30", "2026-01-02 18:05"]
    assert [[point.label for point in line.points] for line in lines] == [labels, labels]
    texts = [text for _, _, text in spans(svg(lines))]
    assert {"09:30", "18:05"} <= set(texts)


def test_a_tag_that_is_measured_again_is_told_apart_by_when() -> None:
    results = [version(1, 5.0, tag="main"), version(2, 5.0), version(3, 5.0, tag="main")]
    (line,) = series([*results, at(9, 30, version(4, 5.0)), at(18, 5, version(4, 5.0))])
    assert [point.label for point in line.points] == [
        "main 2026-01-01",
        "v2",
        "main 2026-01-03",
        "v4 2026-01-04 09:30",
        "v4 2026-01-04 18:05",
    ]


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
