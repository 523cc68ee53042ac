"""How to learn the phases of a start from an image: one small module for each kind of image.

An adapter is a module with NAME, `recognises` and `read`; to add one, write it and name it in `adapters`.
The first that recognises an image and can read what it shows is believed; where none does, the client's own
view is what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from benchmarks.client import Reply
from benchmarks.sampler import Process
from benchmarks.schema import MeasuredPhase


@dataclass(frozen=True, slots=True)
class Seen:
    """All that can be seen of one start from outside. Moments are seconds since the Unix epoch.

    created_at: just before the create call; started_at: the engine's start of the first process; ready_at:
    the client's first 200, None if there was none; startup: the answer of GET /startup, unless it was 404 or
    none; log: lines with the moment when the engine received them; processes: of the container, where they
    were sampled.
    """

    labels: Mapping[str, str]
    created_at: float
    started_at: float | None
    ready_at: float | None
    startup: Reply | None
    log: Sequence[tuple[float, str]] = ()
    processes: Sequence[Process] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """started: the first moment of the image's own code; source: who says so."""

    started: float | None
    phases: tuple[MeasuredPhase, ...]
    source: Literal["runtime", "log"]


class Adapter(Protocol):
    NAME: str

    def recognises(self, seen: Seen) -> bool: ...

    def read(self, seen: Seen) -> Report:
        """Raises ValueError, whose text is a warning for the user, when it cannot be read."""


def adapters() -> tuple[Adapter, ...]:
    """In the order in which they are asked."""
    from benchmarks.adapters import coldstart, vllm_log

    return (coldstart, vllm_log)
