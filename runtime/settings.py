"""Settings of a container: flags over environment over the manifest baked into the image."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.defaults import DRAIN_DELAY_SECONDS, DRAIN_TIMEOUT_SECONDS

MANIFEST_PATH = Path("/opt/coldstart/manifest.json")


class SettingsError(Exception):
    """A setting is wrong. The message names it and says what would be right."""


@dataclass(frozen=True)
class Manifest:
    """The part of /opt/coldstart/manifest.json that a start needs."""

    model_path: str
    served_model_name: str
    device: str
    engine_args: tuple[str, ...]
    shards: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
            return cls(
                model_path=data["model"]["path"],
                served_model_name=data["model"]["served_name"],
                device=data["device"],
                engine_args=tuple(data["engine_args"]),
                shards=tuple(f["path"] for f in data["model"]["files"] if f["path"].endswith(".safetensors")),
            )
        except FileNotFoundError:
            raise SettingsError(f"{path} is missing: this image was not made by `coldstart build`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{path} is damaged ({error!r}): build the image again") from None


@dataclass(frozen=True)
class Settings:
    """What one start does. Seconds for every duration."""

    manifest: Manifest
    host: str
    port: int
    served_model_name: str
    drain_delay: float
    drain_timeout: float
    phase_timeout: float
    engine_args: tuple[str, ...]

    def vllm_args(self) -> list[str]:
        """The argument list for vLLM's own parser; the user's come last and win."""
        return [
            "--model",
            self.manifest.model_path,
            "--served-model-name",
            self.served_model_name,
            *self.manifest.engine_args,
            *self.engine_args,
        ]


# Flags that would contradict what PID 1 owns or what the image is.
_OWNED = {
    "--model": "the model is baked into this image; build another image for another model",
    "--uds": "PID 1 owns the socket; use --host and --port",
    "--api-server-count": "one API process serves the socket; scale by adding replicas",
    "--ssl-keyfile": "PID 1 speaks plain HTTP; terminate TLS in front of the container",
    "--ssl-certfile": "PID 1 speaks plain HTTP; terminate TLS in front of the container",
    "--headless": "an image serves HTTP; use vLLM's own image for a headless node",
}


def _parser(defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m runtime",
        description="Serve the baked model with vLLM. Unknown flags go to vLLM's own parser.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default=defaults["host"], help="address to bind [COLDSTART_HOST]")
    parser.add_argument("--port", type=int, default=defaults["port"], help="port to bind [COLDSTART_PORT]")
    parser.add_argument(
        "--served-model-name",
        default=defaults["served_model_name"],
        help="the name that clients use [COLDSTART_SERVED_MODEL_NAME]",
    )
    parser.add_argument(
        "--drain-delay",
        type=float,
        default=defaults["drain_delay"],
        help="seconds to go on serving after SIGTERM, readiness already off [COLDSTART_DRAIN_DELAY]",
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=defaults["drain_timeout"],
        help="seconds that requests in flight get to finish after the delay [COLDSTART_DRAIN_TIMEOUT]",
    )
    parser.add_argument(
        "--phase-timeout",
        type=float,
        default=defaults["phase_timeout"],
        help="seconds that a start-up may make no progress before it is given up [COLDSTART_PHASE_TIMEOUT]",
    )
    return parser


def load(argv: Sequence[str], environ: Mapping[str, str], manifest: Manifest) -> Settings:
    """Raises SettingsError; argparse itself exits 2 on a malformed flag, after naming it."""

    def number(name: str, default: float) -> float:
        text = environ.get(name)
        # Kubernetes sets COLDSTART_PORT=tcp://… in every pod beside a Service named "coldstart".
        if text is None or "://" in text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SettingsError(f"{name}={text!r} is not a number")
        return value

    defaults = {
        "host": environ.get("COLDSTART_HOST", "0.0.0.0"),  # noqa: S104 - a container serves its network
        "port": int(number("COLDSTART_PORT", 8000)),
        "served_model_name": environ.get("COLDSTART_SERVED_MODEL_NAME", manifest.served_model_name),
        "drain_delay": number("COLDSTART_DRAIN_DELAY", DRAIN_DELAY_SECONDS),
        "drain_timeout": number("COLDSTART_DRAIN_TIMEOUT", DRAIN_TIMEOUT_SECONDS),
        "phase_timeout": number("COLDSTART_PHASE_TIMEOUT", 600.0),
    }
    known, rest = _parser(defaults).parse_known_args(list(argv))
    for argument in rest:
        flag = argument.split("=", 1)[0].replace("_", "-")
        if flag in _OWNED:
            raise SettingsError(f"{flag} cannot be set here: {_OWNED[flag]}")
    if not 0 <= known.port <= 65535:
        raise SettingsError(f"--port {known.port} is not between 0 and 65535")
    for name in ("drain_delay", "drain_timeout"):
        if not 0 <= getattr(known, name) < math.inf:
            raise SettingsError(f"--{name.replace('_', '-')} must be a number of seconds, not negative")
    if not 0 < known.phase_timeout < math.inf:
        raise SettingsError("--phase-timeout must be a number of seconds, more than 0")
    return Settings(
        manifest=manifest,
        host=known.host,
        port=known.port,
        served_model_name=known.served_model_name,
        drain_delay=known.drain_delay,
        drain_timeout=known.drain_timeout,
        phase_timeout=known.phase_timeout,
        engine_args=tuple(rest),
    )


def take_output(argv: list[str]) -> Path:
    """Take `--output FOLDER` out of the arguments of `warm`. Raises SettingsError."""
    if "--output" not in argv[:-1]:
        raise SettingsError("warm needs --output FOLDER, the folder to write to")
    at = argv.index("--output")
    folder = Path(argv[at + 1])
    del argv[at : at + 2]
    return folder


def read_api_key(environ: Mapping[str, str]) -> str | None:
    """The key in COLDSTART_API_KEY_FILE, if one is named.

    Raises SettingsError when there is none in it: a server that was to be closed never starts open.
    """
    path = environ.get("COLDSTART_API_KEY_FILE")
    if path is None:
        return None
    try:
        key = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"COLDSTART_API_KEY_FILE={path!r} cannot be read: {error}") from None
    if not key:
        raise SettingsError(f"COLDSTART_API_KEY_FILE={path!r} is empty: put the key in it")
    return key


def read_manifest(environ: Mapping[str, str] = os.environ) -> Manifest:
    return Manifest.read(Path(environ.get("COLDSTART_MANIFEST", str(MANIFEST_PATH))))
