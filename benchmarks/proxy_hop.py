"""Does a request pay for the runtime in front of vLLM? Ours and vLLM's own server side by side, in turn.

Both images must have the same base, weights and arguments (benchmarks/stock.Dockerfile). Each round asks
both, in turn first: small requests one after the other on a kept connection (latency), then many at once
(throughput). Prints the median of the rounds' ratios, ours over vLLM's, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import client
from benchmarks.load import Client, Tally, Target
from benchmarks.stats import ratio_of_medians
from builder.docker_engine import DockerEngine

_PORT = 8000
_READY_SECONDS = 600.0
_POLL_SECONDS = 0.5
_SEQUENTIAL = 20
_CLIENTS, _EACH = 16, 4
_TOKENS = 1


async def latency(target: Target) -> list[float]:
    """Seconds of each of _SEQUENTIAL requests, one after the other."""
    asker, seconds = Client(target, Tally()), []
    for _ in range(_SEQUENTIAL):
        begun = time.perf_counter()
        answer = await asker.ask(target.complete(_TOKENS, stream=False))
        if answer is None or answer.status != 200:
            raise SystemExit(f"{target.host} gave no answer")
        seconds.append(time.perf_counter() - begun)
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The price of our runtime per request, against vLLM's server."
    )
    parser.add_argument("ours")
    parser.add_argument("stock")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, required=True, help="where the raw figures go")
    options = parser.parse_args()
    images = {"ours": options.ours, "stock": options.stock}
    engine = DockerEngine()
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        targets = {}
        for name, image in images.items():
            container = engine.start(image)
            stack.callback(container.remove)
            place = Target(container.address(), _PORT, "")
            targets[name] = Target(place.host, _PORT, _wait(place))
        for target in targets.values():  # the first requests compile and allocate
            asyncio.run(latency(target))
            asyncio.run(throughput(target))
        for index in range(options.rounds):
            order = sorted(targets, reverse=bool(index % 2))
            latencies = {name: asyncio.run(latency(targets[name])) for name in order}
            rates = {name: asyncio.run(throughput(targets[name])) for name in order}
            rounds.append({"order": order, "latency_seconds": latencies, "requests_per_second": rates})
    pairs = {
        "latency": [
            median(r["latency_seconds"]["ours"]) / median(r["latency_seconds"]["stock"]) for r in rounds
        ],
        "throughput": [r["requests_per_second"]["ours"] / r["requests_per_second"]["stock"] for r in rounds],
    }
    summary = {}
    for name, ratios in pairs.items():
        ratio = ratio_of_medians(ratios, [1.0] * len(ratios))
        summary[name] = {"ratio": ratio.value, "interval": ratio.interval, "confidence": ratio.confidence}
        bounds = "too few rounds" if ratio.interval is None else "{:.3f} to {:.3f}".format(*ratio.interval)
        print(f"{name}, ours / vLLM's: {ratio.value:.3f} ({bounds}, {ratio.confidence:.0%})")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"images": images, "machine": platform.platform(), "summary": summary, "rounds": rounds}
    options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
