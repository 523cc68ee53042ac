"""The README's figures, out of the newest results of benchmarks/suite.sh: `python -m benchmarks.readme`.

A test holds the README to what this prints.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from benchmarks.schema import BenchResult, read_result
from benchmarks.stats import Estimate, ratio_of_medians, summarize
from benchmarks.summary import totals

RESULTS = Path(__file__).with_name("results")
_CACHES = ("warm", "cold")
_PREFIX = "coldstart-bench/smollm2:"
# What the README calls it -> the result that has it, its tag, and whether it is held to stock eager.
_ROWS: Mapping[str, tuple[str, str, bool]] = {
    "vLLM 0.32 stock, default arguments, bf16": ("default", "stock-default", False),
    "the same, float32": ("default", "stock-default-float32", False),
    "vLLM 0.32 stock, `--enforce-eager`": ("smollm2", "stock-eager", False),
    "Coldstart as built (eager, bf16)": ("smollm2", "eager", True),
    "Coldstart, AWQ int4": ("smollm2", "awq", True),
    "Coldstart, compiled float32": ("smollm2", "compiled", True),
}
_RATIOS: Mapping[str, tuple[str, str, str]] = {
    "eager / stock with default arguments": ("default", "eager", "stock-default"),
    "compiled float32 / stock with default arguments and float32": (
        "default",
        "compiled",
        "stock-default-float32",
    ),
    "AWQ / unquantized": ("smollm2", "awq", "eager"),
}


def newest(kind: str, cache: str) -> Path:
    """Raises FileNotFoundError where there is none."""
    paths = sorted(RESULTS.glob(f"{kind}-*-{cache}.json"))
    if not paths:
        raise FileNotFoundError(f"no {kind}-*-{cache}.json in {RESULTS}")
    return paths[-1]


def _ratio(result: BenchResult, ours: str, other: str) -> str:
    found: Estimate = ratio_of_medians(totals(result, _PREFIX + ours), totals(result, _PREFIX + other))
    if found.interval is None:
        return f"{found.value:.3f}"
    low, high = found.interval
    digits = 3 if found.value < 0.15 else 2
    return f"{found.value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def tables() -> str:
    """Both tables, as Markdown."""
    pairs = itertools.product(("smollm2", "default"), _CACHES)
    results = {pair: read_result(newest(*pair)) for pair in pairs}
    head = " | ".join(f"page cache {cache} | against stock eager (95 % interval)" for cache in _CACHES)
    lines = [f"| | {head} |", "|---|---:|---:|---:|---:|"]
    for name, (kind, tag, held) in _ROWS.items():
        cells = []
        for cache in _CACHES:
            found = summarize(totals(results[kind, cache], _PREFIX + tag))
            cells.append(f"{found.median:.1f} ({found.low_quartile:.1f}-{found.high_quartile:.1f})")
            cells.append(_ratio(results[kind, cache], tag, "stock-eager") if held else "")
        lines.append(f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |"))
    lines += ["", "| ratio | page cache warm | page cache cold |", "|---|---:|---:|"]
    for name, (kind, ours, other) in _RATIOS.items():
        lines.append(f"| {name} | {' | '.join(_ratio(results[kind, c], ours, other) for c in _CACHES)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
