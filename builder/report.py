"""How long work tells the user what it does. The CLI implements it; nothing else prints."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    def advance(self, amount: int) -> None:
        """`amount` more bytes or items are done."""

    def detail(self, text: str) -> None:
        """What is being done right now, in a few words."""


class Reporter(Protocol):
    def step(self, text: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """A fact worth knowing: a choice made, a cache hit."""

    def task(self, title: str, total: int | None, unit: str = "bytes") -> AbstractContextManager[Task]:
        """Live progress. `total` is None when unknown; `unit` is "bytes" or a plural noun."""


class _SilentTask:
    def advance(self, amount: int) -> None: ...

    def detail(self, text: str) -> None: ...


class SilentReporter:
    """For tests and library use."""

    def step(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def task(self, title: str, total: int | None, unit: str = "bytes") -> AbstractContextManager[Task]:  # noqa: ARG002
        return nullcontext(_SilentTask())
