"""Does a request pay for the runtime in front of vLLM? Ours and vLLM's own server side by side, in turn.

Both images must have the same base, weights and arguments (benchmarks/stock.Dockerfile). Two servers of one
image differ by more than the runtime costs, so both are started several times. Each round sends requests
alternately on kept connections: one token (latency), and a route that needs no engine (route); then many at
once (throughput). Prints the median of the rounds' ratios, ours over vLLM's, with a bootstrap interval that
resamples starts: the rounds of one have the same two servers, and are not independent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import h11

from benchmarks import client
from benchmarks.harness import describe_machine
from benchmarks.load import Client, Tally, Target
from benchmarks.stats import MIN_SAMPLES_FOR_95_PERCENT, MIN_SAMPLES_FOR_INTERVAL
from builder.docker_engine import DockerEngine

_PORT = 8000
_READY_SECONDS = 600.0
_POLL_SECONDS = 0.5
_SEQUENTIAL, _ROUTES = 20, 100
_CLIENTS, _EACH = 16, 4
_TOKENS = 1
_CONFIDENCE, _RESAMPLES = 0.95, 2000


async def alternate(
    targets: Mapping[str, Target], request: Callable[[Target], list[h11.Event]], count: int
) -> dict[str, list[float]]:
    """Seconds of `count` requests to each target, never two at once, a request to each in turn."""
    askers = {name: Client(target, Tally()) for name, target in targets.items()}
    seconds: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(count):
        for name, target in targets.items():
            begun = time.perf_counter()
            answer = await askers[name].ask(request(target))
            if answer is None or answer.status != 200:
                raise SystemExit(f"{target.host} gave no answer")
            seconds[name].append(time.perf_counter() - begun)
    for asker in askers.values():
        asker.close()
    return seconds


async def throughput(target: Target) -> float:
    """Requests per second of _CLIENTS at once."""
    tally = Tally()

    async def ask() -> None:
        asker = Client(target, tally)
        for _ in range(_EACH):
            await asker.ask(target.complete(_TOKENS, stream=False))
        asker.close()

    begun = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(_CLIENTS)))
    if tally.answers[200] != _CLIENTS * _EACH:
        raise SystemExit(f"{target.host} did not answer every request: {tally}")
    return _CLIENTS * _EACH / (time.perf_counter() - begun)


def _wait(target: Target) -> str:
    """The served name, once /v1/models answers."""
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        answer = asyncio.run(_models(target))
        if answer:
            return client.model_name(answer)
        time.sleep(_POLL_SECONDS)
    raise SystemExit(f"{target.host} did not get ready")


async def _models(target: Target) -> bytes | None:
    asker = Client(target, Tally())
    answer = await asker.ask(target.get("/v1/models"))
    asker.close()
    return answer.body if answer is not None and answer.status == 200 else None


def one_start(engine: DockerEngine, images: Mapping[str, str], rounds: int) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        targets: dict[str, Target] = {}
        for name, image in images.items():
            # What Docker runs every ten seconds to know whether ours is healthy, stock has none of.
            container = engine.start(image, health_checks=False)
            stack.callback(container.remove)
            address = container.address()
            targets[name] = Target(address, _PORT, _wait(Target(address, _PORT, "")))
        found = [_round(targets, bool(index % 2)) for index in range(rounds + 1)]
    return found[1:]  # the first requests compile and allocate


def _round(targets: Mapping[str, Target], backwards: bool) -> dict[str, Any]:
    names = sorted(targets, reverse=backwards)
    targets = {name: targets[name] for name in names}
    return {
        "order": names,
        "latency": asyncio.run(alternate(targets, lambda t: t.complete(_TOKENS, stream=False), _SEQUENTIAL)),
        "route": asyncio.run(alternate(targets, lambda t: t.get("/v1/models"), _ROUTES)),
        "throughput": {name: asyncio.run(throughput(target)) for name, target in targets.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The price of our runtime per request, against vLLM's server."
    )
    parser.add_argument("ours")
    parser.add_argument("stock")
    parser.add_argument("--starts", type=int, default=6, help="of both servers")
    parser.add_argument("--rounds", type=int, default=10, help="in each start")
    parser.add_argument("--json", type=Path, required=True, help="where the raw figures go")
    options = parser.parse_args()
    images = {"ours": options.ours, "stock": options.stock}
    engine = DockerEngine()
    starts = []
    for index in range(options.starts):
        starts.append(
            one_start(engine, dict(sorted(images.items(), reverse=bool(index % 2))), options.rounds)
        )
    summary = {name: _compare(starts, name) for name in ("latency", "route", "throughput")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(engine.version).model_dump()
    result = {"images": images, "machine": machine, "summary": summary, "starts": starts}
    options.json.write_text(json.dumps(_rounded(result), indent=1))
    return 0


def interval(starts: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Of the median of all rounds' ratios; starts: the ratios of each one's rounds. None of fewer than three.

    A cluster bootstrap, seeded: starts are drawn, each with all its rounds. Of fewer than
    MIN_SAMPLES_FOR_95_PERCENT starts it is the range of their medians.
    """
    if len(starts) < MIN_SAMPLES_FOR_INTERVAL:
        return None
    if len(starts) < MIN_SAMPLES_FOR_95_PERCENT:
        medians = [median(rounds) for rounds in starts]
        return min(medians), max(medians)
    rng = random.Random(0)  # noqa: S311 - statistics, not cryptography
    found = sorted(
        median(ratio for rounds in rng.choices(starts, k=len(starts)) for ratio in rounds)
        for _ in range(_RESAMPLES)
    )
    tail, last = (1 - _CONFIDENCE) / 2, _RESAMPLES - 1
    return found[math.floor(tail * last)], found[math.ceil((1 - tail) * last)]


def _compare(starts: list[list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """Seconds of a request, or requests per second; ratios are ours over vLLM's, also start by start."""

    def value(measured: Any) -> float:
        return float(median(measured) if isinstance(measured, list) else measured)

    pairs = [[(value(r[name]["ours"]), value(r[name]["stock"])) for r in rounds] for rounds in starts]
    ratios = [[ours / stock for ours, stock in rounds] for rounds in pairs]
    ratio, found = median(each for rounds in ratios for each in rounds), interval(ratios)
    ours, stock = (median(pair[side] for rounds in pairs for pair in rounds) for side in (0, 1))
    by_start = [median(rounds) for rounds in ratios]
    bounds = "too few starts" if found is None else "{:.3f} to {:.3f}".format(*found)
    print(
        f"{name}, ours / vLLM's: {ratio:.3f} ({bounds}, {_CONFIDENCE:.0%}); "
        f"medians {ours:.5g} and {stock:.5g}; by start {', '.join(f'{r:.3f}' for r in by_start)}"
    )
    return {
        "ratio": ratio,
        "interval": found,
        "resampled": "starts",
        "confidence": _CONFIDENCE,
        "ours": ours,
        "stock": stock,
        "by_start": by_start,
    }


def _rounded(value: Any) -> Any:
    """Six decimals: a microsecond, or what no machine measures."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    sys.exit(main())
