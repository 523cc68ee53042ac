"""BenchResult -> what is shown: pure functions to rich renderables and Markdown, nothing printed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.schema import BenchResult, Machine, Run
from benchmarks.stats import (
    MIN_SAMPLES_FOR_95_PERCENT,
    MIN_SAMPLES_FOR_INTERVAL,
    Estimate,
    Summary,
    outlier_note,
    ratio_of_medians,
    summarize,
)
from runtime.phases import Phase, PhaseEvent

UNATTRIBUTED = "unattributed"
READY_TOTAL = "ready (total)"
FIRST_TOKEN_TOTAL = "first token (total)"  # noqa: S105 - a row, not a password
OVERLAP_NOTE = "phases overlap; they do not add up"

_LOG_LINES_SHOWN = 5
_OVERLAP_SECONDS = 0.001
_POINT_SHARE = 0.005
_CACHE = {"cold": "cold", "warm": "warm", "as_is": "not controlled"}
_NOTHING = "–"  # noqa: RUF001 - typography, in a cell of its own


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the phase table: a summary in seconds per image, None where the image has no such value."""

    name: str
    cells: tuple[Summary | None, ...]


def comparison(result: BenchResult) -> RenderableType:
    """Everything that `coldstart bench` shows at the end."""
    names = short_names(result)
    parts: list[RenderableType] = [phase_table(result)]
    parts += [Text(line) for line in summary_lines(result)]
    for image in result.images:
        run = median_run(result, image.reference)
        if run is not None:
            parts += [Text(), waterfall(run, names[image.reference])]
    if result.failed:
        parts += [Text(), failures(result)]
    return Group(*parts)


def short_names(result: BenchResult) -> dict[str, str]:
    """Reference -> name without registry and path, or the whole reference where that would be ambiguous."""
    references = [image.reference for image in result.images]
    names = [reference.rpartition("/")[2] for reference in references]
    distinct = len(set(names)) == len(names)
    return dict(zip(references, names if distinct else references, strict=True))


def phase_rows(result: BenchResult) -> list[Row]:
    """The numbers of the table, in Phase order, then what no phase explains, then the totals."""
    measured = [result.measured(image.reference) for image in result.images]
    rows = [
        _row(phase.value, (_phase_samples(runs, phase) for runs in measured))
        for phase in Phase
        if _has_row(measured, phase)
    ]
    unattributed = ([run.unattributed_seconds for run in _with_known_phases(runs)] for runs in measured)
    ready = ([run.ready_seconds for run in runs] for runs in measured)
    total = ([run.total_seconds for run in runs] for runs in measured)
    return [*rows, _row(UNATTRIBUTED, unattributed), _row(READY_TOTAL, ready), _row(FIRST_TOKEN_TOTAL, total)]


def phase_table(result: BenchResult) -> Table:
    """Rows are phases, columns are images, cells are the median and the middle half of the runs."""
    table = Table(box=box.SIMPLE_HEAD, caption=Text(_caption(result)), caption_justify="left", pad_edge=False)
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


def summary_lines(result: BenchResult) -> list[str]:
    """What was compared, on what machine, how often, what failed, and the ratios to the first image."""
    lines = [_compared(result), _machine(result.machine), *_image_lines(result), *_ratio_lines(result)]
    return [*lines, *_answer_lines(result), *_warning_lines(result)]


def failures(result: BenchResult) -> RenderableType:
    """Each failed run with its reason and the end of its log."""
    lines: list[Text] = []
    for run in result.failed:
        lines.append(Text(f"{run.image}, run {run.index + 1} failed: {run.error}", style="red"))
        lines += [Text(f"  {line}", style="dim") for line in run.log_tail.splitlines()[-_LOG_LINES_SHOWN:]]
    return Group(*lines)


def median_run(result: BenchResult, image: str) -> Run | None:
    """The run whose total is the median (of an even number, the lower middle); None when none succeeded."""
    totals = {run.order: run.total_seconds for run in result.measured(image) if run.total_seconds is not None}
    if not totals:
        return None
    middle = median_low(totals.values())
    return next(run for run in result.measured(image) if run.total_seconds == middle)


def waterfall(run: Run, name: str) -> RenderableType:
    """One bar per event from the create call to the first token, as wide as the console allows."""
    total = run.end - run.created_at
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    for event in run.phases:
        begin, end = _clipped(event, run)
        if end < begin:  # outside of this start, such as before a snapshot was taken
            continue
        # A moment is drawn as wide as can be seen, and told by when, not by how long.
        left, right = (
            min(begin, total * (1 - _POINT_SHARE)),
            min(max(end, begin + total * _POINT_SHARE), total),
        )
        length = f"{end - begin:.2f} s" if end > begin else f"at {begin:.2f} s"
        label = Text.assemble(event.phase.value, (f" {event.process}", "dim"))
        grid.add_row(label, Bar(total, left, right, color="cyan"), length)
    if run.unattributed_seconds is not None:
        grid.add_row(Text(UNATTRIBUTED, style="dim"), "", f"{run.unattributed_seconds:.2f} s")
    title = f"{name}, run {run.index + 1} (the median): {total:.2f} s to the first token"
    return Group(Text(title, style="bold"), grid)


def markdown_table(result: BenchResult) -> str:
    """The phase table for a README, with the machine beneath."""
    rows = phase_rows(result)
    names = [f"`{image.reference}`" for image in result.images]
    lines = ["| phase, seconds | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in rows:
        cells = (_NOTHING if cell is None else " ".join(_cell(cell)).strip() for cell in row.cells)
        name = f"**{row.name}**" if row.name == FIRST_TOKEN_TOTAL else row.name
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"{_caption(result)}. {_compared(result)} {_machine(result.machine)}", ""]
    return "\n".join(lines)


# Rows


def _has_row(measured: Sequence[Sequence[Run]], phase: Phase) -> bool:
    events = [event for runs in measured for run in runs for event in run.phases if event.phase == phase]
    if phase is Phase.READY:
        # Usually a moment: "ready (total)" says when, and a row of zeros would say nothing.
        return any(event.seconds > 0 for event in events)
    return bool(events)


def _phase_samples(runs: Sequence[Run], phase: Phase) -> list[float]:
    """A phase that only some runs of an image have took no time in the others."""
    known = runs if phase is Phase.FIRST_TOKEN else _with_known_phases(runs)
    occurs = any(event.phase == phase for run in known for event in run.phases)
    return [run.seconds_in(phase) for run in known] if occurs else []


def _row(name: str, samples_per_image: Iterable[Sequence[float | None]]) -> Row:
    cells = []
    for samples in samples_per_image:
        present = [sample for sample in samples if sample is not None]
        cells.append(summarize(present) if present else None)
    return Row(name, tuple(cells))


def _with_known_phases(runs: Sequence[Run]) -> Sequence[Run]:
    """A run whose phases could not be read says nothing about phases, unless its image never reports any."""
    return [run for run in runs if run.phases_from == "runtime"] or runs


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


def _caption(result: BenchResult) -> str:
    several = any(len(result.measured(image.reference)) > 1 for image in result.images)
    spread = "median (quartiles) in seconds" if several else "seconds, of one run"
    overlap = any(_overlaps(run) for run in result.runs if run.ok)
    return f"{spread}; {OVERLAP_NOTE}" if overlap else spread


def _overlaps(run: Run) -> bool:
    """Whether the phases sum to more than the time that they cover."""
    if run.total_seconds is None or run.unattributed_seconds is None:
        return False
    stretches = (_clipped(event, run) for event in run.phases)
    summed = sum(max(0.0, end - begin) for begin, end in stretches)
    return summed > run.total_seconds - run.unattributed_seconds + _OVERLAP_SECONDS


def _clipped(event: PhaseEvent, run: Run) -> tuple[float, float]:
    """Start and end in seconds since the create call, within the run; end < start when it is outside."""
    return max(event.start, run.created_at) - run.created_at, min(event.end, run.end) - run.created_at


# Sentences


def _compared(result: BenchResult) -> str:
    several = len(result.images) > 1
    names = " and ".join(image.reference for image in result.images)
    started = f"{'each started' if several else 'started'} {_times(result.runs_per_image)}"
    turns = ", in turn" if several else ""
    failed = f"{len(result.failed)} of {len(result.runs)} runs failed" if result.failed else "none failed"
    verb = "Compared" if several else "Measured"
    return f"{verb}: {names}, {started}{turns}; {failed}; {_state(result)}."


def _state(result: BenchResult) -> str:
    states = {run.state for run in result.runs}
    if len(states) != 1:
        return "caches in differing states"
    (state,) = states
    pulled = ["pulled before each run"] if state.pulled else []
    return ", ".join(
        [f"page cache {_CACHE[state.page_cache]}", f"compile cache {_CACHE[state.compile_cache]}", *pulled]
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _machine(machine: Machine) -> str:
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    parts = [machine.cpu_model, cores, f"{machine.memory / 2**30:.0f} GiB", machine.platform]
    parts.append(f"kernel {machine.kernel}")
    if machine.docker_engine:
        parts.append(f"Docker Engine {machine.docker_engine}")
    return f"Machine: {', '.join(parts)}."


def _totals(result: BenchResult, image: str) -> list[float]:
    return [run.total_seconds for run in result.measured(image) if run.total_seconds is not None]


def _image_lines(result: BenchResult) -> list[str]:
    lines = []
    for reference, name in short_names(result).items():
        totals = _totals(result, reference)
        if not totals:
            lines.append(f"{name}: no run reached its first token.")
            continue
        if len(totals) > 1:
            s = summarize(totals)
            lines.append(f"{name}: total from {s.minimum:.2f} to {s.maximum:.2f} s over {s.count} runs.")
        note = outlier_note(totals)
        if note:
            lines.append(f"{name}: {note}")
    return lines


def _ratio_lines(result: BenchResult) -> list[str]:
    (first, first_name), *others = short_names(result).items()
    baseline = _totals(result, first)
    lines = []
    for other, name in others:
        totals = _totals(result, other)
        if baseline and totals:
            ratio = ratio_of_medians(totals, baseline)
            interval = _interval(ratio, min(len(totals), len(baseline)))
            longer = f"{name} takes {ratio.value:.2f} times as long as {first_name} to the first token"
            lines.append(f"{longer} ({interval}).")
    return lines


def _interval(ratio: Estimate, fewest: int) -> str:
    if ratio.interval is None:
        return f"fewer than {MIN_SAMPLES_FOR_INTERVAL} runs of each: an interval would not be meaningful"
    low, high = ratio.interval
    text = f"{ratio.confidence:.0%} bootstrap interval {low:.2f} to {high:.2f}"
    if fewest < MIN_SAMPLES_FOR_95_PERCENT:
        text += f"; with fewer than {MIN_SAMPLES_FOR_95_PERCENT} runs it is narrower than it should be"
    return text


def _answer_lines(result: BenchResult) -> list[str]:
    answers = {
        image.reference: {run.answer for run in result.measured(image.reference)} for image in result.images
    }
    unsteady = [name for name, texts in answers.items() if len(texts) > 1]
    if unsteady:
        return [f"Answers to the same greedy request differ between runs of {' and '.join(unsteady)}."]
    given = [texts for texts in answers.values() if texts]
    if len(given) < 2:
        return []
    same = len(set.union(*given)) == 1
    return [
        f"The images give {'the same answer' if same else 'different answers'} to the same greedy request."
    ]


def _warning_lines(result: BenchResult) -> list[str]:
    seen: dict[str, list[int]] = {}
    for run in result.runs:
        for warning in run.warnings if run.ok else ():
            seen.setdefault(f"{run.image}: {warning}", []).append(run.index + 1)
    return [f"{text} (run {', '.join(map(str, numbers))})." for text, numbers in seen.items()]
