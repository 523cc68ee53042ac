"""The Reporter of the CLI, on stderr: rich progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from builder.report import Task

_PLAIN_SECONDS = 10.0


class ConsoleReporter:
    """Steps, notes and progress."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, text: str) -> None:
        self._console.print(f"[bold]{_escape(text)}[/bold]", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"  {_escape(text)}", style="dim", highlight=False, soft_wrap=True)

    def task(self, title: str, total: int | None, unit: str = "bytes") -> AbstractContextManager[Task]:
        if self._console.is_terminal:
            return _live(self._console, title, total, unit)
        return _plain(self, title, total, unit)


def terminal(*, stderr: bool) -> Console:
    """Without emoji: the `:new:` of an image's name is none."""
    return Console(stderr=stderr, emoji=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class _LiveTask:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int) -> None:
        self._progress.advance(self._task, amount)

    def detail(self, text: str) -> None:
        self._progress.update(self._task, detail=text)


@contextmanager
def _live(console: Console, title: str, total: int | None, unit: str) -> Iterator[Task]:
    amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else ()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        *amounts,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
    ) as progress:
        yield _LiveTask(progress, progress.add_task(title, total=total, detail=""))


class _PlainTask:
    """A line at the start, one every ten seconds, one at the end: readable in a CI log."""

    def __init__(self, reporter: ConsoleReporter, title: str, total: int | None, unit: str) -> None:
        self._reporter, self._title, self._total, self._unit = reporter, title, total, unit
        self._done = 0
        self._detail = ""
        self._started = self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        self._say_sometimes()

    def detail(self, text: str) -> None:
        self._detail = text
        self._say_sometimes()

    def _say_sometimes(self) -> None:
        if time.monotonic() - self._said >= _PLAIN_SECONDS:
            self._said = time.monotonic()
            self._reporter.note(f"{self._title}: {self.summary()}")

    def summary(self) -> str:
        seconds = time.monotonic() - self._started
        parts = [self._amount(), self._detail, f"{seconds:.1f} s"]
        return ", ".join(part for part in parts if part)

    def _amount(self) -> str:
        if self._unit != "bytes":
            return f"{self._done}/{self._total} {self._unit}" if self._total else ""
        if not self._done:
            return ""
        of = f" of {self._total / 1e6:.1f}" if self._total else ""
        return f"{self._done / 1e6:.1f}{of} MB"


@contextmanager
def _plain(reporter: ConsoleReporter, title: str, total: int | None, unit: str) -> Iterator[Task]:
    task = _PlainTask(reporter, title, total, unit)
    reporter.note(f"{title} …")
    yield task
    task.detail("")
    reporter.note(f"{title}: {task.summary()}")
