"""BenchResult -> numbers and sentences: what every report says, whatever it looks like. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from statistics import median, median_low

from benchmarks.layout import waterfall
from benchmarks.schema import BenchResult, Machine, Run, State
from benchmarks.stats import (
    MIN_SAMPLES_FOR_95_PERCENT,
    MIN_SAMPLES_FOR_INTERVAL,
    Estimate,
    Summary,
    Verdict,
    judge,
    median_with_interval,
    noise_note,
    outlier_note,
    ratio_of_medians,
    summarize,
)
from runtime.phases import Phase

UNATTRIBUTED = "unattributed"
READY_TOTAL = "ready (total)"
FIRST_TOKEN_TOTAL = "first token (total)"  # noqa: S105 - a row, not a password

_WORDS = {
    None: "time that no phase explains",
    Phase.IMAGE_PULL: "image pull",
    Phase.IMAGE_UNPACK: "image unpacking",
    Phase.CONTAINER_START: "container start",
    Phase.SERVER_BIND: "server start",
    Phase.CONFIG_PARSE: "configuration",
    Phase.ENGINE_IMPORT: "imports",
    Phase.MODEL_DOWNLOAD: "model download",
    Phase.ENGINE_INIT: "engine start",
    Phase.WEIGHT_LOAD: "weight loading",
    Phase.COMPILE: "compilation",
    Phase.KV_CACHE_ALLOC: "KV cache",
    Phase.GRAPH_CAPTURE: "graph capture",
    Phase.TOKENIZER_INIT: "tokenizer",
    Phase.READY: "opening the API",
    Phase.FIRST_TOKEN: "first token",
}
_NEXT_MIN_SHARE = 0.01
_OPTIONS = {"page_cache": "--page-cache", "compile_cache": "--compile-cache", "pulled": "--pull"}
_CACHE = {"cold": "cold", "warm": "warm", "as_is": "not controlled"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the phase table: a summary in seconds per image, None where the image has no such value."""

    name: str
    cells: tuple[Summary | None, ...]


def is_ablation(result: BenchResult) -> bool:
    """Whether it is one image, started with all optimisations and without some: see benchmarks.ablation."""
    return any(image.off for image in result.images)


def short_names(result: BenchResult) -> dict[str, str]:
    """Reference -> name without registry and path, or the whole reference where that would be ambiguous."""
    references = [image.reference for image in result.images]
    split = [reference.partition(" ") for reference in references]  # arguments have paths of their own
    names = [image.rpartition("/")[2] + space + rest for image, space, rest in split]
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


def summary_lines(result: BenchResult) -> list[str]:
    """What was compared, on what machine, how often, what failed, what dominates, the ratios to the first."""
    return [compared(result), machine(result), *verdict_lines(result), *note_lines(result)]


def verdict_lines(result: BenchResult) -> list[str]:
    """Per image what dominates its critical path, then how it compares with the first image."""
    verdicts = [
        f"{name}: {verdict(run)}"
        for reference, name in short_names(result).items()
        if (run := median_run(result, reference))
    ]
    return verdicts if is_ablation(result) else [*verdicts, *_ratio_lines(result)]


def note_lines(result: BenchResult) -> list[str]:
    """Spread, noise, outliers, differing answers, warnings, and what sampling took."""
    return [
        *_image_lines(result),
        *_answer_lines(result),
        *_warning_lines(result),
        *_sampler_lines(result),
    ]


def _sampler_lines(result: BenchResult) -> list[str]:
    took = [run.sampler_cpu_seconds for run in result.runs if run.sampler_cpu_seconds is not None]
    return [f"Sampling resources took {median(took):.2f} CPU seconds a run (median)."] if took else []


def verdict(run: Run) -> str:
    """What dominates the critical path of a run, in one sentence."""
    drawn = waterfall(run)
    (phase, seconds), *others = drawn.shares()
    verb = "are" if phase is Phase.ENGINE_IMPORT else "is"
    share = f"{_WORDS[phase]} {verb} {seconds:.1f} of {drawn.seconds:.1f} s ({seconds / drawn.seconds:.0%})"
    following = [
        f"{_WORDS[other]} {length:.1f} s"
        for other, length in others[:2]
        if length >= _NEXT_MIN_SHARE * drawn.seconds
    ]
    told = f"{share}; next: {', '.join(following)}" if following else share
    return f"{told}; the image reports no phases." if run.phases_from == "client" else f"{told}."


def ratio(result: BenchResult, image: str) -> Estimate | None:
    """Time to the first token over that of the first image; None where either has no measured run."""
    ours, baseline = totals(result, image), totals(result, result.images[0].reference)
    return ratio_of_medians(ours, baseline) if ours and baseline else None


def estimates(result: BenchResult) -> list[Estimate]:
    """What `--until` wants narrow: the ratios to the first image, or the one image's median."""
    first, *others = (image.reference for image in result.images)
    if not others:
        return [median_with_interval(samples)] if (samples := totals(result, first)) else []
    return [found for other in others if (found := ratio(result, other))]


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether an image starts slower than the baseline by more than is allowed, and why that was decided."""

    image: str
    verdict: Verdict
    sentence: str


def decide(result: BenchResult, allowed: float) -> list[Decision]:
    """Each further image against the first, the baseline. Starts in different states decide nothing."""
    names = short_names(result)
    then = result.measured(result.images[0].reference)
    return [
        Decision(
            image.reference,
            *_decided(
                names[image.reference],
                ratio(result, image.reference),
                allowed,
                _difference(result.measured(image.reference), then),
            ),
        )
        for image in result.images[1:]
    ]


def _decided(name: str, found: Estimate | None, allowed: float, difference: str) -> tuple[Verdict, str]:
    if found is not None and difference:
        return Verdict.UNDECIDED, f"{name}: not decided: {difference}."
    if found is None or found.interval is None:
        runs = found.runs if found else 0
        why = f"{_times(runs)} measured on one side; at least {MIN_SAMPLES_FOR_INTERVAL} runs are needed"
        return Verdict.UNDECIDED, f"{name}: not decided: {why}."
    verdict, limit = judge(found, allowed), f"{1 + allowed:.2f}, the baseline and {allowed:.0%}"
    low, high = (f"{end:.2f}" for end in found.interval)
    told = {
        Verdict.REGRESSED: f"REGRESSED: even the low end of the interval, {low}, is above {limit}",
        Verdict.HELD: f"no regression: the high end of the interval, {high}, is not above {limit}",
        Verdict.UNDECIDED: f"not decided: the interval, {low} to {high}, lies on both sides of {limit}; "
        "raise --runs, or pass --until 5%",
    }
    return verdict, f"{name}: {told[verdict]}."


def with_baseline(result: BenchResult, baseline: BenchResult, image: str) -> BenchResult:
    """`result` with one image of an earlier result put first. For reports only: it ran at another time."""
    name = f"{image} (baseline)"
    (facts,) = (replace(found, reference=name) for found in baseline.images if found.reference == image)
    runs = tuple(run.model_copy(update={"image": name}) for run in baseline.runs_of(image))
    return result.model_copy(update={"images": (facts, *result.images), "runs": (*runs, *result.runs)})


def baseline_lines(result: BenchResult, baseline: BenchResult, source: str) -> list[str]:
    """Where a baseline comes from, and what makes it hard to compare."""
    lines = [f"Baseline: {source}, measured {baseline.created:%Y-%m-%d %H:%M} UTC, not in turn."]
    if describe(baseline.machine) != describe(result.machine):
        where = describe(baseline.machine)
        lines.append(f"The baseline ran on another machine ({where}): ratios include the difference.")
    if baseline.workload != result.workload:
        lines.append("The baseline ran another request: ratios of the first token include the difference.")
    if difference := _difference(result.runs, baseline.runs):
        lines.append(f"Not comparable: {difference}.")
    return lines


def _difference(now: Sequence[Run], then: Sequence[Run]) -> str:
    """Between the states that runs found and those of a baseline, with the remedy; empty where they agree."""
    here, there = ({run.state for run in runs} for runs in (now, then))
    options = [
        option
        for name, option in _OPTIONS.items()
        if {getattr(state, name) for state in here} != {getattr(state, name) for state in there}
    ]
    if not options:
        return ""
    return (
        f"the baseline ran with {_states(there)}, these starts with {_states(here)}; "
        f"measure both with the same {' and '.join(options)}"
    )


def median_run(result: BenchResult, image: str) -> Run | None:
    """The run whose total is the median (of an even number, the lower middle); None when none succeeded."""
    totals = {run.order: run.total_seconds for run in result.measured(image) if run.total_seconds is not None}
    if not totals:
        return None
    middle = median_low(totals.values())
    return next(run for run in result.measured(image) if run.total_seconds == middle)


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
    return [run for run in runs if run.phases_from != "client"] or runs


# Sentences


def compared(result: BenchResult) -> str:
    """What was started how often, in one sentence."""
    several = len(result.images) > 1
    counts = [len(result.runs_of(image.reference)) for image in result.images]
    first, *others = (image.reference for image in result.images)
    names = " and ".join((first, *others))
    if is_ablation(result):
        names = f"{first} with all optimisations, and in {len(others)} ways without some"
        counts = sorted(set(counts))
    often = _times(counts[0]) if len(set(counts)) == 1 else f"{' and '.join(map(str, counts))} times"
    started = f"{'each started' if several and len(set(counts)) == 1 else 'started'} {often}"
    one_benchmark = len({run.order for run in result.runs}) == len(result.runs)
    turns = ", in turn" if several and one_benchmark else ""
    failed = f"{len(result.failed)} of {len(result.runs)} runs failed" if result.failed else "none failed"
    states = _states({run.state for run in result.runs} or {State()})
    verb = "Compared" if several else "Measured"
    return f"{verb}: {names}, {started}{turns}; {failed}; {states}."


def _states(states: Set[State]) -> str:
    if len(states) > 1:
        return "caches in differing states"
    (state,) = states
    pulled = ["pulled before each run"] if state.pulled else []
    return ", ".join(
        [f"page cache {_CACHE[state.page_cache]}", f"compile cache {_CACHE[state.compile_cache]}", *pulled]
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def machine(result: BenchResult) -> str:
    return f"Machine: {describe(result.machine)}."


def describe(machine: Machine) -> str:
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    parts = [machine.cpu_model, cores, f"{machine.memory / 2**30:.0f} GiB", machine.platform]
    parts.append(f"kernel {machine.kernel}")
    if machine.docker_engine:
        parts.append(f"Docker Engine {machine.docker_engine}")
    return ", ".join(parts)


def totals(result: BenchResult, image: str) -> list[float]:
    """Seconds to the first token of each measured run of an image."""
    return [run.total_seconds for run in result.measured(image) if run.total_seconds is not None]


def _image_lines(result: BenchResult) -> list[str]:
    lines = []
    for reference, name in short_names(result).items():
        samples = totals(result, reference)
        if not samples:
            lines.append(f"{name}: no run reached its first token.")
            continue
        if len(samples) > 1:
            s = summarize(samples)
            lines.append(f"{name}: total from {s.minimum:.2f} to {s.maximum:.2f} s over {s.count} runs.")
        lines += [f"{name}: {note}" for note in (outlier_note(samples), noise_note(samples)) if note]
    return lines


def _ratio_lines(result: BenchResult) -> list[str]:
    (_, first_name), *others = short_names(result).items()
    return [
        f"{name} takes {found.value:.2f} times as long as {first_name} to the first token "
        f"({interval(found)})."
        for other, name in others
        if (found := ratio(result, other))
    ]


def interval(found: Estimate) -> str:
    """An estimate's interval in words."""
    if found.interval is None:
        return f"fewer than {MIN_SAMPLES_FOR_INTERVAL} runs of each: an interval would not be meaningful"
    low, high = found.interval
    if found.runs < MIN_SAMPLES_FOR_95_PERCENT:
        return f"{low:.2f} to {high:.2f} over all pairs of runs; too few runs for a 95% interval"
    return f"{found.confidence:.0%} bootstrap interval {low:.2f} to {high:.2f}"


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
