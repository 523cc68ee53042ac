"""What each optimisation saves: how it is measured, and what every form of the result says of it."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import ablation, history
from benchmarks.harness import Conditions
from benchmarks.outputs import Outputs
from benchmarks.page import page
from benchmarks.report import comparison, markdown
from benchmarks.schema import BenchResult, ImageFacts
from benchmarks.summary import compared
from builder.cli import app
from tests.unit.test_bench_harness import StubHost, bench
from tests.unit.test_bench_report import known_result, known_run

IMAGE = ImageFacts("team/ours:bf16", "sha256:1", 1)
VARIANTS = (
    IMAGE,
    IMAGE.without("useless"),
    IMAGE.without("template"),
    IMAGE.without("useless", "template", name="all of them"),
)
SECONDS = ((10.0, 10.1, 9.9), (10.0, 9.9, 10.2), (15.0, 15.2, 15.1), (17.0, 17.3, 17.1))


@pytest.fixture(scope="module")
def result() -> BenchResult:
    """Three starts in each of four ways; without the template they take half as long again."""
    runs = [
        known_run(image.reference, 4 * index + place, SECONDS[place][index])
        for index in range(3)
        for place, image in enumerate(VARIANTS)
    ]
    names = tuple(image.reference for image in VARIANTS)
    return known_result(*runs, images=names).model_copy(update={"images": VARIANTS})


def test_an_image_is_started_whole_and_without_each_in_turn() -> None:
    host = StubHost(ours={})
    measured = bench(host, "ours", runs=2, ablate=["a", "b"], conditions=Conditions(sample=False))
    names = ["ours", "ours without a", "ours without b", "ours without all of them"]
    assert [run.image for run in measured.runs] == names + names[::-1]
    assert [image.off for image in measured.images] == [(), ("a",), ("b",), ("a", "b")]
    told = [environment.get("COLDSTART_OFF") for environment, _ in host.started]
    assert told == [None, "a", "b", "a,b", "a,b", "b", "a", None]
    assert len({image.id for image in measured.images}) == 1


def test_one_optimisation_alone_is_all_of_them() -> None:
    host = StubHost(ours={})
    measured = bench(host, "ours", ablate=["a"], conditions=Conditions(sample=False))
    assert [image.off for image in measured.images] == [(), ("a",)]


def test_savings_are_ratios_with_intervals_the_largest_first(result: BenchResult) -> None:
    found = ablation.savings(result)
    assert [saving.name for saving in found] == ["all of them", "template", "useless"]
    template = found[1]
    assert template.saved == pytest.approx(5.1)
    assert template.ratio.value == pytest.approx(1.51)
    assert template.interval == pytest.approx(((15.0 / 10.1 - 1) * 10, (15.2 / 9.9 - 1) * 10))
    assert [saving.decided for saving in found] == [True, True, False]
    told = ablation.sentences(result)
    assert told[1].startswith("template saves 5.1 s: without template 1.51 times as long (1.49 to 1.54")
    assert told[2] == "No difference that these runs show: useless."
    assert "do not add up" in told[-1]


def test_what_starts_faster_without_it_is_told_as_a_cost(result: BenchResult) -> None:
    (_, _, saving) = ablation.savings(
        result.model_copy(
            update={
                "runs": tuple(
                    run.model_copy(update={"total_seconds": run.total_seconds - 4})  # type: ignore[operator]
                    if run.image.endswith("useless")
                    else run
                    for run in result.runs
                )
            }
        )
    )
    assert saving.sentence.startswith("useless costs 4.0 s")


def test_every_form_tells_what_each_saves(result: BenchResult, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison(result))
    terminal = console.file.getvalue()  # type: ignore[attr-defined]
    html, text = page(result), markdown(result)
    for form in (terminal, html, text):
        for cell in ("template", "15.10", "+5.10", "1.51 (1.49-1.54)"):
            assert cell in form
    # Waterfalls and phases of two of the ways only: of the whole, and of what has the least.
    assert "without all of them" in terminal
    assert html.count('<section class="image"') == 2
    assert compared(result).startswith(
        "Compared: team/ours:bf16 with all optimisations, and in 3 ways without"
    )
    (path,) = Outputs(svg=tmp_path / "a.svg").write(result)
    drawn = ElementTree.parse(path).getroot()
    texts = ["".join(element.itertext()) for element in drawn.iter() if element.tag.endswith("text")]
    assert "+5.10 s, 1.51 (1.49-1.54) ×" in texts  # noqa: RUF001
    for box in drawn.iter():
        if box.get("x") and box.get("width", "%")[-1] != "%":
            assert 0 <= float(box.attrib["x"]) + float(box.attrib["width"]) <= 1000


def test_starts_without_an_optimisation_are_no_versions(result: BenchResult) -> None:
    (line,) = history.series([("a.json", result)])
    assert (line.name, len(line.points)) == ("team/ours", 1)


def test_failed_variants_are_left_out_and_told(result: BenchResult) -> None:
    runs = tuple(
        run.model_copy(update={"ok": False, "error": "No.", "total_seconds": None, "image": run.image})
        if run.image.endswith("template")
        else run
        for run in result.runs
    )
    found = result.model_copy(update={"runs": runs})
    assert [saving.name for saving in ablation.savings(found)] == ["all of them", "useless"]
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison(found))
    assert "without template, run" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_saved_ablation_is_shown_again(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(result.model_dump_json())
    shown = CliRunner().invoke(app, ["bench", "report", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "What each optimisation saves" in shown.output
