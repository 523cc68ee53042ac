"""What must hold of a finished image, read from its files and configuration without running it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from builder.docker_engine import DockerEngine, ImageInfo
from builder.errors import VerifyError
from builder.plan import COLDSTART_DIR

_REQUIRED_LABELS = (
    "org.opencontainers.image.title",
    "org.opencontainers.image.source",
    "org.opencontainers.image.revision",
    "org.opencontainers.image.licenses",
    "dev.coldstart.quantization",
    "dev.coldstart.vllm",
    "dev.coldstart.version",
)
_USER = "2000:0"
_OFFLINE = ("HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1")
_NO_STATISTICS = "VLLM_NO_USAGE_STATS=1"
# Tokens by their issuers' shapes, and any variable that is named like one and has a value.
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{40,}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}")
_TOKEN_VARIABLE = re.compile(r"^[A-Z0-9_]*(TOKEN|API_KEY|PASSWORD|SECRET)(_[A-Z0-9_]+)?=.+")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, whether it holds, and what was found."""

    name: str
    ok: bool
    found: str


def verify(engine: DockerEngine, reference: str) -> list[Check]:
    """Every check, passed or not. Raises VerifyError only when the image is not ours at all."""
    info = engine.require_image(reference)
    manifest, manifest_mode, own_tokens = _read_own_files(engine, reference)
    model = manifest["model"]
    weights = manifest["weights"]
    checks = [_labels(info, model), _user(info), _environment(info, weights)]
    with engine.open_files(reference) as walk:
        entries = walk(model["path"])
        checks += _files(entries, model) if weights == "bake" else [_no_files(entries, weights)]
    checks.append(
        Check("manifest readable", manifest_mode & 0o004 != 0, f"mode {manifest_mode:04o}"),
    )
    checks.append(_no_token(engine, reference, info, own_tokens))
    return checks


def read_manifest(engine: DockerEngine, reference: str) -> dict[str, Any]:
    """The image's manifest. Raises InputError without the image, VerifyError when it is not ours."""
    engine.require_image(reference)
    with engine.open_files(reference) as walk:
        for _, file in walk(f"{COLDSTART_DIR}/manifest.json"):
            if file is not None:
                return _parse_manifest(reference, file.read())
    raise _not_ours(reference)


def _parse_manifest(reference: str, content: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(content)
    except ValueError:
        raise VerifyError(f"the manifest of {reference} is not JSON", fix="Build it again.") from None
    return manifest


def _not_ours(reference: str) -> VerifyError:
    return VerifyError(
        f"{reference} was not made by coldstart",
        why=f"It has no {COLDSTART_DIR}/manifest.json.",
        fix="Give an image that `coldstart build` made.",
    )


def _read_own_files(engine: DockerEngine, reference: str) -> tuple[dict[str, Any], int, list[str]]:
    manifest: dict[str, Any] | None = None
    mode, tokens = 0, []
    with engine.open_files(reference) as walk:
        for entry, file in walk(COLDSTART_DIR):
            if file is None:
                continue
            content = file.read()
            if _TOKEN.search(content):
                tokens.append(f"/opt/{entry.name}")
            if entry.name.endswith("/manifest.json"):
                mode = entry.mode & 0o777
                manifest = _parse_manifest(reference, content)
    if manifest is None:
        raise _not_ours(reference)
    return manifest, mode, tokens


def _labels(info: ImageInfo, model: Mapping[str, Any]) -> Check:
    missing = [name for name in _REQUIRED_LABELS if not info.labels.get(name)]
    if missing:
        return Check("labels", False, f"missing {', '.join(missing)}")
    digest = info.labels.get("dev.coldstart.model.digest")
    if digest != f"sha256:{model['lock_digest']}":
        return Check("labels", False, "the model digest is not the manifest's")
    return Check("labels", True, f"{len(_REQUIRED_LABELS)} present, digest as in the manifest")


def _user(info: ImageInfo) -> Check:
    return Check("user", info.user == _USER, info.user or "root")


def _environment(info: ImageInfo, weights: str) -> Check:
    """An image that downloads is offline from the end of its download on; the others always."""
    wanted = (_NO_STATISTICS,) if weights == "download" else (*_OFFLINE, _NO_STATISTICS)
    wrong = [f"missing {entry}" for entry in wanted if entry not in info.environment]
    if weights == "download":
        wrong += [f"{entry} forbids the download" for entry in _OFFLINE if entry in info.environment]
    off = "statistics are off" if weights == "download" else "hub and statistics are off"
    return Check("offline", not wrong, "; ".join(wrong) or off)


def _no_files(entries: Iterator[tuple[Any, Any]], weights: str) -> Check:
    found = [entry.name for entry, file in entries if file is not None]
    none = "none in the image, as stated: " + (
        "downloaded at the start" if weights == "download" else "mounted"
    )
    return Check("model files", not found, "; ".join(found[:3]) or none)


def _files(entries: Iterator[tuple[Any, Any]], model: Mapping[str, Any]) -> list[Check]:
    """Digest of every baked file against the manifest, and modes that any user can read."""
    expected = {file["path"]: file for file in model["files"]}
    parent = model["path"].rsplit("/", 1)[1]
    wrong: list[str] = []
    unreadable: list[str] = []
    for entry, file in entries:
        path = entry.name.removeprefix(f"{parent}/")
        if file is None:
            if entry.isdir() and entry.mode & 0o005 != 0o005:
                unreadable.append(entry.name)
            continue
        if entry.mode & 0o004 == 0:
            unreadable.append(path)
        locked = expected.pop(path, None)
        if locked is None:
            wrong.append(f"{path} is not in the manifest")
        elif entry.size != locked["size"] or _sha256(file) != locked["sha256"]:
            wrong.append(f"{path} differs")
    wrong += [f"{path} is missing" for path in expected]
    count = len(model["files"])
    return [
        Check("model files", not wrong, "; ".join(wrong[:3]) or f"{count} files match their digests"),
        Check("modes", not unreadable, "; ".join(unreadable[:3]) or "readable for every user"),
    ]


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _no_token(engine: DockerEngine, reference: str, info: ImageInfo, found: list[str]) -> Check:
    places = list(found)
    places += [entry.split("=", 1)[0] for entry in info.environment if _TOKEN_VARIABLE.match(entry)]
    if _TOKEN.search(json.dumps(info.config).encode()):
        places.append("the configuration")
    if _TOKEN.search(json.dumps([dict(step) for step in engine.history(reference)]).encode()):
        places.append("the history")
    return Check("no token", not places, "; ".join(places) or "none in files, configuration or history")
