"""Bake the weights, download them at start, or mount them: which reaches the first token sooner.

A model of a start, from a few rates. Rates are bytes per second, sizes bytes, times seconds.

    bake      t = pulled * (1 / registry + 1 / unpack) + rest
    download  the same, without the weights, + what of weights / hub the imports do not hide
    mount     the same, without the weights, + weights / mount

What was just pulled or downloaded is still in the page cache when it is read, and costs nothing more: true
while the weights fit into memory. A download goes on while vLLM is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from benchmarks.schema import BenchResult, Run, Way
from runtime.phases import Phase

WAYS: tuple[Way, ...] = ("bake", "download", "mount")
Has = Literal["nothing", "base", "image"]
# A phase that read less tells latency, not a rate.
_ENOUGH_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class Node:
    """registry, hub: what arrives; unpack: compressed layer bytes put on disk; disk: cold reads of weights.

    mount: reads from a volume that holds the weights, disk's rate where None. Where neither is known,
    nothing is said of mounting. has: what the node has already, beside "base" all but the weights.
    """

    registry: float
    hub: float
    unpack: float
    disk: float | None = None
    mount: float | None = None
    has: Has = "base"


@dataclass(frozen=True, slots=True)
class Model:
    """weights: bytes on disk; packed: bytes in the registry; base: compressed bytes of all other layers.

    rest: seconds of the start that are neither transfer nor reading from a cold disk; imports: those of them
    that a download runs beside.
    """

    weights: int
    packed: int
    base: int
    rest: float
    imports: float = 0.0


def seconds(way: Way, model: Model, node: Node) -> float:
    """Predicted seconds from the pull to the first token."""
    pulled = model.base if node.has == "nothing" else 0
    if way == "bake" and node.has != "image":
        pulled += model.packed
    total = pulled / node.registry + pulled / node.unpack + model.rest
    if way == "download":
        return total + max(0.0, model.weights / node.hub - model.imports)
    if way == "mount":
        rate = node.mount or node.disk
        if rate is None:
            raise ValueError("the rate of a mounted volume is not known")
        return total + model.weights / rate
    return total + (model.weights / node.disk if node.has == "image" and node.disk else 0.0)


def ways(node: Node) -> tuple[Way, ...]:
    """Those whose rates are known."""
    return WAYS if node.mount or node.disk else ("bake", "download")


def best(model: Model, node: Node) -> tuple[Way, float]:
    return min(((way, seconds(way, model, node)) for way in ways(node)), key=lambda pair: pair[1])


def crossing(model: Model, node: Node) -> float | None:
    """The registry's rate from which baking is sooner than downloading; None where it never is.

    For a node that lacks the weights:
        packed / rate + packed / unpack = weights / hub - imports
    """
    spare = model.weights / node.hub - model.imports - model.packed / node.unpack
    return model.packed / spare if spare > 0 else None


def quantizing_saves(model: Model, quantized: Model, way: Way, node: Node) -> float:
    """Seconds sooner with the quantized weights; negative where they start later."""
    return seconds(way, model, node) - seconds(way, quantized, node)


def rates_of(run: Run) -> Node:
    """Rates as a run with a pull showed them; the hub's is the registry's until told otherwise. The disk's is
    not told: what was just pulled is read from memory.

    Raises ValueError for a run without a pull.
    """
    fetched = fetched_by(run)
    pull, unpack = _alone(run)
    if not fetched or not pull:
        raise ValueError("the run pulled nothing: measure with --pull")
    return Node(fetched / pull, fetched / pull, fetched / unpack if unpack else float("inf"))


def disk_of(result: BenchResult) -> float:
    """The fastest that any phase of a start with a cold page cache read. Raises ValueError where none did."""
    cold = (run for run in result.runs if run.ok and run.state.page_cache == "cold")
    read = [
        (event.resources.read_bytes or 0, event.end - event.start)
        for run in cold
        for event in run.phases
        if event.resources
    ]
    rates = [size / took for size, took in read if size >= _ENOUGH_BYTES and took > 0]
    if not rates:
        raise ValueError("no run read from a cold disk: measure with --page-cache cold, as root")
    return max(rates)


def fetched_by(run: Run) -> int:
    """Compressed bytes that its pull brought."""
    pulls = (event.resources for event in run.phases if event.phase == Phase.IMAGE_PULL)
    return sum(used.net_bytes or 0 for used in pulls if used)


def rest_of(run: Run) -> float:
    """Seconds of a run that its pull, unpacking and downloads do not explain."""
    if run.total_seconds is None:
        raise ValueError("the run failed")
    return run.total_seconds - sum(_alone(run)) - run.seconds_in(Phase.MODEL_DOWNLOAD)


def _alone(run: Run) -> tuple[float, float]:
    """Seconds of the pull, and of the unpacking that goes on when the last byte has come."""
    pull = run.seconds_in(Phase.IMAGE_PULL)
    ends = [event.end for event in run.phases if event.phase == Phase.IMAGE_UNPACK]
    return pull, max(0.0, max(ends) - run.created_at - pull) if ends else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """What the model says of one image, with its own way of weights first predicted and then measured.

    way: its own; measured: the median of the runs that check the prediction, None where there is none.
    """

    image: str
    model: Model
    way: Way
    predicted: float
    measured: float | None
    best: Way
    seconds: dict[Way, float]
    crossing: float | None

    @property
    def error(self) -> float | None:
        return None if self.measured is None else (self.predicted - self.measured) / self.measured


def rows(
    result: BenchResult,
    given: Mapping[str, float],
    check: BenchResult | None = None,
    weights: Sequence[int] = (),
    *,
    has: Has = "base",
    base: int = 0,
) -> tuple[Node, list[Row]]:
    """One row an image. A run of the first baked image gives rates and the rest of the start, and one of an
    image that downloads or mounts its weights that way's rate; `given` rates replace those. Each is the
    median one, where `check` has the runs that check it, measured at the rates given; else the first, which
    the others check.

    weights: bytes of each image's weights, where the images do not say it. has, base: of the node that is
    asked about, and the compressed bytes that it lacks if it has nothing; the runs are those of a node that
    had the base, so they check no other. Raises ValueError.
    """
    sizes = dict(zip((image.reference for image in result.images), weights, strict=False)) or {
        image.reference: image.weight_bytes or 0 for image in result.images
    }
    if set(sizes) != {image.reference for image in result.images} or not all(sizes.values()):
        raise ValueError("the size of an image's weights is not known: give --weights for each")
    own: dict[str, Way] = {image.reference: image.weights or "bake" for image in result.images}
    runs = {name: [run for run in result.measured(name) if run.state.pulled] for name in own}
    if not all(runs.values()):
        raise ValueError("an image has no run with a pull: measure with --pull")
    baked = next((name for name, way in own.items() if way == "bake"), None)
    if baked is None:
        raise ValueError("no image has its weights baked: measure one with the others")
    chosen = {name: _median_run(found) if check else found[0] for name, found in runs.items()}
    whole = chosen[baked]
    node = replace(_with_own_rates(rates_of(whole), whole, own, chosen, sizes), **given)  # type: ignore[arg-type]
    measured_node, node = node, replace(node, has=has)
    if has == "image" and node.disk is None:
        raise ValueError("the disk's rate is not known: give --disk, or --cold")
    known = ways(node)
    found = []
    for name, way in own.items():
        # Images whose weights are elsewhere pull the rest alone; what they would pull baked is the first's.
        source = chosen[name] if way == "bake" else whole
        model = Model(
            sizes[name], fetched_by(source), base, rest_of(source), source.seconds_in(Phase.ENGINE_IMPORT)
        )
        others = check.measured(name) if check else runs[name][1:]
        predicted = seconds(way, model, measured_node)
        if way != "bake":  # it does pull something
            predicted += fetched_by(chosen[name]) * (1 / node.registry + 1 / node.unpack)
        found.append(
            Row(
                name,
                model,
                way,
                predicted,
                median(run.total_seconds or 0.0 for run in others) if others else None,
                best(model, node)[0],
                {each: seconds(each, model, node) for each in known},
                crossing(model, node),
            )
        )
    return node, found


def _with_own_rates(
    node: Node,
    whole: Run,
    ways: Mapping[str, Way],
    chosen: Mapping[str, Run],
    sizes: Mapping[str, int],
) -> Node:
    """With the hub's rate where an image downloaded, and a mount's where one read from it."""
    for name, way in ways.items():
        run = chosen[name]
        if way == "download" and (took := run.seconds_in(Phase.MODEL_DOWNLOAD)):
            node = replace(node, hub=sizes[name] / took)
        elif way == "mount":
            longer = run.seconds_in(Phase.WEIGHT_LOAD) - whole.seconds_in(Phase.WEIGHT_LOAD)
            node = replace(node, mount=sizes[name] / longer if longer > 0 else math.inf)
    return node


def _median_run(runs: Sequence[Run]) -> Run:
    """The one in the middle; the sooner of two."""
    return sorted(runs, key=lambda run: run.total_seconds or 0.0)[(len(runs) - 1) // 2]
