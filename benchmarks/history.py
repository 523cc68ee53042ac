"""A folder of results -> series of medians over versions, with what got slower marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.layout import ticks
from benchmarks.schema import BenchResult, ImageFacts, Machine, Workload, read_result
from benchmarks.stats import Estimate, Verdict, judge, median_with_interval, ratio_of_medians
from benchmarks.summary import describe, totals
from benchmarks.svg import SERIES, WIDTH, Canvas, legend
from builder.errors import InputError
from builder.render import render_page

ALLOWED = 0.05


@dataclass(frozen=True, slots=True)
class Point:
    """One image of one result. change: to the point before, None where the two cannot be compared.

    seconds: the median, to the first token.
    """

    label: str
    result: BenchResult
    source: str
    samples: tuple[float, ...]
    change: Estimate | None
    allowed: float

    @property
    def seconds(self) -> Estimate:
        return median_with_interval(self.samples)

    @property
    def mark(self) -> str:
        if self.change is None or self.change.interval is None:
            return ""
        if judge(self.change, self.allowed) is Verdict.REGRESSED:
            return "regression"
        return "improvement" if self.change.interval[1] < 1 / (1 + self.allowed) else ""


@dataclass(frozen=True, slots=True)
class Series:
    """What is one image over time, the oldest first."""

    name: str
    points: tuple[Point, ...]


def read_folder(folder: Path) -> tuple[list[tuple[str, BenchResult]], list[str]]:
    """(file name, result) by the time of measurement; and the JSON files that are no results."""
    results, others = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            results.append((path.name, read_result(path)))
        except InputError:
            others.append(path.name)
    if not results:
        raise InputError(
            f"{folder} holds no results",
            why=f"{others[0]} is JSON of another form." if others else "It has no .json file.",
            fix="Name a folder of files that `coldstart bench --json` wrote.",
        )
    return sorted(results, key=lambda item: item[1].created), others


def series(results: Sequence[tuple[str, BenchResult]], allowed: float = ALLOWED) -> list[Series]:
    """One series an image and state of the caches; its versions are the tags where no result holds two images
    of a repository.

    Otherwise, as when tags tell variants apart, it is the whole reference. Points of different machines or
    requests are not compared. A date that several results share, or a tag that was measured again, is told
    apart by when.
    """
    when = _moments([result.created for _, result in results])
    crowded = {
        repository
        for _, result in results
        for repository, count in Counter(_split(image.reference)[0] for image in _whole(result)).items()
        if count > 1
    }
    points: dict[str, list[Point]] = {}
    for source, result in results:
        for image in _whole(result):
            repository, tag = _split(image.reference)
            samples = tuple(totals(result, image.reference))
            if not samples:
                continue
            name = image.reference if repository in crowded else repository
            line = points.setdefault(name + _state(result, image.reference), [])
            label = when[result.created] if repository in crowded or not tag else tag
            comparable = line and _conditions(line[-1].result) == _conditions(result)
            change = ratio_of_medians(samples, line[-1].samples) if comparable else None
            line.append(Point(label, result, source, samples, change, allowed))
    return [Series(name, _told_apart(line, when)) for name, line in points.items()]


def _moments(created: Sequence[datetime]) -> dict[datetime, str]:
    """Each as its date, and where that is not its alone with as much of the time as tells it apart."""
    told: dict[datetime, str] = {}
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d"):
        texts = {at: f"{at:{form}}" for at in created}
        counts = Counter(texts.values())
        told |= {at: text for at, text in texts.items() if at not in told or counts[text] == 1}
    return told


def _told_apart(line: Sequence[Point], when: Mapping[datetime, str]) -> tuple[Point, ...]:
    counts = Counter(point.label for point in line)
    return tuple(
        point
        if counts[point.label] == 1
        else replace(point, label=f"{point.label} {when[point.result.created]}")
        for point in line
    )


def _whole(result: BenchResult) -> list[ImageFacts]:
    """Starts without some optimisations are no version of anything."""
    return [image for image in result.images if not image.off]


def _state(result: BenchResult, reference: str) -> str:
    """What its starts were made to find, e.g. " (page cache cold)"; empty where nothing was controlled."""
    state = next(run.state for run in result.runs if run.image == reference)
    words = [
        f"{cache.replace('_', ' ')} {value}"
        for cache in ("page_cache", "compile_cache")
        if (value := getattr(state, cache)) != "as_is"
    ]
    words += ["pulled"] if state.pulled else []
    return f" ({', '.join(words)})" if words else ""


def _conditions(result: BenchResult) -> tuple[Machine, Workload]:
    return result.machine.model_copy(update={"kernel": "", "docker_engine": None}), result.workload


def _split(reference: str) -> tuple[str, str]:
    """Repository, with the server's arguments, and tag; a colon before a slash is a port."""
    image, space, arguments = reference.partition(" ")
    repository, colon, tag = image.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = image, ""
    return repository + space + arguments, tag


def marked(lines: Sequence[Series]) -> list[str]:
    """A sentence for each regression and improvement."""
    return [
        f"{line.name} {point.label}: {point.mark}, {point.change.value:.2f} times the version before "
        f"(interval {point.change.interval[0]:.2f} to {point.change.interval[1]:.2f}, {point.source})."
        for line in lines
        for point in line.points
        if point.mark and point.change and point.change.interval
    ]


def table(lines: Sequence[Series]) -> RenderableType:
    """One row a point: the median, its interval, and the change."""
    parts: list[RenderableType] = []
    longest = max(point.seconds.value for line in lines for point in line.points)
    for line in lines:
        grid = Table(box=box.SIMPLE_HEAD, title=Text(line.name, style="bold"), title_justify="left")
        for name in ("version", "measured", "first token, s", "runs", "change"):
            grid.add_column(
                name, no_wrap=True, justify="left" if name in ("version", "measured") else "right"
            )
        grid.add_column("")
        for point in line.points:
            style = {"regression": "red", "improvement": "green"}.get(point.mark, "")
            bar = "█" * max(1, round(10 * point.seconds.value / longest))
            grid.add_row(*_cells(point), Text(f"{bar} {point.mark}", style=style))
        parts.append(grid)
    return Group(*parts, *(Text(sentence) for sentence in marked(lines)))


def _cells(point: Point) -> list[str]:
    found = point.seconds
    spread = f" ({found.interval[0]:.2f}-{found.interval[1]:.2f})" if found.interval else ""
    change = "" if point.change is None else f"{point.change.value:.2f}"
    if point.change and point.change.interval:
        change += f" ({point.change.interval[0]:.2f}-{point.change.interval[1]:.2f})"
    measured = f"{point.result.created:%Y-%m-%d}"
    return [point.label, measured, f"{found.value:.2f}{spread}", str(len(point.samples)), change]


_LEFT, _RIGHT, _PLOT = 60.0, WIDTH - 60.0, 292.0
_LABELS, _LABEL_CHARACTERS = 10, 14  # what fits beside each other, and within the canvas at both ends


def svg(lines: Sequence[Series]) -> str:
    """Medians with their intervals, one line a series; versions stand in the order they were measured."""
    canvas = Canvas("Time to the first token, by version")
    points = [point for line in lines for point in line.points]
    labels = {point.result.created: point.label for point in reversed(points)}
    moments = sorted(labels)
    step = (_RIGHT - _LEFT) / (len(moments) - 1 or 1)
    x = {at: _LEFT + step * i for i, at in enumerate(moments)}
    colors = [canvas.color(f"series{i}", *SERIES[i % len(SERIES)]) for i in range(len(lines))]
    entries = [(line.name, color) for line, color in zip(lines, colors, strict=True)]
    top = legend(canvas, entries, 29) + 35
    bottom = top + _PLOT
    highest = 1.08 * max((p.seconds.interval or (0, p.seconds.value))[1] for p in points)

    def y(seconds: float) -> float:
        return bottom - _PLOT * seconds / highest

    for tick in ticks(highest, most=6):
        canvas.line([(_LEFT - 10, y(tick)), (_RIGHT + 10, y(tick))], "line")
        canvas.text(_LEFT - 16, y(tick) + 4, f"{tick:g} s", size=11, color="muted", anchor="end")
    for at in moments[:: -(-len(moments) // _LABELS)]:
        for row, word in enumerate(labels[at].split()):
            below = bottom + 18 + 13 * row
            canvas.text(x[at], below, word[:_LABEL_CHARACTERS], size=11, color="muted", anchor="middle")
    for line, color in zip(lines, colors, strict=True):
        canvas.line([(x[p.result.created], y(p.seconds.value)) for p in line.points], color, 2)
        for point in line.points:
            _draw(canvas, line, point, x[point.result.created], y, color)
    told = "Medians to the first token with intervals. Red ring: regression; green ring: improvement."
    canvas.text(20, bottom + 66, told, size=11, color="muted")
    return canvas.finish(bottom + 82)


def _draw(
    canvas: Canvas, line: Series, point: Point, x: float, y: Callable[[float], float], color: str
) -> None:
    here = y(point.seconds.value)
    low, high = point.seconds.interval or (point.seconds.value, point.seconds.value)
    canvas.line([(x, y(low)), (x, y(high))], color, 1.5)
    tip = f"{line.name} {point.label}: {', '.join(cell for cell in _cells(point)[1:] if cell)}"
    canvas.dot(x, here, 4, color, tip=tip)
    if point.mark and point.change:
        mark = "bad" if point.mark == "regression" else "good"
        canvas.dot(x, here, 9, mark, ring=True)
        above = min(y(high), here - 9) - 6
        canvas.text(
            x, above, f"{point.change.value:.2f} x", size=11.5, color=mark, bold=True, anchor="middle"
        )


def page(lines: Sequence[Series], skipped: Sequence[str] = ()) -> str:
    """One self-contained HTML page: the plot and a table."""
    machines = dict.fromkeys(describe(p.result.machine) for line in lines for p in line.points)
    return render_page(
        "history.html.j2", lines=lines, plot=svg(lines), cells=_cells, marked=marked(lines),
        machines=list(machines), skipped=skipped,
    )  # fmt: skip
