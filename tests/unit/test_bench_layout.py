"""Lanes and critical path of waterfalls whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.layout import Waterfall, ticks, waterfall
from benchmarks.schema import MeasuredPhase, Run
from runtime.phases import Phase, covered_seconds

T0 = 1000.0
IMPORT, WEIGHTS, TOKENIZER, START = (
    Phase.ENGINE_IMPORT,
    Phase.WEIGHT_LOAD,
    Phase.TOKENIZER_INIT,
    Phase.CONTAINER_START,
)


def event(phase: Phase, start: float, end: float, process: str = "api", pid: int = 1) -> MeasuredPhase:
    return MeasuredPhase(phase, T0 + start, T0 + end, process, pid)


def drawn(seconds: float, *events: MeasuredPhase) -> Waterfall:
    return waterfall(
        Run(
            image="a",
            index=0,
            order=0,
            ok=True,
            created_at=T0,
            ready_seconds=seconds,
            total_seconds=seconds,
            unattributed_seconds=0,
            phases=events,
        )
    )


def path(seconds: float, *events: MeasuredPhase) -> list[tuple[Phase | None, float, float]]:
    return [(s.bar.phase if s.bar else None, s.start, s.end) for s in drawn(seconds, *events).path]


def test_one_after_the_other_all_is_critical() -> None:
    assert path(3, event(START, 0, 1), event(IMPORT, 1, 3)) == [(START, 0, 1), (IMPORT, 1, 3)]


def test_what_ended_early_beside_something_longer_is_not_critical() -> None:
    found = path(
        5, event(START, 0, 1), event(TOKENIZER, 1, 2), event(IMPORT, 1, 4, "b"), event(WEIGHTS, 4, 5)
    )
    assert found == [(START, 0, 1), (IMPORT, 1, 4), (WEIGHTS, 4, 5)]


def test_what_still_ran_when_the_next_began_is_critical_only_until_then() -> None:
    found = path(4, event(START, 0, 1), event(IMPORT, 1, 3), event(WEIGHTS, 2, 4, "b"))
    assert found == [(START, 0, 1), (IMPORT, 1, 2), (WEIGHTS, 2, 4)]


def test_what_runs_in_the_background_throughout_had_time_to_spare() -> None:
    background = event(WEIGHTS, 0, 4, "prefetch", 9)
    assert path(4, background, event(START, 0, 1), event(IMPORT, 1, 4)) == [(START, 0, 1), (IMPORT, 1, 4)]


def test_of_nested_phases_the_inner_is_critical_and_the_outer_around_it() -> None:
    found = path(4, event(IMPORT, 0, 4), event(TOKENIZER, 2, 4))
    assert found == [(IMPORT, 0, 2), (TOKENIZER, 2, 4)]


def test_gaps_are_unattributed_at_both_ends_and_in_between() -> None:
    found = path(6, event(IMPORT, 1, 2), event(WEIGHTS, 3, 4))
    assert found == [(None, 0, 1), (IMPORT, 1, 2), (None, 2, 3), (WEIGHTS, 3, 4), (None, 4, 6)]


def test_a_moment_claims_no_time() -> None:
    assert path(2, event(Phase.READY, 1, 1)) == [(None, 0, 2)]


def test_a_run_without_phases_is_unattributed() -> None:
    assert path(2) == [(None, 0, 2)]


def test_shares_sum_a_phase_over_its_stretches_and_rank_them() -> None:
    shares = drawn(6, event(IMPORT, 0, 2), event(WEIGHTS, 2, 3), event(IMPORT, 3, 4)).shares()
    assert shares == [(IMPORT, 3), (None, 2), (WEIGHTS, 1)]


phases = st.lists(
    st.builds(
        lambda phase, a, b, pid: event(phase, min(a, b), max(a, b), "p", pid),
        st.sampled_from([START, IMPORT, WEIGHTS, TOKENIZER]),
        st.integers(-2, 12),
        st.integers(-2, 12),
        st.integers(1, 3),
    ),
    max_size=12,
)


@given(phases)
def test_the_path_tiles_the_run_and_leaves_unattributed_just_what_no_phase_covers(
    events: list[MeasuredPhase],
) -> None:
    found = drawn(10, *events)
    edges = [0.0, *(segment.end for segment in found.path)]
    assert [segment.start for segment in found.path] == edges[:-1]
    assert edges[-1] == 10
    nobody = sum(segment.seconds for segment in found.path if segment.bar is None)
    assert nobody == pytest.approx(10 - covered_seconds(events, T0, T0 + 10))


@given(phases)
def test_bars_of_one_row_never_overlap(events: list[MeasuredPhase]) -> None:
    for lane in drawn(10, *events).lanes:
        for row in range(lane.rows):
            bars = sorted((bar for bar in lane.bars if bar.row == row), key=lambda bar: (bar.start, bar.end))
            assert all(a.end <= b.start for a, b in pairwise(bars))


def test_the_same_phase_in_three_processes_is_three_bars_in_three_lanes() -> None:
    found = drawn(
        9, *(event(IMPORT, 3 * i, 3 * i + 3, name, i) for i, name in enumerate(("api", "core", "worker")))
    )
    assert [(lane.process, len(lane.bars), lane.rows) for lane in found.lanes] == [
        ("api", 1, 1),
        ("core", 1, 1),
        ("worker", 1, 1),
    ]


def test_two_processes_of_one_name_are_two_lanes() -> None:
    found = drawn(4, event(IMPORT, 0, 2, "worker", 1), event(IMPORT, 1, 3, "worker", 2))
    assert [(lane.process, lane.pid) for lane in found.lanes] == [("worker", 1), ("worker", 2)]


def test_what_happened_before_this_start_is_left_out() -> None:
    found = drawn(2, event(IMPORT, -9, -5), event(START, 0, 2))
    assert [bar.phase for lane in found.lanes for bar in lane.bars] == [START]


def test_a_failed_run_without_events_is_empty() -> None:
    found = waterfall(Run(image="a", index=0, order=0, ok=False, error="No.", created_at=T0))
    assert (found.seconds, found.lanes, found.path) == (0, (), ())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, [0]),
        (0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (24, [0, 5, 10, 15, 20]),
    ],
)
def test_ticks_are_round_and_few(seconds: float, expected: list[float]) -> None:
    assert ticks(seconds) == pytest.approx(expected)
