"""A run -> lanes, bars and critical path, in seconds since it began. Pure; terminal, SVG and HTML draw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from benchmarks.schema import MeasuredPhase, Resources, Run
from runtime.phases import Phase

_OVERLAP_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Kind:
    """Phases that share a colour: in light, in dark."""

    name: str
    light: str
    dark: str


_CONTAINER = Kind("container, configuration", "#98a2b3", "#7c8799")
_ENGINE = Kind("engine", "#f0a83c", "#c9862a")
_IMAGE = Kind("image pull", "#a594e0", "#8574c9")
_WEIGHTS = Kind("weights", "#35b58a", "#2a9570")
_COMPILE = Kind("compile, capture", "#ea7a70", "#cc5c53")
_SERVING = Kind("ready, first token", "#e57fb5", "#c2609a")
KINDS = {
    Phase.IMAGE_PULL: _IMAGE,
    Phase.IMAGE_UNPACK: _IMAGE,
    Phase.CONTAINER_START: _CONTAINER,
    Phase.SERVER_BIND: _CONTAINER,
    Phase.CONFIG_PARSE: _CONTAINER,
    Phase.ENGINE_IMPORT: Kind("imports", "#5b9bf0", "#4481d6"),
    Phase.MODEL_DOWNLOAD: _WEIGHTS,
    Phase.ENGINE_INIT: _ENGINE,
    Phase.WEIGHT_LOAD: _WEIGHTS,
    Phase.COMPILE: _COMPILE,
    Phase.KV_CACHE_ALLOC: _ENGINE,
    Phase.GRAPH_CAPTURE: _COMPILE,
    Phase.TOKENIZER_INIT: Kind("tokenizer", "#4bb9cc", "#359bad"),
    Phase.READY: _SERVING,
    Phase.FIRST_TOKEN: _SERVING,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One phase of one process. start, end: seconds within the run; row: within its lane, from 0."""

    phase: Phase
    process: str
    pid: int
    start: float
    end: float
    row: int
    detail: str
    resources: Resources | None

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Lane:
    """What one process did; bars that overlap lie in different rows."""

    process: str
    pid: int
    bars: tuple[Bar, ...]

    @property
    def rows(self) -> int:
        return 1 + max(bar.row for bar in self.bars)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the critical path; `bar` is None where no phase explains the time."""

    start: float
    end: float
    bar: Bar | None

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Waterfall:
    """A whole run. `path` tiles [0, seconds] without gap or overlap."""

    run: Run
    seconds: float
    lanes: tuple[Lane, ...]
    path: tuple[Segment, ...]

    @property
    def critical(self) -> frozenset[Bar]:
        return frozenset(segment.bar for segment in self.path if segment.bar)

    @property
    def overlaps(self) -> bool:
        """Whether the phases sum to more than the time that they cover."""
        summed = sum(bar.seconds for lane in self.lanes for bar in lane.bars)
        covered = sum(segment.seconds for segment in self.path if segment.bar)
        return summed > covered + _OVERLAP_SECONDS

    def shares(self) -> list[tuple[Phase | None, float]]:
        """Seconds of the critical path by phase, None for unattributed, the longest first."""
        seconds: dict[Phase | None, float] = {}
        for segment in self.path:
            phase = segment.bar.phase if segment.bar else None
            seconds[phase] = seconds.get(phase, 0.0) + segment.seconds
        return sorted(seconds.items(), key=lambda item: -item[1])


def waterfall(run: Run) -> Waterfall:
    """What lies outside of this start, such as before a snapshot was taken, is left out."""
    origin = run.created_at
    seconds = _rounded(run.end - origin)
    inside = [event for event in run.phases if event.end >= origin and event.start <= run.end]
    inside.sort(key=lambda event: (event.start, event.end))
    first_seen = {(event.process, event.pid): i for i, event in reversed(list(enumerate(inside)))}
    by_process = sorted(inside, key=lambda event: first_seen[event.process, event.pid])
    lanes = tuple(
        Lane(process, pid, _pack(list(events), origin, seconds))
        for (process, pid), events in groupby(by_process, key=lambda event: (event.process, event.pid))
    )
    return Waterfall(
        run, seconds, lanes, critical_path([bar for lane in lanes for bar in lane.bars], seconds)
    )


def _pack(events: Sequence[MeasuredPhase], origin: float, seconds: float) -> tuple[Bar, ...]:
    """Each bar in the first row that is free when it starts."""
    ends: list[float] = []
    bars = []
    for event in events:
        start, end = (min(max(_rounded(at - origin), 0.0), seconds) for at in (event.start, event.end))
        row = next((i for i, free in enumerate(ends) if free <= start), len(ends))
        ends[row : row + 1] = [end]
        bars.append(
            Bar(event.phase, event.process, event.pid, start, end, row, event.detail, event.resources)
        )
    return tuple(bars)


def _rounded(seconds: float) -> float:
    """Differences of moments since the epoch are exact to about a microsecond only."""
    return round(seconds, 5)


def critical_path(bars: Sequence[Bar], seconds: float) -> tuple[Segment, ...]:
    """What the end of the run waited for, by walking back from it; each instant belongs to one bar or none.

    Of the bars that run just before an instant, the one that ends first is taken: later work can have waited
    for it, whereas one that runs on has time to spare. Of bars that end together it is the one that began
    last, the inner of two nested ones. The walk goes on where the bar began; where no bar runs, at the last
    end before, and the time between is nobody's.
    """
    path: list[Segment] = []
    at = seconds
    while at > 0:
        running = [bar for bar in bars if bar.start < at <= bar.end]
        bar = min(running, key=lambda bar: (bar.end, -bar.start)) if running else None
        start = bar.start if bar else max((b.end for b in bars if b.start < b.end < at), default=0.0)
        path.append(Segment(start, at, bar))
        at = start
    return tuple(reversed(path))


def ticks(seconds: float, most: int = 8) -> list[float]:
    """Round moments from 0 to `seconds`, at most `most` steps apart by 1, 2 or 5 times a power of ten."""
    if seconds <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(seconds / most))
    step = next(power * m for m in (1, 2, 5, 10) if seconds <= power * m * most)
    return [step * i for i in range(math.floor(seconds / step) + 1)]
