"""Settings of a container: flags over environment over the manifest baked into the image."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from runtime import switches
from runtime.deadlines import Deadlines
from runtime.defaults import DRAIN_DELAY_SECONDS, DRAIN_TIMEOUT_SECONDS

MANIFEST_PATH = Path("/opt/coldstart/manifest.json")
COMMANDS = ("serve", "health", "warm", "fetch", "switches", "golden")


_CHUNK_BYTES = 1 << 20


class SettingsError(Exception):
    """A setting is wrong. The message names it and says what would be right."""


class LockedFile(NamedTuple):
    """One file of the model: path below the model's, size in bytes, hexadecimal sha256."""

    path: str
    size: int
    sha256: str

    def has_size(self, root: Path) -> bool:
        path = root / self.path
        return path.is_file() and path.stat().st_size == self.size

    def is_whole(self, root: Path, deadline: float = math.inf) -> bool:
        """Raises OSError when it is there and cannot be read.

        deadline: of time.monotonic(); a file of the right size that is not read by then counts as whole.
        """
        if not self.has_size(root):
            return False
        digest = hashlib.sha256()
        with (root / self.path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                if time.monotonic() > deadline:
                    return True
                digest.update(chunk)
        return digest.hexdigest() == self.sha256


@dataclass(frozen=True)
class Manifest:
    """The part of /opt/coldstart/manifest.json that a start needs. weight_bytes: 0 when not recorded.

    weights: "bake", "download" or "mount"; source: "hf://org/name" or "folder"; revision: a hub's commit;
    digest: of the lock; dtype: of the weights; optimize: "startup", "balanced" or "throughput".
    """

    model_path: str
    served_model_name: str
    device: str
    engine_args: tuple[str, ...]
    shards: tuple[str, ...] = ()
    weight_bytes: int = 0
    quantization: str | None = None
    weights: str = "bake"
    source: str = "folder"
    revision: str | None = None
    files: tuple[LockedFile, ...] = ()
    digest: str = ""
    dtype: str | None = None
    optimize: str = "balanced"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            data: dict[str, Any] = json.loads(path.read_bytes())
            model = data["model"]
            shards = [file for file in model["files"] if file["path"].endswith(".safetensors")]
            return cls(
                model_path=model["path"],
                served_model_name=model["served_name"],
                device=data["device"],
                engine_args=tuple(_dashed(argument) for argument in data["engine_args"]),
                shards=tuple(file["path"] for file in shards),
                weight_bytes=sum(file["size"] for file in shards),
                quantization=model.get("quantization"),
                weights=data.get("weights", "bake"),
                source=model.get("source", "folder"),
                revision=model.get("revision"),
                files=tuple(LockedFile(f["path"], f["size"], f["sha256"]) for f in model["files"]),
                digest=model.get("lock_digest", ""),
                dtype=model.get("dtype"),
                optimize=data.get("optimize", "balanced"),
            )
        except FileNotFoundError:
            raise SettingsError(f"{path} is missing: this image was not made by `coldstart build`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"{path} is damaged ({error!r}): build the image again") from None


def _text(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def _names(words: str | list[str]) -> tuple[str, ...]:
    """From a flag, which takes several words, or a variable, which has spaces between them."""
    names = tuple(words.split() if isinstance(words, str) else words)
    if not names or not all(names):
        raise ValueError("must not be empty")
    return names


def _port(text: str) -> int:
    number = _whole(text)
    if number > 65535:
        raise ValueError("must lie between 0 and 65535")
    return number


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError("must be a whole number, not negative")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("must be a number of seconds, not negative")
    return value


def _one_of(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"must be {' or '.join(values)}")
        return text

    return parse


def _switches(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part for name in text.split(",") if (part := name.strip())))
    for name in names:
        if name not in switches.LABELS:
            close = difflib.get_close_matches(name, switches.LABELS, n=1)
            hint = f"did you mean {close[0]}?" if close else "`--help` lists them"
            raise ValueError(f"must name optimisations ({hint})")
    return names


@dataclass(frozen=True)
class Option:
    """One setting, `--name` and COLDSTART_NAME. default None: the manifest's or none, see `load`.

    several: the flag takes one word or more, as vLLM's own does.
    """

    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    several: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def variable(self) -> str:
        return f"COLDSTART_{self.name.upper().replace('-', '_')}"

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_") + ("s" if self.several else "")


OPTIONS = (
    Option("host", _text, "0.0.0.0", "Address to bind."),  # noqa: S104 - a container serves its network
    Option("port", _port, 8000, "Port to bind."),
    Option(
        "served-model-name",
        _names,
        None,
        "Name that clients use; the image's unless given. Of several, answers and metrics have the first.",
        several=True,
    ),
    Option(
        "drain-delay",
        _seconds,
        DRAIN_DELAY_SECONDS,
        "Seconds to go on serving after SIGTERM, with readiness already off.",
    ),
    Option(
        "drain-timeout",
        _seconds,
        DRAIN_TIMEOUT_SECONDS,
        "Seconds that requests in flight get to finish after the delay.",
    ),
    Option(
        "phase-timeout",
        Deadlines.parse,
        Deadlines(),
        "Seconds without progress after which a start is given up; by phase: 600,weight_load=3600.",
    ),
    Option(
        "api-key-file",
        _text,
        None,
        "File of API keys, one a line. With a key, every route but the probes wants it as a bearer token.",
    ),
    Option("metrics-auth", _one_of("open", "key"), "open", "Whether /metrics wants the key: open or key."),
    Option("max-request-bytes", _whole, 32 << 20, "Largest body of a request; a larger one is answered 413."),
    Option("log-format", _one_of("text", "json"), "text", "Format of all output: text or json."),
    Option(
        "off",
        _switches,
        (),
        f"Optimisations to start without, with commas between: {', '.join(switches.LABELS)}.",
    ),
    Option(
        "event-loop",
        _one_of("asyncio", "uvloop"),
        "asyncio",
        "Of the API process: asyncio or uvloop; asyncio too where uvloop is not installed.",
    ),
)

# Read from the environment only. A key on a command line can be read in `ps` and `docker inspect`.
KEY_VARIABLES = ("COLDSTART_API_KEY", "VLLM_API_KEY")
_OTHER_VARIABLES = {
    "COLDSTART_API_KEY": "The API key itself; VLLM_API_KEY is the same. A file is safer: --api-key-file.",
    "COLDSTART_MANIFEST": f"Path of the image's manifest [{MANIFEST_PATH}].",
}
# A Service named "coldstart" or "coldstart-…" makes Kubernetes set these in every pod beside it.
_KUBERNETES = re.compile(
    r"COLDSTART_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SECRET = re.compile(r"(token|api[-_]key|secret|password)$", re.IGNORECASE)
_SECRET_INSIDE = re.compile(
    r"""((?:token|api[-_]?key|secret|password)["']?\s*[:=]\s*)("[^"]*"|'[^']*'|[^\s,}&]+)""", re.IGNORECASE
)

# Flags that would contradict what PID 1 owns or what the image is.
_OWNED = {
    "--model": "the model is baked into this image; build another image for another model",
    "--uds": "PID 1 owns the socket; use --host and --port",
    "--api-server-count": "one API process serves the socket; scale by adding replicas",
    "-asc": "one API process serves the socket; scale by adding replicas",
    "--ssl-keyfile": "PID 1 speaks plain HTTP; terminate TLS in front of the container",
    "--ssl-certfile": "PID 1 speaks plain HTTP; terminate TLS in front of the container",
    **dict.fromkeys(
        ("--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers", "--enable-ssl-refresh"),
        "PID 1 speaks plain HTTP; terminate TLS in front of the container",
    ),
    "--headless": "an image serves HTTP; use vLLM's own image for a headless node",
    "--grpc": "an image serves HTTP; use vLLM's own image for gRPC",
    "--grpc-port": "an image serves HTTP; use vLLM's own image for gRPC",
    "--config": "a file could contradict the image unseen; give its settings as flags",
    "--api-key": "whoever may list processes or inspect the container would read it; "
    "give --api-key-file FILE or the variable COLDSTART_API_KEY",
}


@dataclass(frozen=True)
class VllmArgument:
    """One argument of the base image's vLLM, as its own parser named it when the image was built."""

    group: str
    flags: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Settings:
    """What one start does. Seconds for every duration.

    served_model_names: all are accepted. sources: attribute -> "flag", "environment", "image" or "default".
    mode_args: how the engine is run, and recorded: whether that is as recorded when the image was built: see
    runtime/state.py; float32: whether a 16-bit model is to be computed in that, None
    where only a measurement could tell; degraded: what else this start does without, and why.
    """

    manifest: Manifest
    host: str
    port: int
    served_model_names: tuple[str, ...]
    drain_delay: float
    drain_timeout: float
    phase_timeout: Deadlines
    api_key_file: str | None
    metrics_auth: str
    max_request_bytes: int
    log_format: str
    off: tuple[str, ...]
    event_loop: str
    engine_args: tuple[str, ...]
    sources: Mapping[str, str] = field(compare=False)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    mode_args: tuple[str, ...] = ()
    recorded: Mapping[str, str] = field(default_factory=dict)
    float32: bool | None = None
    degraded: tuple[str, ...] = ()

    @property
    def served_model_name(self) -> str:
        """The one that answers and metrics have."""
        return self.served_model_names[0]

    def vllm_args(self) -> list[str]:
        """The argument list for vLLM's own parser; the user's come last and win."""
        return [
            "--model",
            self.manifest.model_path,
            "--served-model-name",
            *self.served_model_names,
            *self.manifest.engine_args,
            *self.mode_args,
            *self.engine_args,
        ]

    def engine_value(self, *flags: str) -> str | None:
        """What the engine is given for an argument, by any of its names; None where it is not given."""
        found = None
        for flag, value in pairs((*self.manifest.engine_args, *self.mode_args, *self.engine_args)):
            if flag.split(".", 1)[0] in flags:
                found = value
        return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def load(
    argv: Sequence[str],
    environ: Mapping[str, str],
    manifest: Manifest,
    known: Sequence[VllmArgument] = (),
) -> Settings:
    """Flags over environment over the image over defaults. Raises SettingsError.

    known: the arguments of the image's vLLM; none: an unknown flag is left to vLLM's own parser.
    """
    _check_environment(environ)
    parser = _Parser(add_help=False, allow_abbrev=False)
    for option in OPTIONS:
        parser.add_argument(option.flag, dest=option.attribute, nargs="+" if option.several else None)
    arguments = [_dashed(argument) for argument in argv]
    given, rest = parser.parse_known_args(arguments)
    _check_engine_args(rest, known)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for option in OPTIONS:
        value, source = option.default, "default"
        text = getattr(given, option.attribute)
        name = option.flag
        if text is not None:
            source = "flag"
        elif option.variable in environ and not _is_kubernetes(option.variable, environ):
            text, name, source = environ[option.variable], option.variable, "environment"
        if text is not None:
            try:
                value = option.parse(text)
            except ValueError as error:
                raise SettingsError(f"{name} {error}, and is {text!r}") from None
        values[option.attribute], sources[option.attribute] = value, source
    if values["served_model_names"] is None:
        values["served_model_names"], sources["served_model_names"] = (manifest.served_model_name,), "image"
    settings = Settings(manifest=manifest, **values, engine_args=tuple(rest), sources=sources)
    _check_contradictions(settings, environ)
    return settings


def read_api_keys(settings: Settings, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Every key that opens the server; none: it is open. SettingsError where none is readable, or several."""
    given = [name for name in KEY_VARIABLES if name in environ]
    if settings.api_key_file is not None:
        given.append("--api-key-file")
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} are both set: give the API key in one way")
    if not given and settings.metrics_auth == "key":
        raise SettingsError("--metrics-auth key needs an API key: give --api-key-file FILE")
    if not given:
        return ()
    text = environ.get(given[0], "")
    if settings.api_key_file is not None:
        try:
            text = Path(settings.api_key_file).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise SettingsError(
                f"cannot read the API keys in {settings.api_key_file}: {reason}. "
                f"The server runs as user {os.getuid()}, group {os.getgid()}."
            ) from None
    where = settings.api_key_file or given[0]
    keys = tuple(key for line in text.splitlines() if (key := line.strip()))
    if not keys:
        raise SettingsError(f"{where} has no key: give one, or leave the setting out")
    if not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise SettingsError(f"{where}: a key is one word of ASCII characters, one key a line")
    return keys


def _check_environment(environ: Mapping[str, str]) -> None:
    known = [option.variable for option in OPTIONS] + list(_OTHER_VARIABLES)
    for name in environ:
        if name.startswith("COLDSTART_") and name not in known and not _is_kubernetes(name, environ):
            raise SettingsError(f"unknown environment variable {name}{_nearest(name, known)}")
    if environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        raise SettingsError(
            "VLLM_SERVER_DEV_MODE is set: its routes reset caches and put the engine to sleep. "
            "Unset it; an image serves."
        )


def _is_kubernetes(name: str, environ: Mapping[str, str]) -> bool:
    return bool(_KUBERNETES.fullmatch(name)) or (name.endswith("_PORT") and "://" in environ[name])


def _check_engine_args(rest: Sequence[str], known: Sequence[VllmArgument]) -> None:
    names = {flag for argument in known for flag in argument.flags}
    ours = {option.flag for option in OPTIONS}
    if rest and not rest[0].startswith("-"):
        raise SettingsError(f"unknown command {rest[0]!r}{_nearest(rest[0], COMMANDS)}")
    for argument in rest:
        flag = _flag(argument)
        if flag is None:
            continue
        if flag in _OWNED:
            raise SettingsError(f"{flag} cannot be set here: {_OWNED[flag]}")
        # -O3 and -qawq carry their value in the same word.
        short = not flag.startswith("--") and (flag[:2] == "-O" or flag[:2] in names)
        if names and flag not in names and not short:
            raise SettingsError(f"unknown flag {flag}{_nearest(flag, names | ours)}")


def _check_contradictions(settings: Settings, environ: Mapping[str, str]) -> None:
    if settings.log_format == "json":
        for name in ("--logging-config", "--log-config-file", "--disable-access-log-for-endpoints"):
            if settings.engine_value(name) is not None:
                raise SettingsError(f"{name} contradicts --log-format json: give one of the two")
        if environ.get("VLLM_LOGGING_CONFIG_PATH"):
            raise SettingsError("VLLM_LOGGING_CONFIG_PATH contradicts --log-format json: give one of the two")


def _dashed(argument: str) -> str:
    """`--drain_delay` as `--drain-delay`, as vLLM's parser reads it: up to the first "." or "="."""
    if not argument.startswith("--"):
        return argument
    return re.sub(r"^[^.=]*", lambda found: found[0].replace("_", "-"), argument)


def _flag(argument: str) -> str | None:
    """The flag's name in one word of a command line (`--a.b=c` is `--a`), None for a value."""
    if not re.match(r"-\D", argument):
        return None
    return re.split(r"[=.]", argument, maxsplit=1)[0]


def pairs(arguments: Iterable[str]) -> list[tuple[str, str]]:
    """(flag, value) of each argument; the value is "" where the flag stands alone."""
    pairs: list[tuple[str, str]] = []
    for argument in arguments:
        if _flag(argument) is None and pairs:
            flag, value = pairs[-1]
            pairs[-1] = flag, f"{value} {argument}".strip()
        else:
            flag, _, value = argument.partition("=")
            pairs.append((flag, value))
    return pairs


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]}?" if close else ". `--help` lists them all."


def describe(
    settings: Settings,
    environ: Mapping[str, str],
    known: Sequence[VllmArgument] = (),
    *,
    as_json: bool = False,
) -> str:
    """Each value with where it came from, as a table or as JSON; keys and tokens masked.

    known: as for `load`; an argument is then one row, by whichever of its names it is given.
    """
    names = {flag: argument.flags[0] for argument in known for flag in argument.flags if flag[:5] != "--no-"}
    rows = [
        {
            "name": option.flag,
            "value": _shown(getattr(settings, option.attribute), " " if option.several else ","),
            "from": settings.sources[option.attribute],
        }
        for option in OPTIONS
    ]
    rows += [{"name": "--model", "value": settings.manifest.model_path, "from": "image"}]
    mode = "recording" if settings.recorded.get("status") == "used" else "default"
    engine: dict[str, tuple[str, str]] = {}
    for source, arguments in (
        ("image", settings.manifest.engine_args),
        (mode, settings.mode_args),
        ("flag", settings.engine_args),
    ):
        engine |= {names.get(flag, flag): (value, source) for flag, value in pairs(arguments)}
    rows += [{"name": name, "value": value, "from": source} for name, (value, source) in engine.items()]
    shown = ("COLDSTART_MANIFEST", *KEY_VARIABLES)
    variables = [name for name in sorted(environ) if name.startswith("VLLM_") or name in shown]
    rows += [{"name": name, "value": environ[name], "from": "environment"} for name in variables]
    rows = [{**row, "value": _masked(row["name"], row["value"])} for row in rows]
    if as_json:
        return json.dumps(rows, indent=1)
    width = max(len(row["name"]) for row in rows)
    return "\n".join(f"{row['name']:{width}}  {row['from']:11}  {row['value']}" for row in rows)


def _masked(name: str, value: str) -> str:
    """A value without what must not be read: a secret's own, or one inside JSON or an address."""
    if _SECRET.search(name):
        return "***"
    value = _SECRET_INSIDE.sub(r"\1***", value)
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", value)


def _shown(value: Any, between: str = ",") -> str:
    """A setting's value as it would be given."""
    if isinstance(value, tuple):
        return between.join(value)
    return "" if value is None else str(value)


def help_text(known: Sequence[VllmArgument] = ()) -> str:
    """Every setting: ours, then vLLM's as the image's list has them, by group."""
    lines = [
        "usage: python3 -m runtime [serve] [FLAGS]",
        "",
        "Serve the baked model with vLLM. Flags win over environment variables, and these over the image.",
        "",
        "In place of `serve`: `warm --output FOLDER [--mode NAME] [--loaders] [FLAGS]` records a start,",
        "for `coldstart prewarm --from FOLDER`; `health` is for HEALTHCHECK; `switches` prints what --off",
        "can name; `golden` tells whether the running server answers as recorded; `fetch` downloads the",
        "model.",
        "",
        "Coldstart:",
    ]
    for option in OPTIONS:
        default = f" [{text}]" if (text := _shown(option.default)) else ""
        lines += _entry(f"{option.flag}, {option.variable}", option.help + default)
    for name, text in _OTHER_VARIABLES.items():
        lines += _entry(name, text)
    lines += _entry("--print-config[=json]", "Show each setting and where it came from, and exit.")
    lines += _entry("-h, --help", "Show this and exit.")
    lines += ["", "Optimisations that --off can name:"]
    for switch in switches.Switch:
        lines += _entry(switch.label, switch.help)
    if not known:
        lines += ["", "Every other flag goes to vLLM; this image has no list of them."]
    for group in dict.fromkeys(argument.group for argument in known):
        members = [argument for argument in known if argument.group == group]
        members = [a for a in members if not set(a.flags) & ({"--help"} | {o.flag for o in OPTIONS})]
        members = [a for a in members if not set(a.flags) & set(_OWNED)]
        if members:
            lines += ["", f"vLLM, {group}:"]
        for argument in members:
            lines += _entry(", ".join(argument.flags), argument.help)
    return "\n".join(lines)


def _entry(head: str, text: str) -> list[str]:
    return [f"  {head}", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def markdown_table() -> str:
    """The table of docs/operating.md."""
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for option in OPTIONS:
        default = f"`{text}`" if (text := _shown(option.default)) else ""
        rows.append(f"| `{option.flag}` | `{option.variable}` | {default} | {option.help} |")
    rows += [f"| | `{name}` | | {text} |" for name, text in _OTHER_VARIABLES.items()]
    return "\n".join(rows) + "\n"


def markdown_switches() -> str:
    """The table of optimisations in docs/operating.md."""
    rows = ["| `--off` | what is then left out |", "|---|---|"]
    rows += [f"| `{switch.label}` | {switch.help} |" for switch in switches.Switch]
    return "\n".join(rows) + "\n"


def manifest_path(environ: Mapping[str, str] = os.environ) -> Path:
    return Path(environ.get("COLDSTART_MANIFEST", str(MANIFEST_PATH)))


@dataclass(frozen=True)
class WarmOptions:
    """output: the folder to write to; mode: the one that is insisted on; loaders: whether to try them."""

    output: Path
    mode: str | None
    loaders: bool


def take_warm_options(argv: list[str]) -> WarmOptions:
    """Take `--output FOLDER`, `--mode NAME` and `--loaders` out of the arguments of `warm`.

    Raises SettingsError.
    """
    output, mode, loaders = _take(argv, "--output"), _take(argv, "--mode"), "--loaders" in argv
    if loaders:
        argv.remove("--loaders")
    if output is None:
        raise SettingsError("warm needs --output FOLDER, the folder to write to")
    return WarmOptions(Path(output), mode, loaders)


def _take(argv: list[str], flag: str) -> str | None:
    if flag not in argv:
        return None
    at = argv.index(flag)
    if at + 1 == len(argv):
        raise SettingsError(f"{flag} needs a value")
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


def read_manifest(environ: Mapping[str, str] = os.environ) -> Manifest:
    return Manifest.read(manifest_path(environ))


def read_vllm_arguments(environ: Mapping[str, str] = os.environ) -> tuple[VllmArgument, ...]:
    """The list beside the manifest; empty where the build could not ask the base's vLLM."""
    path = manifest_path(environ).with_name("vllm-arguments.json")
    try:
        return tuple(
            VllmArgument(entry["group"], tuple(entry["flags"]), entry["help"])
            for entry in json.loads(path.read_bytes())
        )
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is damaged ({error!r}): build the image again") from None
