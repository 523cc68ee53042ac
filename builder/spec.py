"""ImageSpec: what the user asks for, from coldstart.yaml and flags. Strict, frozen, no secret in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from builder.errors import InputError
from builder.methods import METHODS

VLLM_VERSION = "0.32.0"
DEFAULT_BASE = f"vllm/vllm-openai:v{VLLM_VERSION}"
CPU_BASE = f"coldstart/base-cpu:vllm-{VLLM_VERSION}"

Weights = Literal["bake", "download", "mount"]
Optimize = Literal["startup", "balanced", "throughput"]

# Baked arguments end up in a layer, a label and `docker history`.
_SECRET_FLAGS = frozenset({"--api-key", "--hf-token", "--ssl-keyfile-password"})
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_KEY = re.compile(r"token|api[_-]?key|password|secret", re.IGNORECASE)
# Docker's grammar: [host[:port]/]path[:tag][@digest], the path in lower case.
_REFERENCE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
# What the image itself decides.
_OWNED_FLAGS = {
    "--model": "MODEL",
    "--served-model-name": "--served-model-name before the `--`",
    "--host": "`docker run IMAGE --host …`",
    "--port": "`docker run -p HOST_PORT:8000`",
    "--uds": "`docker run -p HOST_PORT:8000`",
    "--revision": "--revision before the `--`",
    "--trust-remote-code": "--trust-remote-code before the `--`",
    "--api-server-count": "more replicas",
    "--ssl-keyfile": "a proxy in front of the container: PID 1 speaks plain HTTP",
    "--ssl-certfile": "a proxy in front of the container: PID 1 speaks plain HTTP",
    "--headless": "vLLM's own image",
}


class ImageSpec(BaseModel):
    """One image to build. Sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str | None = None
    quantize: str | None = None
    max_perplexity_increase: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    weights: Weights = "bake"
    optimize: Optimize = "balanced"
    calibration: str | None = None
    calibration_samples: int = Field(default=16, ge=1, le=4096)
    calibration_tokens: int = Field(default=256, ge=16, le=32768)
    tag: str | None = None
    base: str = DEFAULT_BASE
    platform: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    served_model_name: str | None = None
    engine_args: tuple[str, ...] = ()
    trust_remote_code: bool = False
    max_shard_size: ByteSize | None = Field(default=None, ge=1 << 20)
    max_layer_bytes: int = Field(default=1 << 30, ge=1 << 20)

    @field_validator("base", "tag", "platform")
    @classmethod
    def _image_words(cls, value: str | None) -> str | None:
        # These stand unquoted in a Dockerfile and in printed commands.
        if value is not None and not _REFERENCE.fullmatch(value):
            raise ValueError(f"{value!r} is not a name of an image or a platform")
        return value

    @field_validator("max_perplexity_increase", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> Any:
        """ "5%" is 0.05."""
        if isinstance(value, str) and value.strip().endswith("%"):
            return float(value.strip().removesuffix("%")) / 100
        return value

    @field_validator("engine_args", mode="before")
    @classmethod
    def _stringify(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(str(item) if isinstance(item, int | float | str) else item for item in value)
        return value


def load_spec(path: Path | None, flags: Mapping[str, Any]) -> ImageSpec:
    """Flags (those not None) over the file. Raises InputError."""
    data: dict[str, Any] = _read(path) if path else {}
    _refuse_secret_keys(data)
    data.update({name: value for name, value in flags.items() if value not in (None, ())})
    if "model" not in data:
        raise InputError("no model given", fix="Name a folder or a hub model, or set `model:` in the file.")
    _check_quantization(data.get("quantize"))
    try:
        spec = ImageSpec.model_validate(data)
    except ValidationError as error:
        raise InputError(_first_problem(error, path)) from None
    check_engine_args(spec.engine_args)
    if spec.trust_remote_code and spec.quantize:
        raise InputError(
            "--quantize does not go with --trust-remote-code",
            why="Quantizing runs the model on this machine; a repository's code runs only in the image.",
            fix="Leave one of them out, or name a checkpoint that its authors quantized.",
        )
    if spec.weights == "download" and (spec.quantize or spec.max_shard_size):
        flag, made = ("--quantize", "quantized") if spec.quantize else ("--max-shard-size", "split")
        raise InputError(
            f"--weights download does not go with {flag}",
            why=f"The {made} weights would not be on the hub.",
            fix=f"Bake or mount them, or push the {made} folder to a hub repository and name that.",
        )
    if spec.calibration and not spec.quantize:
        raise InputError("calibration without quantization does nothing", fix="Add --quantize awq.")
    if spec.max_perplexity_increase is not None and not spec.quantize:
        raise InputError(
            "--max-perplexity-increase without quantization does nothing", fix="Add --quantize awq."
        )
    return spec


def check_engine_args(arguments: Sequence[str]) -> None:
    """What can be told without vLLM: no secret, nothing that the image itself decides."""
    if arguments and not arguments[0].startswith("-"):
        raise InputError(
            f"unexpected argument {arguments[0]!r}",
            fix="Engine arguments go after `--`, e.g. `-- --max-model-len 4096`.",
        )
    for argument in arguments:
        flag = argument.split("=", 1)[0].replace("_", "-")
        if flag in _SECRET_FLAGS or _SECRET_VALUE.search(argument):
            shown = flag if flag.startswith("--") else "an engine argument"
            raise InputError(
                f"{shown} holds a secret, and engine arguments are baked into the image",
                why="Anyone who can pull the image could read it.",
                fix="Pass it when the container starts: `docker run -e VLLM_API_KEY IMAGE`.",
            )
        if flag in _OWNED_FLAGS:
            raise InputError(f"{flag} cannot be an engine argument", fix=f"Use {_OWNED_FLAGS[flag]}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", fix="Check the path given with -f.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}", why=" ".join(str(error).split())) from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"{path} is not a mapping of settings", fix="Start with `model: …`.")
    if isinstance(data.get("model"), str) and (path.parent / data["model"]).is_dir():
        data["model"] = str(path.parent / data["model"])  # a folder is named relative to the file
    if isinstance(data.get("calibration"), str) and not data["calibration"].startswith("hf://"):
        data["calibration"] = str(path.parent / data["calibration"])
    return data


def _refuse_secret_keys(data: Mapping[str, Any]) -> None:
    for key, value in data.items():
        named_like_one = _SECRET_KEY.search(key) and key not in ImageSpec.model_fields
        if named_like_one or (isinstance(value, str) and _SECRET_VALUE.search(value)):
            raise InputError(
                f"`{key}` looks like a secret, and the file describes an image that others will pull",
                fix="Remove it; set HF_TOKEN in the environment for downloads, VLLM_API_KEY at run time.",
            )


def _check_quantization(value: Any) -> None:
    if value is not None and value not in METHODS:
        raise InputError(
            f"unknown quantization {value!r}", fix=f"Supported: {', '.join(METHODS)}; or leave it out."
        )


def _first_problem(error: ValidationError, path: Path | None) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    where = f" in {path}" if path else ""
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(name, ImageSpec.model_fields, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"unknown setting `{name}`{where}{hint}"
    return f"`{name}`{where}: {problem['msg']}"
