"""BenchResult -> one self-contained HTML page: cards, an interactive waterfall, the table, the notes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import ablation
from benchmarks.layout import KINDS, Bar, Segment, Waterfall, ticks, waterfall
from benchmarks.report import caption
from benchmarks.schema import BenchResult, Run
from benchmarks.stats import Estimate, Summary, summarize
from benchmarks.summary import (
    UNATTRIBUTED,
    compared,
    interval,
    is_ablation,
    machine,
    median_run,
    note_lines,
    phase_rows,
    ratio,
    short_names,
    totals,
    verdict,
)
from builder.render import render_page

# Shorter stretches of the critical path could not be seen, hovered or hit.
_SEGMENT_MIN_SHARE = 0.002


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's waterfall. `shown`: before anything is clicked."""

    run: Run
    shown: bool
    drawn: Waterfall
    verdict: str


@dataclass(frozen=True, slots=True)
class _Image:
    name: str
    reference: str
    summary: Summary | None
    ratio: Estimate | None
    interval: str
    verdict: str
    runs: tuple[_Run, ...]


def page(result: BenchResult, notes: Sequence[str] = ()) -> str:
    """HTML text without any reference to another file. `notes`: what else is to be said of the result."""
    shown = ablation.outline(result) if is_ablation(result) else result
    images = [_image(shown, reference, name) for reference, name in short_names(shown).items()]
    lengths = [run.drawn.seconds for image in images for run in image.runs if run.shown]
    most = max((run.drawn.seconds for image in images for run in image.runs), default=0.0)
    all_kinds = list(dict.fromkeys(KINDS.values()))
    seen = {KINDS[bar.phase] for image in images for run in image.runs for bar in _bars(run.drawn)}
    return render_page(
        "bench.html.j2",
        result=result,
        images=images,
        baseline=images[0].name,
        ablation=ablation,
        savings=ablation.page_rows(result) if is_ablation(result) else (),
        scale=max(lengths, default=0.0) or 1.0,
        ticks=ticks(max(lengths, default=0.0)),
        most=most or 1.0,
        kinds=[kind for kind in all_kinds if kind in seen],
        all_kinds=all_kinds,
        rows=phase_rows(shown),
        caption=caption(shown),
        compared=compared(result),
        machine=machine(result),
        notes=[*notes, *note_lines(result)],
        segments=_segments,
        kind=lambda bar: all_kinds.index(KINDS[bar.phase]),
        label=lambda bar: bar.phase.value.replace("_", " ") if bar else UNATTRIBUTED,
        facts=lambda part, drawn: json.dumps(_facts(part, drawn)),
    )


def _image(result: BenchResult, reference: str, name: str) -> _Image:
    samples = totals(result, reference)
    median = median_run(result, reference)
    found = ratio(result, reference) if reference != result.images[0].reference else None
    return _Image(
        name,
        reference,
        summarize(samples) if samples else None,
        found,
        interval(found) if found else "",
        verdict(median) if median else "No run reached its first token.",
        tuple(
            _Run(run, run == median, drawn, verdict(run) if run.ok else f"failed: {run.error}")
            for run in result.runs_of(reference)
            for drawn in [waterfall(run)]
        ),
    )


def _bars(drawn: Waterfall) -> list[Bar]:
    return [bar for lane in drawn.lanes for bar in lane.bars]


def _segments(drawn: Waterfall) -> list[Segment]:
    return [part for part in drawn.path if part.seconds >= _SEGMENT_MIN_SHARE * drawn.seconds]


def _facts(part: Bar | Segment, drawn: Waterfall) -> list[tuple[str, str]]:
    """What is told of a bar or of a stretch of the critical path, line by line."""
    bar = part.bar if isinstance(part, Segment) else part
    facts = [
        ("phase", bar.phase.value if bar else UNATTRIBUTED),
        ("process", f"{bar.process}, pid {bar.pid}" if bar else "none that reported a phase"),
        ("from, to", f"{part.start:.3f} s to {part.end:.3f} s"),
        ("took", f"{part.seconds:.3f} s, {part.seconds / drawn.seconds:.1%} of the start"),
    ]
    if bar is None:
        return facts
    critical = sum(segment.seconds for segment in drawn.path if segment.bar == bar)
    facts.append(("critical path", f"{critical:.3f} s of it" if critical else "not on it"))
    if bar.detail:
        facts.append(("detail", bar.detail))
    if bar.resources:
        used = bar.resources.model_dump(exclude_none=True)
        facts += [(name.replace("_", " "), f"{value:,}") for name, value in used.items()]
    return facts
