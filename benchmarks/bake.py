"""Bake the weights, download them at start, or mount them: which reaches the first token sooner.

A model of a start on a node that has nothing yet. Rates are bytes per second, sizes bytes.

    t = pull(what the node lacks) / registry + unpack / disk + download / hub + read(weights) / disk + rest
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.schema import Run
from runtime.phases import Phase

Way = Literal["bake", "download", "mount"]


@dataclass(frozen=True, slots=True)
class Node:
    """registry, hub: what arrives; unpack: compressed layer bytes put on disk; disk: cold reads of weights.

    base_cached: the layers without weights are on the node already. mount: reads from a volume that holds
    the weights, disk's rate where it is None.
    """

    registry: float
    hub: float
    unpack: float
    disk: float
    mount: float | None = None
    base_cached: bool = True


@dataclass(frozen=True, slots=True)
class Model:
    """weights: bytes on disk; packed: bytes in the registry; base: compressed bytes of all other layers.

    rest: seconds of the start that are neither transfer nor reading of weights.
    """

    weights: int
    packed: int
    base: int
    rest: float


def seconds(way: Way, model: Model, node: Node) -> float:
    """Predicted seconds from the pull to the first token."""
    pulled = (0 if node.base_cached else model.base) + (model.packed if way == "bake" else 0)
    total = pulled / node.registry + pulled / node.unpack + model.rest
    if way == "download":  # written, and then still in the page cache when it is read
        return total + model.weights / node.hub
    rate = node.mount or node.disk
    return total + (model.weights / rate if way == "mount" else 0.0)


def best(model: Model, node: Node) -> tuple[Way, float]:
    ways: tuple[Way, ...] = ("bake", "download", "mount")
    return min(((way, seconds(way, model, node)) for way in ways), key=lambda pair: pair[1])


def crossing(model: Model, node: Node) -> float | None:
    """The registry's rate from which baking is sooner than downloading; None where it never is.

    bake = download:  packed / r + packed / unpack = weights / hub.
    """
    spare = model.weights / node.hub - model.packed / node.unpack
    return model.packed / spare if spare > 0 else None


def quantizing_saves(model: Model, quantized: Model, way: Way, node: Node) -> float:
    """Seconds sooner with the quantized weights; negative where they start later."""
    return seconds(way, model, node) - seconds(way, quantized, node)


def rates_of(run: Run, weights: int) -> Node:
    """Rates as a run with a pull showed them; hub and disk are the registry's until told otherwise.

    weights: bytes that its weight_load read. Raises ValueError for a run without a pull.
    """
    pulls = [event for event in run.phases if event.phase == Phase.IMAGE_PULL]
    fetched = sum(event.resources.net_bytes or 0 for event in pulls if event.resources)
    pull, unpack = _alone(run)
    if not fetched or not pull:
        raise ValueError("the run pulled nothing: measure with --pull")
    load = run.seconds_in(Phase.WEIGHT_LOAD)
    disk = weights / load if load else fetched / pull
    return Node(fetched / pull, fetched / pull, fetched / unpack if unpack else float("inf"), disk)


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


def error(predicted: float, runs: Iterable[Run]) -> float:
    """Of the prediction, as a share of the median of measured runs; ValueError without one."""
    totals = sorted(run.total_seconds for run in runs if run.total_seconds is not None)
    if not totals:
        raise ValueError("no run was measured")
    middle = totals[len(totals) // 2]
    return (predicted - middle) / middle


def with_rates(node: Node, **given: float) -> Node:
    """`node` with rates that the user gave instead of measuring them."""
    return replace(node, **given)  # type: ignore[arg-type]
