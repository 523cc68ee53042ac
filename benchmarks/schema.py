"""The result file of `coldstart bench`: strict and frozen, raw samples first, times in seconds.

Moments are seconds since the Unix epoch, as in runtime.phases; durations end in `_seconds`, shares are of 1.
Versions 1 and 2 are still read: all that they lack has a default that is true of them.
`python -m benchmarks.schema` prints the JSON Schema that docs/bench-result.schema.json keeps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from builder.errors import InputError
from runtime.phases import Phase, PhaseEvent, covered_seconds

SCHEMA_VERSION: Final = 3

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Way = Literal["bake", "download", "mount"]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the container engine says about an image.

    reference: as the user named it; id: the engine's content id ("sha256:..."), by which it is also started,
    so that a tag that moves during the benchmark changes nothing; size: bytes on disk. Of images of ours,
    weights: where they are from, weight_bytes: on disk, model_path: their folder in the container. off:
    optimisations of the runtime that these starts go without; arguments: what the server gets. reference then
    says so too.
    """

    reference: str
    id: str
    size: int
    labels: dict[str, str] = field(default_factory=dict)
    weights: Way | None = None
    weight_bytes: int | None = None
    model_path: str | None = None
    off: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """What the container engine knows the image by: the reference without what else it says."""
        return self.reference.partition(" ")[0]

    def without(self, *off: str, name: str = "") -> ImageFacts:
        """The same image, started without these optimisations. name: of them together."""
        return replace(self, reference=f"{self.reference} without {name or ', '.join(off)}", off=off)


class Machine(BaseModel):
    """Where it was measured. `memory`: bytes."""

    model_config = STRICT

    cpu_model: str
    cores: int
    memory: int
    kernel: str
    platform: str
    docker_engine: str | None = None


class Workload(BaseModel):
    """The one request whose first token ends a run; greedy, so that answers can be compared."""

    model_config = STRICT

    prompt: str = "The capital of France is"
    max_tokens: int = Field(default=16, gt=0)
    temperature: Literal[0] = 0


Cache = Literal["cold", "warm", "as_is"]


class State(BaseModel):
    """What the run found: caches emptied, filled or left as they were; whether it pulled the image."""

    model_config = STRICT

    page_cache: Cache = "as_is"
    compile_cache: Cache = "as_is"
    pulled: bool = False


class Resources(BaseModel):
    """What a phase used, of all processes of the container; None where it was not sampled."""

    model_config = STRICT

    cpu_seconds: float | None = None
    read_bytes: int | None = None
    net_bytes: int | None = None
    page_faults: int | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MeasuredPhase(PhaseEvent):
    """A phase as the result file keeps it."""

    resources: Resources | None = None


class Run(BaseModel):
    """One start of one image, kept also where it failed.

    order: position in the whole benchmark; index: how many runs of the same image came before; from 0.
    created_at: just before the container was created, or before the pull where there was one. ready_seconds,
    total_seconds: from there to the client's first 200 of /v1/models, and to the first streamed token.
    unattributed_seconds: the part of the total that no phase covers. wall_seconds: the total by a stopwatch,
    which is right even where the machine's clock is set meanwhile. phases_from: "runtime" where the image
    reported its phases at /startup, "log" where its log tells them, "client" where only what the client sees
    is known; adapter: what understood the image's report, such as "coldstart" or "vllm_log".
    sampler_cpu_seconds: what sampling resources itself cost. exit_code, stop_seconds: of SIGTERM at the end;
    log_tail: of failed runs.
    """

    model_config = STRICT

    image: str
    index: int = Field(ge=0)
    order: int = Field(ge=0)
    ok: bool
    error: str = ""
    created_at: float
    ready_seconds: float | None = None
    total_seconds: float | None = None
    unattributed_seconds: float | None = None
    wall_seconds: float | None = None
    state: State = State()
    phases: tuple[MeasuredPhase, ...] = ()
    phases_from: Literal["runtime", "log", "client"] = "client"
    adapter: str | None = None
    sampler_cpu_seconds: float | None = None
    answer: str = ""
    exit_code: int | None = None
    stop_seconds: float | None = None
    warnings: tuple[str, ...] = ()
    log_tail: str = ""

    @model_validator(mode="after")
    def _measured_or_explained(self) -> Self:
        if self.ok and None in (self.ready_seconds, self.total_seconds, self.unattributed_seconds):
            raise ValueError("a run that succeeded has ready_seconds, total_seconds and unattributed_seconds")
        if self.ok == bool(self.error):
            raise ValueError("a run either succeeded or has an error")
        return self

    @property
    def end(self) -> float:
        """The first token's arrival; of a failed run, the end of its last event."""
        if self.total_seconds is not None:
            return self.created_at + self.total_seconds
        return max((event.end for event in self.phases), default=self.created_at)

    def seconds_in(self, phase: Phase) -> float:
        """Wall seconds of this run in which at least one process was in `phase`."""
        events = [event for event in self.phases if event.phase == phase]
        return covered_seconds(events, self.created_at, self.end)


class BenchResult(BaseModel):
    """Everything that one benchmark measured. `images` are in the order given; the first is the baseline.

    runs_per_image: at least; `until`: the half width, as a share, that the interval of every image's median
    was to reach, for which up to max_runs_per_image were allowed.
    """

    model_config = STRICT

    schema_version: Literal[3] = SCHEMA_VERSION
    created: AwareDatetime
    machine: Machine
    workload: Workload
    images: tuple[ImageFacts, ...]
    runs_per_image: int = Field(gt=0)
    until: float | None = Field(default=None, gt=0)
    max_runs_per_image: int | None = Field(default=None, gt=0)
    runs: tuple[Run, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("schema_version") in (1, 2):
            data = {key: value for key, value in data.items() if key != "page_cache"}
            data["schema_version"] = SCHEMA_VERSION
        return data

    def runs_of(self, image: str) -> tuple[Run, ...]:
        """All runs of an image reference, failed ones too, in the order they ran."""
        return tuple(run for run in self.runs if run.image == image)

    def measured(self, image: str) -> tuple[Run, ...]:
        """The runs of an image reference that reached their first token and finished."""
        return tuple(run for run in self.runs_of(image) if run.ok)

    @property
    def failed(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if not run.ok)


def read_result(path: Path) -> BenchResult:
    """What `coldstart bench --json` wrote. Raises InputError for anything else, later versions too."""
    try:
        return BenchResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}", why=str(error), fix="Check the path.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is not a result of `coldstart bench --json`",
            why=f"{where}: {first['msg']}." if where else f"{first['msg']}.",
            fix=f"This version reads results of schema version 1 to {SCHEMA_VERSION}.",
        ) from error


def json_schema() -> str:
    """The documented form of a result file."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    }
    schema |= BenchResult.model_json_schema(mode="serialization")
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
