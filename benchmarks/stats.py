"""Statistics of a handful of slow runs: pure functions, standard library only.

Medians and quartiles, because start-up times are skewed and runs are few: one run that a busy disk slowed
must not move the result.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

MIN_SAMPLES_FOR_INTERVAL = 3
# From order statistics: the range of n samples holds the true median with probability 1 - 2 ** (1 - n),
# which reaches 95 % at n = 6. No resampling of fewer runs can know more than that:
# of fewer the whole range is taken. That three runs are all slower than three others is chance in 1 of 20.
MIN_SAMPLES_FOR_95_PERCENT = 6

# The threshold of sharkdp/hyperfine: severe only, so that ordinary noise raises no alarm.
_OUTLIER_SCORE = 14.826
_NORMAL_MAD = 1.4826  # median absolute deviation -> standard deviation, for normal noise
_NOISE_SHARE = 0.10  # of the median, for the middle half of the runs
_OUTLIER_MIN_SHARE = 0.05  # a few lucky, nearly equal runs make the score explode: nobody cares below 5 %


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and spread of samples, in the unit of the samples."""

    count: int
    median: float
    low_quartile: float
    high_quartile: float
    minimum: float
    maximum: float

    @property
    def iqr(self) -> float:
        """The interquartile range: the width of the middle half."""
        return self.high_quartile - self.low_quartile


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, or one over another. `interval` is None where samples are too few for one to mean anything.

    runs: of the side that has fewer. Under MIN_SAMPLES_FOR_95_PERCENT the interval is all that was seen, the
    fastest over the slowest to the slowest over the fastest; from there on it is a bootstrap interval.
    """

    value: float
    interval: tuple[float, float] | None
    confidence: float
    runs: int

    @property
    def half_width(self) -> float | None:
        """Of the interval, as a share of the value: of its wider side, where the sides differ."""
        if self.interval is None:
            return None
        low, high = self.interval
        return max(high - self.value, self.value - low) / self.value


class Verdict(enum.StrEnum):
    """What an interval says of a limit."""

    REGRESSED = "regressed"
    HELD = "held"
    UNDECIDED = "undecided"


def judge(ratio: Estimate, allowed: float) -> Verdict:
    """Whether `ratio` exceeds 1 + `allowed`: decided only where the whole interval lies on one side."""
    if ratio.interval is None:
        return Verdict.UNDECIDED
    low, high = ratio.interval
    if low > 1 + allowed:
        return Verdict.REGRESSED
    return Verdict.HELD if high <= 1 + allowed else Verdict.UNDECIDED


def summarize(samples: Sequence[float]) -> Summary:
    """Quartiles interpolate between samples (NumPy's default method). ValueError when there is no sample."""
    if not samples:
        raise ValueError("no samples to summarize")
    low, middle, high = quartiles(samples)
    return Summary(len(samples), middle, low, high, min(samples), max(samples))


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; a lone sample is all three."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return low, median(samples), high


def ratio_of_medians(
    samples: Sequence[float],
    baseline: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """median(samples) / median(baseline), with a percentile bootstrap interval.

    Seeded, so that the same result file always prints the same interval. ValueError unless both sides have
    samples, all finite and positive, and 0 < confidence < 1.
    """
    for side in (samples, baseline):
        if not side or not all(math.isfinite(s) and s > 0 for s in side):
            raise ValueError("a ratio needs finite, positive samples on both sides")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    value = median(samples) / median(baseline)
    runs = min(len(samples), len(baseline))
    interval: tuple[float, float] | None = None
    if runs >= MIN_SAMPLES_FOR_95_PERCENT:
        rng = random.Random(seed)  # noqa: S311 - statistics, not cryptography
        ratios = sorted(
            _resampled_median(rng, samples) / _resampled_median(rng, baseline) for _ in range(resamples)
        )
        tail = (1 - confidence) / 2
        last = resamples - 1
        interval = ratios[math.floor(tail * last)], ratios[math.ceil((1 - tail) * last)]
    elif runs >= MIN_SAMPLES_FOR_INTERVAL:
        interval = min(samples) / max(baseline), max(samples) / min(baseline)
    return Estimate(value, interval, confidence, runs)


def _resampled_median(rng: random.Random, samples: Sequence[float]) -> float:
    return median(rng.choices(samples, k=len(samples)))


def median_with_interval(samples: Sequence[float]) -> Estimate:
    """The median as a ratio to exactly 1. ValueError as for `ratio_of_medians`."""
    return ratio_of_medians(samples, [1.0] * len(samples))


def precise_enough(estimates: Sequence[Estimate], until: float) -> bool:
    """Whether every interval is a bootstrap interval and reaches at most `until`, a share, to either side."""
    return all(
        estimate.runs >= MIN_SAMPLES_FOR_95_PERCENT and (estimate.half_width or 0.0) <= until
        for estimate in estimates
    )


def outliers(samples: Sequence[float]) -> tuple[int, ...]:
    """Indexes of samples far from the median, by modified z-score. Fewer than three samples have none."""
    if len(samples) < 3:
        return ()
    middle = median(samples)
    mad = median(abs(s - middle) for s in samples) * _NORMAL_MAD
    limit = max(_OUTLIER_SCORE * mad, _OUTLIER_MIN_SHARE * abs(middle))
    return tuple(i for i, s in enumerate(samples) if abs(s - middle) > limit)


def outlier_note(samples: Sequence[float]) -> str | None:
    """Outliers and their remedy in a sentence, or None. `samples`: seconds, in the order they ran."""
    found = outliers(samples)
    if not found:
        return None
    middle = median(samples)
    if found == (0,) and samples[0] > middle:
        return (
            f"the first measured run took {samples[0]:.2f} s, the median is {middle:.2f} s: it probably read "
            "from disk what later runs found in the page cache; with more --runs the median describes those."
        )
    listed = ", ".join(f"{samples[i]:.2f} s (measured run {i + 1})" for i in found)
    return (
        f"far from the median of {middle:.2f} s: {listed}; something else probably used this machine: "
        "stop it and measure again, or raise --runs."
    )


def noise_note(samples: Sequence[float]) -> str | None:
    """That the runs scatter, and the remedy, in a sentence, or None. `samples`: seconds."""
    if len(samples) < MIN_SAMPLES_FOR_INTERVAL:
        return None
    found = summarize(samples)
    share = found.iqr / found.median
    if share <= _NOISE_SHARE:
        return None
    return (
        f"noisy: the middle half of the runs spreads over {share:.0%} of the median; stop what else uses "
        "this machine, or pass --until 5% to run until the interval is narrow."
    )
