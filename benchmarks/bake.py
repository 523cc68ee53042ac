"""Bake the weights, download them at start, or mount them: which reaches the first token sooner.

A model of a start, from a few rates. Rates are bytes per second, sizes bytes, times seconds.

    t = (what the node lacks of the image) * (1 / registry + 1 / unpack) + weights / (hub or disk) + rest

What was just pulled or downloaded is still in the page cache when it is read, and costs nothing more: true
while the weights fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.schema import BenchResult, Run, Way
from runtime.phases import Phase


@dataclass(frozen=True, slots=True)
class Node:
    """registry, hub: what arrives; unpack: compressed layer bytes put on disk; disk: cold reads of weights.

    mount: reads from a volume that holds the weights, disk's rate where None. has: what the node has already.
    """

    registry: float
    hub: float
    unpack: float
    disk: float
    mount: float | None = None
    has: Literal["nothing", "base", "image"] = "base"


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
    pulled = model.base if node.has == "nothing" else 0
    if way == "bake" and node.has != "image":
        pulled += model.packed
    total = pulled / node.registry + pulled / node.unpack + model.rest
    if way == "download":
        return total + model.weights / node.hub
    if way == "mount":
        return total + model.weights / (node.mount or node.disk)
    return total + (model.weights / node.disk if node.has == "image" else 0.0)


def best(model: Model, node: Node) -> tuple[Way, float]:
    ways: tuple[Way, ...] = ("bake", "download", "mount")
    return min(((way, seconds(way, model, node)) for way in ways), key=lambda pair: pair[1])


def crossing(model: Model, node: Node) -> float | None:
    """The registry's rate from which baking is sooner than downloading; None where it never is.

    For a node that lacks the weights:
        packed / rate + packed / unpack = weights / hub
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
    fetched = fetched_by(run)
    pull, unpack = _alone(run)
    if not fetched or not pull:
        raise ValueError("the run pulled nothing: measure with --pull")
    load = run.seconds_in(Phase.WEIGHT_LOAD)
    disk = weights / load if load else fetched / pull
    return Node(fetched / pull, fetched / pull, fetched / unpack if unpack else float("inf"), disk)


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


def error(predicted: float, runs: Iterable[Run]) -> float:
    """Of the prediction, as a share of the median of measured runs; ValueError without one."""
    totals = sorted(run.total_seconds for run in runs if run.total_seconds is not None)
    if not totals:
        raise ValueError("no run was measured")
    middle = totals[len(totals) // 2]
    return (predicted - middle) / middle


@dataclass(frozen=True, slots=True)
class Row:
    """What the model says of one image; error: of its prediction for the pulled image, None if unchecked."""

    image: str
    model: Model
    best: Way
    seconds: dict[Way, float]
    crossing: float | None
    error: float | None


def rows(result: BenchResult, weights: Sequence[int], given: dict[str, float]) -> tuple[Node, list[Row]]:
    """One row an image. The first image's first pull gives the rates, and all other pulled runs check them.

    weights: bytes of each image's weights, in the order of the images; given: rates of Node that replace the
    measured ones. ValueError where an image has no successful run with a pull.
    """
    if len(weights) != len(result.images):
        raise ValueError(f"{len(result.images)} images have {len(weights)} sizes of weights")
    pulled = [
        [run for run in result.measured(image.reference) if run.state.pulled] for image in result.images
    ]
    if not all(pulled):
        raise ValueError("an image has no run with a pull: measure with --pull")
    measured = rates_of(pulled[0][0], weights[0])
    node = replace(measured, **given)  # type: ignore[arg-type]
    found = []
    for image, runs, size in zip(result.images, pulled, weights, strict=True):
        model = Model(size, fetched_by(runs[0]), 0, rest_of(runs[0]))
        others = runs[1:] or (runs if runs is not pulled[0] else [])
        ways: tuple[Way, ...] = ("bake", "download", "mount")
        found.append(
            Row(
                image.reference,
                model,
                best(model, node)[0],
                {way: seconds(way, model, node) for way in ways},
                crossing(model, node),
                error(seconds("bake", model, measured), others) if others else None,
            )
        )
    return node, found
