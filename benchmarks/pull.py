"""Phases of an image pull, from the engine's own progress messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.schema import MeasuredPhase, Resources
from runtime.phases import Phase

_FETCHED = ("Download complete", "Extracting", "Pull complete")


@dataclass(slots=True)
class Pull:
    """began, fetched, unpacking, ended: epoch seconds; fetched is the last byte of the last layer.

    downloaded: compressed bytes of the layers that the engine lacked; kept: layers that it had already.
    """

    began: float
    fetched: float | None = None
    unpacking: float | None = None
    ended: float | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)

    def follow(self, messages: Iterable[tuple[float, Mapping[str, Any]]]) -> None:
        """messages: (arrival in epoch seconds, message); keeps what came before an error that they raise."""
        arrived: set[str] = set()
        for at, message in messages:
            self.ended = at
            layer, status = str(message.get("id", "")), str(message.get("status", ""))
            detail = message.get("progressDetail") or {}
            if status == "Already exists":
                self.kept.add(layer)
            elif status == "Pulling fs layer":
                self.layers.add(layer)
            elif status == "Downloading" and detail.get("total"):
                self.sizes[layer] = int(detail["total"])
            if status in _FETCHED and layer not in arrived:
                arrived.add(layer)
                self.fetched = at
            if status == "Extracting" and self.unpacking is None:
                self.unpacking = at

    @property
    def downloaded(self) -> int:
        return sum(self.sizes.values())

    def phases(self) -> list[MeasuredPhase]:
        """image_pull ends with the last byte; unpacking begins with the first layer, so the two overlap."""
        if self.ended is None:
            return []
        fetched = self.fetched or self.ended
        detail = f"{len(self.layers)} layers fetched, {len(self.kept)} were here"
        resources = Resources(net_bytes=self.downloaded)
        found = [_phase(Phase.IMAGE_PULL, self.began, fetched, detail, resources)]
        if self.ended > (unpacking := self.unpacking or fetched):
            found.append(_phase(Phase.IMAGE_UNPACK, unpacking, self.ended, "", None))
        return found


def _phase(phase: Phase, start: float, end: float, detail: str, resources: Resources | None) -> MeasuredPhase:
    return MeasuredPhase(
        phase, start, end, process="engine", pid=os.getpid(), detail=detail, resources=resources
    )
