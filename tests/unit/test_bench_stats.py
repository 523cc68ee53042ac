from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.stats import (
    Estimate,
    Verdict,
    judge,
    median_with_interval,
    noise_note,
    outlier_note,
    outliers,
    precise_enough,
    ratio_of_medians,
    summarize,
)

seconds = st.floats(min_value=0.01, max_value=1000, allow_nan=False)
samples = st.lists(seconds, min_size=1, max_size=12)
enough = st.lists(seconds, min_size=3, max_size=8)


def test_summary_of_four_samples_by_hand() -> None:
    s = summarize([4.0, 1.0, 3.0, 2.0])
    assert (s.count, s.minimum, s.maximum) == (4, 1.0, 4.0)
    assert (s.low_quartile, s.median, s.high_quartile) == (1.75, 2.5, 3.25)
    assert s.iqr == 1.5


def test_one_slow_run_does_not_move_the_median() -> None:
    assert summarize([1.0, 2.0, 3.0]).median == summarize([1.0, 2.0, 900.0]).median == 2.0


def test_one_sample_has_no_spread() -> None:
    s = summarize([2.5])
    assert (s.median, s.low_quartile, s.high_quartile, s.iqr) == (2.5, 2.5, 2.5, 0.0)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


@given(samples)
def test_quartiles_are_ordered_within_the_range(values: list[float]) -> None:
    s = summarize(values)
    slack = 1e-9 * s.maximum
    ordered = [s.minimum, s.low_quartile, s.median, s.high_quartile, s.maximum]
    assert all(a <= b + slack for a, b in pairwise(ordered))


@given(samples)
def test_the_order_of_runs_does_not_matter_to_the_summary(values: list[float]) -> None:
    assert summarize(values) == summarize(sorted(values))


def test_ratio_of_medians_by_hand() -> None:
    assert ratio_of_medians([1.0, 2.0, 9.0], [3.0, 4.0, 5.0]).value == 0.5


def test_interval_of_constant_samples_is_the_ratio() -> None:
    assert ratio_of_medians([1.0] * 5, [4.0] * 5).interval == (0.25, 0.25)


@pytest.mark.parametrize(("left", "right"), [(2, 5), (5, 2), (1, 1)])
def test_fewer_than_three_runs_of_either_have_no_interval(left: int, right: int) -> None:
    assert ratio_of_medians([1.0] * left, [2.0] * right).interval is None


def test_interval_is_wider_when_runs_scatter_more() -> None:
    def width(values: list[float]) -> float:
        interval = ratio_of_medians(values, [10.0] * 7).interval
        assert interval is not None
        return interval[1] - interval[0]

    assert width([9.9, 9.95, 10, 10, 10, 10.05, 10.1]) < width([5, 6, 9, 10, 11, 14, 15])


def test_interval_repeats_for_the_same_samples_and_differs_by_seed() -> None:
    a, b = [1.0, 1.1, 1.4, 1.9, 2.5, 2.6], [3.0, 3.3, 3.9, 4.1, 5.2, 6.3]
    assert ratio_of_medians(a, b) == ratio_of_medians(a, b)
    assert ratio_of_medians(a, b, resamples=50) != ratio_of_medians(a, b, resamples=50, seed=1)


@given(enough, enough)
@settings(max_examples=40, deadline=None)
def test_interval_holds_the_ratio_and_stays_within_what_was_measured(a: list[float], b: list[float]) -> None:
    ratio = ratio_of_medians(a, b, resamples=200)
    assert ratio.interval is not None
    low, high = ratio.interval
    assert low <= ratio.value <= high
    assert min(a) / max(b) <= low * (1 + 1e-9)
    assert high <= max(a) / min(b) * (1 + 1e-9)


@given(enough, enough, st.sampled_from([0.5, 2.0, 8.0]))
@settings(max_examples=30, deadline=None)
def test_ratio_does_not_depend_on_the_unit(a: list[float], b: list[float], unit: float) -> None:
    plain = ratio_of_medians(a, b, resamples=50)
    scaled = ratio_of_medians([x * unit for x in a], [x * unit for x in b], resamples=50)
    assert math.isclose(plain.value, scaled.value)
    assert plain.interval == pytest.approx(scaled.interval)


@pytest.mark.parametrize("bad", [[], [0.0, 1.0], [-1.0], [math.nan], [math.inf]])
def test_ratio_refuses_what_is_no_duration(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite, positive"):
        ratio_of_medians(bad, [1.0])
    with pytest.raises(ValueError, match="finite, positive"):
        ratio_of_medians([1.0], bad)


def test_ratio_refuses_a_confidence_of_one() -> None:
    with pytest.raises(ValueError, match="confidence"):
        ratio_of_medians([1.0], [1.0], confidence=1.0)


def test_a_slow_first_run_is_explained_by_the_page_cache() -> None:
    note = outlier_note([30.0, 10.0, 10.1, 9.9])
    assert note is not None
    assert "page cache" in note
    assert "30.00 s" in note


def test_a_slow_later_run_is_named_with_a_remedy() -> None:
    note = outlier_note([10.0, 10.1, 30.0, 9.9])
    assert note is not None
    assert "30.00 s (measured run 3)" in note
    assert "measure again" in note


@pytest.mark.parametrize(
    "calm",
    [[], [1.0], [1.0, 9.0], [10.0, 10.5, 9.6, 10.2], [10.0, 10.0, 10.0, 10.4]],
    ids=["none", "one", "two", "noise", "equal but for 4 %"],
)
def test_ordinary_noise_is_no_outlier(calm: list[float]) -> None:
    assert outliers(calm) == ()
    assert outlier_note(calm) is None


def test_a_far_run_among_equal_ones_is_an_outlier() -> None:
    assert outliers([10.0, 10.0, 10.0, 20.0]) == (3,)


def test_interval_of_three_to_five_runs_is_all_that_was_seen() -> None:
    found = ratio_of_medians([8.0, 10.0, 12.0], [4.0, 5.0, 6.0, 5.0])
    assert (found.value, found.runs) == (2.0, 3)
    assert found.interval == (8 / 6, 12 / 4)


def test_interval_of_many_runs_is_narrower_than_all_that_was_seen() -> None:
    a = [9.0, 9.8, 9.9, 10.0, 10.0, 10.1, 10.2, 11.0]
    interval = ratio_of_medians(a, a).interval
    assert interval is not None
    assert 9 / 11 < interval[0] < 1 < interval[1] < 11 / 9


def test_median_with_interval_is_in_the_unit_of_the_samples() -> None:
    found = median_with_interval([9.0, 10.0, 11.0])
    assert (found.value, found.interval) == (10.0, (9.0, 11.0))
    assert found.half_width == 0.1


def test_an_interval_is_as_wide_as_its_wider_side() -> None:
    assert Estimate(1.0, (0.99, 1.08), 0.95, 9).half_width == pytest.approx(0.08)
    assert Estimate(2.0, (1.84, 2.02), 0.95, 9).half_width == pytest.approx(0.08)
    assert Estimate(1.0, None, 0.95, 2).half_width is None


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.11, 1.30), Verdict.REGRESSED),
        ((1.10, 1.30), Verdict.UNDECIDED),
        ((0.90, 1.11), Verdict.UNDECIDED),
        ((1.02, 1.10), Verdict.HELD),
        ((0.80, 0.90), Verdict.HELD),
        (None, Verdict.UNDECIDED),
    ],
)
def test_a_limit_is_decided_only_by_a_whole_interval(
    interval: tuple[float, float] | None, verdict: Verdict
) -> None:
    assert judge(Estimate(1.2, interval, 0.95, 9), allowed=0.10) is verdict


def test_three_runs_decide_only_when_all_are_beyond_the_limit() -> None:
    base = [10.0, 10.1, 9.9]
    assert judge(ratio_of_medians([12.0, 12.1, 12.2], base), 0.1) is Verdict.REGRESSED
    assert judge(ratio_of_medians([12.0, 12.1, 11.0], base), 0.1) is Verdict.UNDECIDED


def test_until_wants_six_runs_and_every_interval_narrow() -> None:
    narrow, wide = Estimate(1.0, (0.96, 1.04), 0.95, 6), Estimate(1.0, (0.9, 1.1), 0.95, 6)
    lucky = Estimate(1.0, (1.0, 1.0), 0.95, 5)
    assert precise_enough([narrow, narrow], 0.05)
    assert not precise_enough([narrow, wide], 0.05)
    assert not precise_enough([Estimate(1.0, (0.99, 1.08), 0.95, 6)], 0.05)
    assert not precise_enough([lucky], 0.05)


def test_scatter_is_noise_and_has_a_remedy() -> None:
    note = noise_note([8.0, 9.0, 10.0, 11.0, 12.0])
    assert note is not None
    assert "20% of the median" in note
    assert "--until 5%" in note
    assert noise_note([9.8, 9.9, 10.0, 10.1, 10.2]) is None
    assert noise_note([1.0, 9.0]) is None
