"""coldstart.lock: what a request for a model was resolved to, beside the coldstart.yaml that makes it."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from builder.errors import InputError
from builder.models import ModelLock
from builder.report import Reporter
from builder.spec import ImageSpec

if TYPE_CHECKING:
    from builder.calibration import Calibration

NAME = "coldstart.lock"
SCHEMA = 2
_TOOLS = ("coldstart", "huggingface_hub", "safetensors")


class Drift(StrEnum):
    """How a build of now would differ from the lock."""

    NEW = "new"
    UNCHANGED = "unchanged"
    CONFIGURATION_CHANGED = "configuration changed"
    UPSTREAM_CHANGED = "upstream changed"


class Request(BaseModel):
    """What the user asked for, as far as it decides which weights an image has.

    quantization: the method and what it is calibrated on; None where nothing is quantized.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str | None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    trust_remote_code: bool = False
    quantization: str | None = None

    @classmethod
    def of(cls, spec: ImageSpec) -> Request:
        # A folder is named relative to the file, so that the lock is the same on every machine.
        path = Path(spec.model)
        name = path.name if path.is_dir() else spec.model
        return cls(
            model=name,
            revision=spec.revision,
            include=spec.include,
            exclude=spec.exclude,
            trust_remote_code=spec.trust_remote_code,
            quantization=_quantization(spec),
        )

    def same_model(self, other: Request) -> bool:
        """Whether both ask for the same files of the hub."""
        return self.model_copy(update={"quantization": other.quantization}) == other


class LockedCalibration(BaseModel):
    """The text that is calibrated on. source: as asked for, of a file its name.

    revision: the dataset's commit, None for a file; sha256 (hex): of the documents, or of a Parquet file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    revision: str | None
    sha256: str

    @classmethod
    def of(cls, spec: ImageSpec, calibration: Calibration | None) -> LockedCalibration | None:
        if calibration is None:
            return None
        return cls(source=_source(spec), revision=calibration.commit, sha256=calibration.digest)


class LockFile(BaseModel):
    """Canonical: writing the same content twice gives the same bytes.

    tools: releases that wrote it; calibration: None where the model's own answers serve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    tools: dict[str, str]
    request: Request
    model: ModelLock
    calibration: LockedCalibration | None = None

    def to_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"


class _Versioned(BaseModel):
    schema_version: int


def beside(spec_file: Path | None) -> Path | None:
    """Where the lock of this spec file is; builds from flags alone have none."""
    return spec_file.with_name(NAME) if spec_file else None


def read(path: Path) -> LockFile | None:
    """None when there is none. Raises InputError when it is damaged or of another schema."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    again = "Delete it and build without --locked."
    try:
        schema = _Versioned.model_validate_json(data).schema_version
        if schema != SCHEMA:
            raise InputError(f"{path} has schema {schema}, this coldstart reads {SCHEMA}", fix=again)
        return LockFile.model_validate_json(data)
    except ValidationError as error:
        raise InputError(f"{path} is damaged", why=str(error.errors()[0]["msg"]), fix=again) from None


def tools(spec: ImageSpec) -> dict[str, str]:
    """Releases that decide what a build makes of this request, by distribution name."""
    found = {name: version(name) for name in _TOOLS}
    if spec.quantize:
        from builder.quantize import QUANTIZER_REQUIREMENTS

        for requirement in QUANTIZER_REQUIREMENTS:
            name, _, release = requirement.partition("==")
            found[name] = release
    return found


def write(path: Path, spec: ImageSpec, model: ModelLock, calibration: Calibration | None = None) -> None:
    """Atomically, and only when the content differs, so that the file's time says when it changed."""
    content = LockFile(
        tools=tools(spec),
        request=Request.of(spec),
        model=model,
        calibration=LockedCalibration.of(spec, calibration),
    ).to_bytes()
    if path.exists() and path.read_bytes() == content:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def pinned(spec: ImageSpec, lock: LockFile | None) -> ImageSpec:
    """The spec at the locked commit: the branch was followed once, when the lock was written."""
    if lock is None or not lock.request.same_model(Request.of(spec)) or lock.model.revision is None:
        return spec
    name = spec.model.rsplit("@", 1)[0]
    return spec.model_copy(update={"model": name, "revision": lock.model.revision})


def require_locked(spec: ImageSpec, path: Path | None) -> LockFile:
    """For `--locked`. Raises InputError when there is no lock or it is of another request."""
    if path is None:
        raise InputError("--locked needs a coldstart.yaml", fix="Give it with -f; its lock is beside it.")
    lock = read(path)
    if lock is None:
        raise InputError(f"{path} does not exist", fix="Build once without --locked, and commit the file.")
    if lock.request != Request.of(spec):
        raise InputError(
            f"{path} is stale",
            why=f"It locks {_name(lock.request)}, and {_name(Request.of(spec))} is asked for.",
            fix="Build without --locked to lock anew.",
        )
    return lock


def pinned_calibration(spec: ImageSpec, lock: LockFile | None) -> str | None:
    """The commit of the dataset that the spec calibrates on, where it was followed for the lock."""
    if lock is None or lock.calibration is None or lock.calibration.source != _source(spec):
        return None
    return lock.calibration.revision


def require_same(lock: LockFile, found: ModelLock) -> None:
    """For `--locked`. Raises InputError naming the first file that is not what was locked."""
    if lock.model == found:
        return
    names = _changed_files(lock.model, found)
    what = f"{names[0]} is not what was locked" if names else "what config.json says was locked differently"
    raise InputError(
        f"the model differs from its lock: {what}",
        fix="Restore the model, or build without --locked to lock anew.",
    )


def require_same_calibration(lock: LockFile, spec: ImageSpec, calibration: Calibration | None) -> None:
    """For `--locked`. Raises InputError where the text, or the dataset's commit, is not what was locked."""
    if lock.calibration == LockedCalibration.of(spec, calibration):
        return
    raise InputError(
        "the calibration text differs from its lock",
        why="" if lock.calibration else "The lock is of a release that did not keep its digest.",
        fix="Restore the text, or build without --locked to lock anew.",
    )


def require_constant(
    lock: LockFile, spec: ImageSpec, found: ModelLock, calibration: Calibration | None, reporter: Reporter
) -> None:
    """For a build that locks anew. Raises InputError where a commit has other bytes than when it was locked.

    What may change, such as the files of a folder, is noted.
    """
    if lock.request != Request.of(spec):
        return
    now = {file.path: file for file in found.files}
    other = [file.path for file in lock.model.files if now.get(file.path, file) != file]
    if other and found.revision and found.revision == lock.model.revision:
        raise _inconstant(f"{other[0]} of {lock.request.model}", found.revision)
    before, text = lock.calibration, LockedCalibration.of(spec, calibration)
    if before and text and before != text and before.revision and before.revision == text.revision:
        raise _inconstant(f"the calibration text of {text.source}", before.revision)
    changed = _changed_files(lock.model, found)
    if changed:
        reporter.note(f"{changed[0]} is not what was locked; locking anew")
    if before and before != text:
        reporter.note("the calibration text is not what was locked; locking anew")


def _inconstant(what: str, commit: str) -> InputError:
    return InputError(
        f"{what} is not what was locked",
        why=f"It was locked at the same commit ({commit[:12]}), whose bytes never change.",
        fix=f"Find out whether the hub or {NAME} was tampered with; delete that to trust the hub.",
    )


def _changed_files(locked: ModelLock, found: ModelLock) -> list[str]:
    """Those that only one of them has; where there are none, those of other bytes."""
    before = {file.path: file for file in locked.files}
    now = {file.path: file for file in found.files}
    return sorted(set(before) ^ set(now)) or [path for path in sorted(before) if before[path] != now[path]]


def drift(
    spec: ImageSpec, lock: LockFile | None, found: ModelLock, calibration: Calibration | None = None
) -> Drift:
    """found: the model as it is now at the branch, tag or folder that the spec names; calibration: so too."""
    if lock is None:
        return Drift.NEW
    if lock.request != Request.of(spec):
        return Drift.CONFIGURATION_CHANGED
    same_text = calibration is None or lock.calibration == LockedCalibration.of(spec, calibration)
    return Drift.UNCHANGED if lock.model == found and same_text else Drift.UPSTREAM_CHANGED


def _name(request: Request) -> str:
    name = f"{request.model}@{request.revision}" if request.revision else request.model
    return f"{name} ({request.quantization})" if request.quantization else name


def _quantization(spec: ImageSpec) -> str | None:
    """On one line, the same on every machine: of a calibration file its name."""
    if spec.quantize is None:
        return None
    return (
        f"{spec.quantize}, {spec.calibration_samples} x {spec.calibration_tokens} tokens of {_source(spec)}"
    )


def _source(spec: ImageSpec) -> str:
    source = spec.calibration or "the model's own answers"
    return source if source.startswith("hf://") else Path(source).name
