"""A benchmark as it goes, on a terminal: phases fill up; finished runs are noted above."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmarks.layout import KINDS
from benchmarks.schema import MeasuredPhase, Run
from builder.report import Task
from runtime.phases import Phase, now

_TOUCHING_SECONDS = 0.001
_REFRESH_PER_SECOND = 4  # drawing costs CPU that the start under test needs


class LiveView:
    """Implements builder.report.Reporter and benchmarks.harness.Watcher. `clock`: epoch seconds."""

    follows_log = True

    def __init__(self, console: Console, clock: Callable[[], float] = now) -> None:
        self._console, self._clock = console, clock
        self._done, self._total, self._detail = 0, 0, ""
        self._runs: list[Run] = []
        self._image, self._began = "", clock()
        self._ended: float | None = None
        self._seen: list[tuple[Phase, float, float]] = []

    # Reporter

    def step(self, text: str) -> None:
        self._console.print(Text(text, style="bold"), soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(Text(f"  {text}", style="dim"), soft_wrap=True)

    def task(self, title: str, total: int | None, unit: str = "bytes") -> AbstractContextManager[Task]:  # noqa: ARG002
        self._total = total or 0
        return self._live()

    @contextmanager
    def _live(self) -> Iterator[Task]:
        with Live(
            get_renderable=self.render,
            console=self._console,
            refresh_per_second=_REFRESH_PER_SECOND,
            transient=True,
        ):
            yield self

    def advance(self, amount: int) -> None:
        self._done += amount

    def detail(self, text: str) -> None:
        self._detail = text

    # Watcher

    def begin(self, image: str) -> None:
        self._image, self._began, self._ended, self._seen = image, self._clock(), None, []

    def poll(self, phase: Phase | None) -> None:
        at = self._clock() - self._began
        if phase is None:
            return
        if self._seen and self._seen[-1][0] == phase:
            self._seen[-1] = (phase, self._seen[-1][1], at)
        else:
            self._seen.append((phase, self._seen[-1][2] if self._seen else at, at))

    def follow(self, phases: Sequence[MeasuredPhase]) -> None:
        """A row for each stretch in which any process was in a phase."""
        rows: list[tuple[Phase, float, float]] = []
        for event in sorted(phases, key=lambda event: event.start):
            start, end = (max(0.0, at - self._began) for at in (event.start, event.end))
            same = next((i for i, row in reversed([*enumerate(rows)]) if row[0] == event.phase), None)
            if same is not None and start <= rows[same][2] + _TOUCHING_SECONDS:
                rows[same] = (event.phase, rows[same][1], max(end, rows[same][2]))
            else:
                rows.append((event.phase, start, end))
        self._seen = rows

    def answered(self) -> None:
        self._ended = self._clock()

    def end(self, run: Run) -> None:
        self._runs.append(run)
        self._image = ""

    def render(self) -> RenderableType:
        """What stands on the terminal now."""
        lines: list[RenderableType] = [
            Text(f"{self._done} of {self._total} runs; {self._detail}", style="bold")
        ]
        if self._image:
            lines.append(self._running())
        return Group(*lines)

    def _running(self) -> RenderableType:
        """Bars on the scale of the slowest start of this image so far."""
        elapsed = (self._ended or self._clock()) - self._began
        known = [run.total_seconds for run in self._runs if run.image == self._image and run.total_seconds]
        scale = max([elapsed, 1.0, *known])
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_row(Text(self._image), Bar(scale, 0, elapsed, color="bright_black"), f"{elapsed:.1f} s")
        for phase, start, end in self._seen:
            bar = Bar(scale, start, end, color=KINDS[phase].dark)
            grid.add_row(Text(f"  {phase.value}"), bar, f"{end - start:.1f} s")
        return grid
