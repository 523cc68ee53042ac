"""The forms of a result: page, drawing, PNG, live view, and the commands that write them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks.live import LiveView
from benchmarks.page import page
from benchmarks.schema import BenchResult, MeasuredPhase, Resources, Run, State, read_result
from benchmarks.svg import png, waterfall_svg
from builder.errors import HostError, InputError
from runtime.phases import Phase
from tests.unit.test_bench_report import known_result, known_run, slower

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks/results/smollm2-2026-11-22.json"


@pytest.fixture(scope="module")
def committed() -> BenchResult:
    return read_result(COMMITTED)


def three_imports() -> BenchResult:
    """Imports of three processes, one after the other, and one on the side."""
    run = known_run("<i>a</i>", 0, 9.0)
    imports = [
        MeasuredPhase(Phase.ENGINE_IMPORT, 1000 + 2.0 * i, 1002 + 2.0 * i, name, i)
        for i, name in enumerate(("api", "core", "worker"))
    ]
    spare = MeasuredPhase(
        Phase.TOKENIZER_INIT, 1000.5, 1001, "api", 0, "fast", resources=Resources(cpu_seconds=0.25)
    )
    run = run.model_copy(update={"phases": (*imports, spare)})
    return known_result(run, images=("<i>a</i>",))


# The page


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.found if name in (a.get("class") or "").split()]


def test_the_page_refers_to_no_other_file(committed: BenchResult) -> None:
    html = page(committed)
    assert not [attributes for _, attributes in Elements(html).found if {"src", "href"} & set(attributes)]
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(", html)


def test_every_run_is_in_the_page_and_the_median_of_each_image_is_shown(committed: BenchResult) -> None:
    runs = Elements(page(committed)).of_class("run")
    assert len(runs) == 15
    assert [run["id"] for run in runs if "hidden" not in run] == ["run-0-2", "run-1-3", "run-2-1"]


def test_three_imports_in_three_processes_are_three_bars_in_three_lanes() -> None:
    elements = Elements(page(three_imports()))
    labels = [bar["aria-label"] or "" for bar in elements.of_class("bar")]
    assert [label for label in labels if re.match("engine import, [a-z]", label)] == [
        "engine import, api, 2.00 s",
        "engine import, core, 2.00 s",
        "engine import, worker, 2.00 s",
    ]
    assert len(elements.of_class("lane")) == 1 + 3


def test_what_is_not_critical_is_pale_and_what_nobody_explains_is_hatched() -> None:
    elements = Elements(page(three_imports()))
    assert [bar["aria-label"] for bar in elements.of_class("spare") if "aria-label" in bar] == [
        "tokenizer init, api, 0.50 s"
    ]
    assert [bar["aria-label"] for bar in elements.of_class("gap") if "aria-label" in bar] == [
        "unattributed, 3.00 s"
    ]


def test_details_of_a_bar_hold_its_process_and_its_resources() -> None:
    (spare,) = (bar for bar in Elements(page(three_imports())).of_class("spare") if "data-facts" in bar)
    assert spare["data-facts"] is not None
    for part in ("api, pid 0", "0.500 s to 1.000 s", "not on it", "fast", "cpu seconds", "0.25"):
        assert part in spare["data-facts"]


def test_names_and_logs_cannot_become_markup() -> None:
    failed = Run(
        image="<i>a</i>", index=1, order=1, ok=False, error="<em>", created_at=1.0, log_tail="<script>x"
    )
    html = page(known_result(*three_imports().runs, failed, images=("<i>a</i>",)), ["<u>"])
    assert not re.search(r"<i>a|<em>|<script>x|<u>", html)


def test_a_result_without_a_measured_run_has_a_page() -> None:
    failed = Run(image="a", index=0, order=0, ok=False, error="No.", created_at=1.0)
    assert "No run reached its first token." in page(known_result(failed, images=("a",)))


# The drawing


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_drawing_names_images_processes_and_verdicts(committed: BenchResult) -> None:
    found = texts(waterfall_svg(committed))
    for text in ("smollm2:bf16: 9.99 s", "EngineCore", "critical path", "engine import 5.63"):
        assert text in found
    assert "imports are 5.6 of 10.0 s (56%); next: weight loading 1.1 s, engine start 0.9 s." in found


def test_the_drawing_has_a_bar_for_each_import_within_its_width() -> None:
    root = ElementTree.fromstring(waterfall_svg(three_imports()))
    boxes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    tips = [box.findtext("{http://www.w3.org/2000/svg}title") or "" for box in boxes]
    assert [tip for tip in tips if tip.startswith("engine import, ")] == [
        "engine import, api: 0.000 s to 2.000 s",
        "engine import, core: 2.000 s to 4.000 s",
        "engine import, worker: 4.000 s to 6.000 s",
    ]
    right = [float(b.get("x", 0)) + float(b.get("width", 0)) for b in boxes if b.get("width") != "100%"]
    assert max(right) <= 1000


def test_nothing_measured_cannot_be_drawn() -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        waterfall_svg(known_result(images=("a",)))


def test_the_png_is_twice_as_wide_as_the_drawing(committed: BenchResult) -> None:
    data = png(waterfall_svg(committed))
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 2000


def test_png_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(HostError, match=re.escape("coldstart[png]")):
        png("<svg/>")


# The live view


def test_phases_fill_up_on_the_scale_of_the_slowest_start_so_far() -> None:
    seconds = [0.0]
    view = LiveView(Console(file=io.StringIO(), width=60), clock=lambda: seconds[0])

    def shown() -> str:
        console = Console(file=io.StringIO(), width=60)
        console.print(view.render())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    view.begin("a")
    for at, phase in ((1.0, Phase.SERVER_BIND), (2.0, Phase.ENGINE_IMPORT), (5.0, Phase.ENGINE_IMPORT)):
        seconds[0] = at
        view.poll(phase)
    early = shown()
    assert re.search(r"engine_import +▐?█+ 4\.0 s", early)
    view.answered()
    seconds[0] = 9.0  # the container is being stopped
    assert shown() == early
    view.end(known_run("a", 0, 10.0))
    assert "engine_import" not in shown()
    seconds[0] = 0.0
    view.begin("a")
    seconds[0] = 5.0
    assert shown().splitlines()[1].count("█") < early.splitlines()[1].count("█")


def test_what_a_log_tells_are_rows_of_stretches_without_gaps() -> None:
    view = LiveView(Console(file=io.StringIO(), width=60), clock=lambda: 1000.0)
    view.begin("a")
    told = [
        (Phase.ENGINE_IMPORT, 1001.0, 1003.0, "APIServer"),
        (Phase.ENGINE_IMPORT, 1004.0, 1006.0, "EngineCore"),
        (Phase.WEIGHT_LOAD, 1006.0, 1007.0, "Worker"),
        (Phase.WEIGHT_LOAD, 1006.5, 1008.0, "Worker"),
        (Phase.WEIGHT_LOAD, 1008.0, 1009.0, "Worker"),
    ]
    for _ in range(2):  # each look tells all anew
        view.follow([MeasuredPhase(phase, start, end, name, 1) for phase, start, end, name in told])
    console = Console(file=io.StringIO(), width=60)
    console.print(view.render())
    assert isinstance(console.file, io.StringIO)
    rows = [(line.split()[0], line.split()[-2]) for line in console.file.getvalue().splitlines()[2:]]
    assert rows == [("engine_import", "2.0"), ("engine_import", "2.0"), ("weight_load", "3.0")]


# The commands


def coldstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builder.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "DOCKER_HOST": "unix:///nonexistent", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_report_writes_every_form_without_an_engine(tmp_path: Path) -> None:
    forms = [tmp_path / f"o.{form}" for form in ("html", "svg", "png", "md")]
    flags = [part for path in forms for part in (f"--{path.suffix[1:].replace('md', 'markdown')}", path)]
    done = coldstart("bench", "report", COMMITTED, *flags)
    assert done.returncode == 0, done.stderr
    assert "imports are 5.6 of 10.0 s (56%)" in done.stdout
    assert sorted(tmp_path.iterdir()) == sorted(forms)
    assert all(path.stat().st_size > 1000 for path in forms)


def test_an_image_is_benched_and_history_is_a_command(tmp_path: Path) -> None:
    assert "no Docker Engine answers" in coldstart("bench", "history:latest").stderr
    assert "no Docker Engine answers" in coldstart("bench", "--runs", "1", "an/image").stderr
    done = coldstart("bench", "history", COMMITTED.parent, "--html", tmp_path / "h.html")
    assert done.returncode == 0, done.stderr
    assert "coldstart-bench/smollm2:awq" in done.stdout
    assert "<svg" in (tmp_path / "h.html").read_text()


def written(path: Path, result: BenchResult) -> Path:
    path.write_text(result.model_dump_json())
    return path


@pytest.mark.parametrize(
    ("candidate", "code", "told"),
    [
        ([12.0, 12.1, 12.2], 7, "REGRESSED"),
        ([10.0, 10.1, 10.2], 0, "no regression"),
        ([10.0, 11.0, 12.0], 0, "not decided"),
    ],
)
def test_only_a_sure_regression_fails_with_a_code_of_its_own(
    tmp_path: Path, candidate: list[float], code: int, told: str
) -> None:
    result = slower([9.9, 10.0, 10.1], candidate)
    old = result.model_copy(update={"images": result.images[:1], "runs": result.runs[:3]})
    new = result.model_copy(update={"images": result.images[1:], "runs": result.runs[3:]})
    old_file, new_file = written(tmp_path / "old.json", old), written(tmp_path / "new.json", new)
    done = coldstart("bench", "report", new_file, "--baseline", old_file, "--max-regression", "10%")
    assert done.returncode == code, done.stderr
    assert told in done.stdout
    assert (told in done.stderr) == (code != 0)


def test_a_baseline_in_another_state_is_no_regression(tmp_path: Path) -> None:
    result = slower([9.9, 10.0, 10.1], [20.0, 20.1, 20.2])
    cold = [run.model_copy(update={"state": State(page_cache="cold")}) for run in result.runs[3:]]
    old = result.model_copy(update={"images": result.images[:1], "runs": result.runs[:3]})
    new = result.model_copy(update={"images": result.images[1:], "runs": tuple(cold)})
    old_file, new_file = written(tmp_path / "old.json", old), written(tmp_path / "new.json", new)
    done = coldstart("bench", "report", new_file, "--baseline", old_file, "--max-regression", "10%")
    assert done.returncode == 0, done.stderr
    assert "new: not decided: the baseline ran with page cache not controlled" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a", "--until", "5"], "5 is not a percentage"),
        (["a", "--until", "-5%"], "-5% is not a percentage"),
        (["a", "--max-regression", "5%"], "nothing to compare"),
        (["a", "--max-runs", "9"], "--max-runs is for --until"),
        (["a", "--max-runs", "5", "--until", "5%"], "--until cannot be reached"),
        (["a", "--html", "/nonexistent/a.html"], "/nonexistent is not a folder"),
        (["a", "--json", "/nonexistent/a.json"], "/nonexistent is not a folder"),
        (["a", "--baseline", str(ROOT / "pyproject.toml")], "is not a result of `coldstart bench --json`"),
        (["a", "--baseline", str(COMMITTED)], "holds several images, and none is called a"),
        (
            ["coldstart-bench/smollm2:awq", "--baseline", str(COMMITTED), "--until", "5%"],
            "--until cannot be reached",
        ),
        (["report", "/nonexistent.json"], "cannot read /nonexistent.json"),
        (["report", str(COMMITTED), "--baseline", str(ROOT / "pyproject.toml")], "is not a result"),
        (["history", str(ROOT / "docs")], "holds no results"),
    ],
)
def test_what_cannot_work_is_told_before_anything_starts(arguments: list[str], told: str) -> None:
    done = coldstart("bench", *arguments)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
