"""BenchResult -> what is shown: pure functions to rich renderables and Markdown, nothing printed here."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks import ablation
from benchmarks.layout import KINDS, waterfall
from benchmarks.schema import BenchResult, Run
from benchmarks.stats import Summary
from benchmarks.summary import (
    FIRST_TOKEN_TOTAL,
    UNATTRIBUTED,
    compared,
    is_ablation,
    machine,
    median_run,
    note_lines,
    phase_rows,
    short_names,
    summary_lines,
    verdict_lines,
)

OVERLAP_NOTE = "phases overlap; they do not add up"

_LOG_LINES_SHOWN = 5
_POINT_SHARE = 0.005
_NOTHING = "–"  # noqa: RUF001 - typography, in a cell of its own


def comparison(result: BenchResult, notes: Sequence[str] = ()) -> RenderableType:
    """Everything that `coldstart bench` shows at the end. `notes`: what else is to be said of the result."""
    names = short_names(result)
    parts: list[RenderableType] = []
    shown = result
    if is_ablation(result):
        shown = ablation.outline(result)
        parts += [ablation.table(result), *(Text(line) for line in ablation.sentences(result)), Text()]
    parts.append(phase_table(shown))
    parts += [Text(line) for line in (*summary_lines(result), *notes)]
    for image in shown.images:
        run = median_run(result, image.reference)
        if run is not None:
            parts += [Text(), draw(run, names[image.reference])]
    if any(run.ok for run in result.runs):
        parts.append(Text("* on the critical path", style="dim"))
    if result.failed:
        parts += [Text(), failures(result)]
    return Group(*parts)


def phase_table(result: BenchResult) -> Table:
    """Rows are phases, columns are images, cells are the median and the middle half of the runs."""
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption(result)), caption_justify="left", pad_edge=False)
    table.add_column("phase", no_wrap=True)
    for name in short_names(result).values():
        table.add_column(Text(name, overflow="fold"), justify="right")
    rows = phase_rows(result)
    columns = [_cells([row.cells[i] for row in rows]) for i in range(len(result.images))]
    for position, row in enumerate(rows):
        style = "bold" if row.name == FIRST_TOKEN_TOTAL else ""
        cells = (Text(column[position]) for column in columns)
        last_phase = position + 1 < len(rows) and rows[position + 1].name == UNATTRIBUTED
        table.add_row(Text(row.name), *cells, style=style, end_section=last_phase)
    return table


def failures(result: BenchResult) -> RenderableType:
    """Each failed run with its reason and the end of its log."""
    lines: list[Text] = []
    for run in result.failed:
        lines.append(Text(f"{run.image}, run {run.index + 1} failed: {run.error}", style="red"))
        lines += [Text(f"  {line}", style="dim") for line in run.log_tail.splitlines()[-_LOG_LINES_SHOWN:]]
    return Group(*lines)


def draw(run: Run, name: str) -> RenderableType:
    """One bar per event, as wide as the console allows; what is not critical is dim."""
    drawn = waterfall(run)
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    bars = [bar for lane in drawn.lanes for bar in lane.bars]
    for bar in sorted(bars, key=lambda bar: (bar.start, bar.end)):
        critical = bar in drawn.critical
        # A moment is drawn as wide as can be seen, and told by when, not by how long.
        least = drawn.seconds * _POINT_SHARE
        left, right = (
            min(bar.start, drawn.seconds - least),
            min(max(bar.end, bar.start + least), drawn.seconds),
        )
        length = f"{bar.seconds:.2f} s" if bar.seconds else f"at {bar.start:.2f} s"
        label = Text.assemble("* " if critical else "  ", bar.phase.value, (f" {bar.process}", "dim"))
        color = KINDS[bar.phase].dark if critical else "bright_black"
        grid.add_row(label, Bar(drawn.seconds, left, right, color=color), length)
    unattributed = sum(segment.seconds for segment in drawn.path if segment.bar is None)
    grid.add_row(Text(f"  {UNATTRIBUTED}", style="dim"), "", f"{unattributed:.2f} s")
    title = f"{name}, run {run.index + 1} (the median): {drawn.seconds:.2f} s to the first token"
    return Group(Text(title, style="bold"), grid)


def markdown(result: BenchResult, notes: Sequence[str] = ()) -> str:
    """The phase table for a README, with machine, verdicts and ratios beneath."""
    above = []
    if is_ablation(result):
        above = [*ablation.markdown_lines(result), "", ablation.NOTE, ""]
    shown = ablation.outline(result) if above else result
    rows = phase_rows(shown)
    names = [f"`{image.reference}`" for image in shown.images]
    lines = [*above, "| phase, seconds | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in rows:
        cells = (_NOTHING if cell is None else " ".join(_cell(cell)).strip() for cell in row.cells)
        name = f"**{row.name}**" if row.name == FIRST_TOKEN_TOTAL else row.name
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"{caption(result)}. {compared(result)} {machine(result)}", ""]
    lines += [f"- {line}" for line in (*verdict_lines(shown), *note_lines(shown), *notes)]
    return "\n".join([*lines, ""])


# Cells


def _cell(summary: Summary) -> tuple[str, str]:
    """The median, and the quartiles where there is more than one run."""
    if summary.count == 1:
        return f"{summary.median:.2f}", ""
    return f"{summary.median:.2f}", f"({summary.low_quartile:.2f}-{summary.high_quartile:.2f})"


def _cells(summaries: Sequence[Summary | None]) -> list[str]:
    """One column's texts, right-aligned in both parts so that the decimal points stand in line."""
    parts = [None if summary is None else _cell(summary) for summary in summaries]
    left, right = (max((len(part[i]) for part in parts if part), default=0) for i in (0, 1))
    gap = " " if right else ""
    return [f"{part[0]:>{left}}{gap}{part[1]:>{right}}" if part else _NOTHING for part in parts]


def caption(result: BenchResult) -> str:
    """What the cells of the table are."""
    several = any(len(result.measured(image.reference)) > 1 for image in result.images)
    spread = "median (quartiles) in seconds" if several else "seconds, of one run"
    overlap = any(waterfall(run).overlaps for run in result.runs if run.ok)
    return f"{spread}; {OVERLAP_NOTE}" if overlap else spread
