"""What each optimisation saves: one image, started with all of them and without each, in turn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from benchmarks.layout import ticks
from benchmarks.schema import BenchResult
from benchmarks.stats import Estimate, Summary, summarize
from benchmarks.summary import compared, interval, machine, ratio, totals
from benchmarks.svg import MARGIN, WIDTH, Canvas, wrapped
from builder.errors import InputError

TITLE = "What each optimisation saves"
NOTE = "Each was left out alone. They overlap, so that their savings do not add up."


@dataclass(frozen=True, slots=True)
class Saving:
    """What starts without some optimisations take longer. ratio: their median over that of the whole.

    name: of the optimisation, or "all of them"; whole: median seconds of the starts that lack nothing.
    """

    name: str
    seconds: Summary
    whole: float
    ratio: Estimate

    @property
    def saved(self) -> float:
        """Seconds; negative where starts without it are faster."""
        return self.seconds.median - self.whole

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of `saved`, from that of the ratio."""
        if self.ratio.interval is None:
            return None
        low, high = self.ratio.interval
        return (low - 1) * self.whole, (high - 1) * self.whole

    @property
    def decided(self) -> bool:
        """Whether the interval says that there is a difference at all."""
        return self.ratio.interval is not None and not self.ratio.interval[0] <= 1 <= self.ratio.interval[1]

    @property
    def sentence(self) -> str:
        told = f"without {self.name} {self.ratio.value:.2f} times as long ({interval(self.ratio)})."
        if not self.decided:
            return f"{self.name}: no difference that these runs show; {told}"
        verb, seconds = ("saves", self.saved) if self.saved > 0 else ("costs", -self.saved)
        return f"{self.name} {verb} {seconds:.1f} s: {told}"


def outline(result: BenchResult) -> BenchResult:
    """The starts with every optimisation and those with the fewest, for forms that have no room for all."""
    first, *variants = result.images
    fewest = max(variants, key=lambda image: len(image.off))
    kept = (first, fewest)
    runs = tuple(run for run in result.runs if run.image in {image.reference for image in kept})
    return result.model_copy(update={"images": kept, "runs": runs})


def savings(result: BenchResult) -> list[Saving]:
    """The largest first, all of them together before; what no run measured is left out."""
    whole = totals(result, result.images[0].reference)
    found = []
    for image in result.images[1:]:
        samples, estimate = totals(result, image.reference), ratio(result, image.reference)
        if samples and whole and estimate:
            name = image.reference.removeprefix(f"{result.images[0].reference} without ")
            found.append(
                (len(image.off), Saving(name, summarize(samples), summarize(whole).median, estimate))
            )
    return [saving for _, saving in sorted(found, key=lambda pair: (pair[0] == 1, -pair[1].saved))]


def sentences(result: BenchResult) -> list[str]:
    """What is decided, what is not, and how to read it."""
    found = savings(result)
    undecided = ", ".join(saving.name for saving in found if not saving.decided)
    lines = [saving.sentence for saving in found if saving.decided]
    lines += [f"No difference that these runs show: {undecided}."] if undecided else []
    return [*lines, NOTE]


def cells(saving: Saving) -> tuple[str, str, str, str]:
    """Name; median of the starts without it; seconds saved; ratio with its interval."""
    bounds = saving.ratio.interval
    low_high = f" ({bounds[0]:.2f}-{bounds[1]:.2f})" if bounds else ""
    return (
        saving.name,
        f"{saving.seconds.median:.2f}",
        f"{saving.saved:+.2f}",
        f"{saving.ratio.value:.2f}{low_high}",
    )


HEADS = ("without", "total, s", "saves, s", "ratio")


def table(result: BenchResult) -> Table:
    found = savings(result)
    most = max((saving.saved for saving in found), default=0.0)
    grid = Table(box=box.SIMPLE_HEAD, title=Text(TITLE, style="bold"), title_justify="left", pad_edge=False)
    for position, head in enumerate((*HEADS, "")):
        grid.add_column(head, no_wrap=True, justify="right" if 0 < position < 4 else "left")
    for saving in found:
        bar = Bar(most, 0, max(saving.saved, 0.0), width=12) if most > 0 else ""
        grid.add_row(*(Text(cell) for cell in cells(saving)), bar, style="" if saving.decided else "dim")
    return grid


def markdown_lines(result: BenchResult) -> list[str]:
    rows = [f"| {' | '.join(HEADS)} |", "|---|---:|---:|---:|"]
    return rows + [f"| {' | '.join(cells(saving))} |" for saving in savings(result)]


_LEFT, _RIGHT, _ROW, _BAR = 190.0, WIDTH - 230.0, 30.0, 16.0


def svg(result: BenchResult) -> str:
    """A bar of seconds for each, with its interval. Raises InputError when there is nothing to draw."""
    found = savings(result)
    if not found:
        raise InputError("There is nothing to draw: no run reached its first token.")
    canvas = Canvas(TITLE)
    color = canvas.color("saved", "#5b9bf0", "#6aa2f5")
    ends = [end for saving in found for end in (saving.saved, *(saving.interval or ()))]
    low: float = min(0.0, *ends)
    high: float = max(0.0, *ends) or 1.0

    def x(seconds: float) -> float:
        return _LEFT + (seconds - low) / (high - low) * (_RIGHT - _LEFT)

    y = 34.0
    canvas.text(MARGIN, y, f"{TITLE}: seconds to the first token", size=15, bold=True)
    y += 20
    bottom = y + _ROW * len(found)
    for tick in (tick for tick in ticks(high) if low <= tick):
        canvas.line([(x(tick), y), (x(tick), bottom)], "line")
        canvas.text(x(tick), bottom + 16, f"{tick:g} s", size=11, color="muted", anchor="middle")
    for saving in found:
        name, _, saved, times = cells(saving)
        middle = y + _ROW / 2
        start, end = sorted((x(0.0), x(saving.saved)))
        canvas.text(_LEFT - 12, middle + 4, name, anchor="end", bold=saving.decided)
        canvas.rect(start, middle - _BAR / 2, max(end - start, 1.0), _BAR, color, pale=not saving.decided)
        if saving.interval:
            canvas.line([(x(end), middle) for end in saving.interval], "fg", 1.5)
        canvas.text(_RIGHT + 14, middle + 4, f"{saved} s, {times} ×", color="muted")  # noqa: RUF001
        y += _ROW
    y = bottom + 30
    told = (
        f"{NOTE} Lines are intervals; pale: none that these runs show. {compared(result)} {machine(result)}"
    )
    for line in wrapped(told, 11):
        y += 16
        canvas.text(MARGIN, y, line, size=11, color="muted")
    return canvas.finish(y + MARGIN)


def page_rows(result: BenchResult) -> Sequence[tuple[Saving, tuple[str, str, str, str], float]]:
    """Per saving its cells, and how far its bar reaches as a share of the longest."""
    found = savings(result)
    most = max((saving.saved for saving in found), default=0.0)
    return [(saving, cells(saving), max(saving.saved, 0.0) / most if most > 0 else 0.0) for saving in found]
