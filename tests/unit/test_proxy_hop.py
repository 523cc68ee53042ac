"""The interval of what a request pays: rounds of one start are not independent of each other."""

from __future__ import annotations

import pytest

from benchmarks.proxy_hop import interval
from benchmarks.stats import ratio_of_medians


def test_few_starts_give_their_range_or_nothing() -> None:
    assert interval([[1.0, 1.1], [1.2]]) is None
    assert interval([[1.0, 1.1, 1.3], [0.9], [1.2, 1.2]]) == (0.9, 1.2)


def test_starts_that_differ_widen_what_their_rounds_seem_to_know() -> None:
    starts = [[level + noise / 1000 for noise in range(10)] for level in (0.94, 0.96, 0.98, 1.0, 1.02, 1.04)]
    rounds = [ratio for start in starts for ratio in start]
    found, naive = interval(starts), ratio_of_medians(rounds, [1.0] * len(rounds)).interval
    assert found is not None
    assert naive is not None
    assert found[1] - found[0] > 1.3 * (naive[1] - naive[0])
    assert interval(starts) == found  # seeded
    assert interval([[1.0] * 10] * 6) == pytest.approx((1.0, 1.0))
