"""Docker Engine through its SDK. The only module that imports docker."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import docker
import docker.errors
import docker.types
import requests
import urllib3.exceptions

from builder import context, probe
from builder.errors import BuildError, HostError, InputError
from builder.plan import PORT, BaseImage, Device
from builder.render import Rendered
from builder.report import Reporter, Task

# Everything of ours is named and labelled, so that clean-up can end exactly that.
CONTAINER_PREFIX = "coldstart-"
_DEVICE_LABEL = "dev.coldstart.base.device"
_API_TIMEOUT_SECONDS = 600
_ERROR_LINES = 40
# How long an engine may take to notice that a build's client is gone.
_LEFTOVER_SECONDS = 30.0
# A stream that breaks in the middle raises urllib3's own error.
_ENGINE_ERRORS = (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError)
_TOOL_LABEL = {"dev.coldstart.tool": "cli"}  # on containers of ours, so that clean-up ends exactly these

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT[\d:]+(\.\d+)?Z$")

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageInfo:
    """What the engine says of an image. size in bytes; layers are digests of their tar."""

    id: str
    platform: str
    tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size: int
    labels: Mapping[str, str]
    environment: tuple[str, ...]
    user: str
    layers: tuple[str, ...]
    config: Mapping[str, Any]


class DockerEngine:
    """A connection to the engine that DOCKER_HOST or the current context names."""

    def __init__(self) -> None:
        try:
            self._client = docker.from_env(timeout=_API_TIMEOUT_SECONDS)
            version = self._client.version()
        except _ENGINE_ERRORS as error:
            raise HostError(
                "no Docker Engine answers",
                why=f"{_short(error)}.",
                fix="Start it, or point DOCKER_HOST to one.",
            ) from None
        self.version = f"{version.get('Version')} ({version.get('Os')}/{version.get('Arch')})"
        info = self._client.info()
        self.data_root = str(info.get("DockerRootDir", "/var/lib/docker"))
        self.has_gpus = "nvidia" in (info.get("Runtimes") or {})
        # As the client writes a Unix socket; over TCP or ssh it may be any machine.
        self.is_local = self._client.api.base_url == "http+docker://localhost"

    # Images

    def image(self, reference: str) -> ImageInfo | None:
        try:
            data = self._client.api.inspect_image(reference)  # type: ignore[no-untyped-call]
        except docker.errors.ImageNotFound:
            return None
        except _ENGINE_ERRORS as error:
            raise InputError(f"{reference!r} is not an image name", why=_short(error)) from None
        config = data.get("Config") or {}
        return ImageInfo(
            id=data["Id"],
            platform=f"{data['Os']}/{data['Architecture']}",
            tags=tuple(data.get("RepoTags") or ()),
            repo_digests=tuple(data.get("RepoDigests") or ()),
            size=data["Size"],
            labels=config.get("Labels") or {},
            environment=tuple(config.get("Env") or ()),
            user=config.get("User") or "",
            layers=tuple(data["RootFS"].get("Layers") or ()),
            config=config,
        )

    def require_image(self, reference: str) -> ImageInfo:
        found = self.image(reference)
        if found is None:
            raise InputError(
                f"there is no image {reference!r} here", fix="Build it, or `docker pull` it first."
            )
        return found

    def ensure_image(self, reference: str, platform: str | None, reporter: Reporter) -> ImageInfo:
        """Pull the image if it is not here. Raises InputError."""
        if self.image(reference) is None:
            self._pull(reference, platform, reporter)
        return self.require_image(reference)

    def base_image(self, reference: str, platform: str | None, reporter: Reporter) -> BaseImage:
        """Pull the base if it is not here, and look into it. Raises InputError or HostError."""
        info = self.ensure_image(reference, platform, reporter)
        if not _is_for(info, platform):
            with contextlib.suppress(InputError):  # the registry may have it for that platform too
                self._pull(reference, platform, reporter)
        info = self.require_image(reference)
        if not _is_for(info, platform):
            raise InputError(
                f"{reference} is for {info.platform}, and {platform} is asked for",
                fix="Give a --base for that platform.",
            )
        code, output = self._run(reference, ["python3", "-c", probe.BASE_FACTS])
        facts = probe.parse_base_facts(reference, output if code == 0 else output or f"exit code {code}")
        device: Device = "cpu" if info.labels.get(_DEVICE_LABEL) == "cpu" else "cuda"
        return BaseImage(reference, info.id, device, facts.vllm)

    def check_engine_args(self, base: BaseImage, arguments: Sequence[str]) -> None:
        """Ask the base's own vLLM parser. Raises InputError with what it says."""
        code, output = self._run(base.reference, ["python3", "-c", probe.PARSE_ENGINE_ARGS, *arguments])
        if code != 0:
            raise InputError(
                f"vLLM {base.vllm_version} does not accept these engine arguments",
                why=probe.parser_complaint(output),
                fix="See `vllm serve --help` of that version.",
            )

    def list_engine_args(self, base: BaseImage) -> str | None:
        """Every argument that the base's vLLM takes, as JSON; None where it cannot tell."""
        code, output = self._run(base.reference, ["python3", "-c", probe.LIST_ENGINE_ARGS])
        return probe.parse_argument_list(output) if code == 0 else None

    def build(
        self,
        rendered: Rendered,
        tag: str,
        *,
        label: str,
        platform: str | None,
        reporter: Reporter,
        network: str | None = None,
    ) -> str:
        """Build and tag; returns the image id. On failure or Ctrl-C nothing of it is left.

        label: "name=value" that the Dockerfile gives its images first of all; it tells the leftovers of
        this build from everybody else's. Raises BuildError with the failed step's own output.
        """
        before = self._untagged(label)
        log: list[str] = []
        output = None
        try:
            with reporter.task(f"Sending {tag}", context.size(rendered)) as task:
                output = self._client.api.build(
                    fileobj=cast(Any, context.stream(rendered, task.advance)),
                    custom_context=True,
                    tag=tag,
                    platform=platform,
                    network_mode=network,
                    rm=True,
                    forcerm=True,
                    decode=True,
                )
            for message in output:
                _follow(message, tag, log, reporter)
        except BaseException as error:
            del output  # closes the connection, which makes the engine stop
            self._remove_leftovers(label, before)
            if not isinstance(error, _ENGINE_ERRORS):
                raise
            raise BuildError(
                f"Docker Engine could not build {tag}", why=_short(error), log="\n".join(log[-_ERROR_LINES:])
            ) from None
        found = self.image(tag)
        if found is None:
            raise BuildError(f"the build of {tag} ended without an image", log="\n".join(log[-_ERROR_LINES:]))
        return found.id

    def remove_untagged(self, label: str) -> None:
        """Remove what no tag names and has this label: stages and replaced builds of our own."""
        for image in self._untagged(label):
            with contextlib.suppress(*_ENGINE_ERRORS):
                self._client.api.remove_image(image)

    def _untagged(self, label: str) -> set[str]:
        filters = {"dangling": True, "label": label}
        return {image["Id"] for image in self._client.api.images(filters=filters)}

    def _remove_leftovers(self, label: str, before: set[str]) -> None:
        """The engine ends a step only some moments after its client is gone, so look more than once."""
        quiet = 0
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        with contextlib.suppress(*_ENGINE_ERRORS):
            while quiet < 4 and time.monotonic() < deadline:
                left = self._untagged(label) - before
                quiet = 0 if left else quiet + 1
                for image in left:
                    with contextlib.suppress(*_ENGINE_ERRORS):
                        self._client.api.remove_image(image)
                time.sleep(0.25)

    def remove_image(self, reference: str) -> None:
        """Nothing happens if it is not there. Raises HostError while a container uses it."""
        try:
            self._client.api.remove_image(reference)
        except docker.errors.ImageNotFound:
            pass
        except _ENGINE_ERRORS as error:
            raise HostError(f"cannot remove {reference}", why=_short(error)) from None

    def push(self, tag: str, reporter: Reporter) -> str:
        """Push with the engine's own credentials; returns the registry's digest. Raises BuildError."""
        digest = ""
        try:
            with reporter.task(f"Pushing {tag}", None) as task:
                for message in self._stream(self._client.api.push(tag, stream=True, decode=True), task):
                    digest = (message.get("aux") or {}).get("Digest", digest)
        except _ENGINE_ERRORS as error:
            raise BuildError(
                f"cannot push {tag}", why=_short(error), fix="Check the registry's login."
            ) from None
        if not digest:
            raise BuildError(f"the registry gave no digest for {tag}", fix="Push again.")
        return digest

    def _pull(self, reference: str, platform: str | None, reporter: Reporter) -> None:
        reporter.step(f"Pulling {reference}")
        try:
            with reporter.task(f"Pulling {reference}", None) as task:
                for _ in self._stream(
                    self._client.api.pull(reference, stream=True, decode=True, platform=platform), task
                ):
                    pass
        except (*_ENGINE_ERRORS, BuildError) as error:
            why = error.why if isinstance(error, BuildError) else _short(error)
            raise InputError(
                f"cannot get the base image {reference}", why=why, fix="Check the name, or give --base."
            ) from None

    def _stream(self, messages: Any, task: Task) -> Iterator[Mapping[str, Any]]:
        """Messages of a push or pull; bytes go to the task, errors are raised."""
        seen: dict[str, int] = {}
        for message in messages:
            if "error" in message:
                raise BuildError("the registry refused", why=str(message["error"]).strip())
            done = (message.get("progressDetail") or {}).get("current")
            layer = f"{message.get('id')} {message.get('status')}"
            if done:
                task.advance(max(0, done - seen.get(layer, 0)))
                seen[layer] = max(done, seen.get(layer, 0))
            yield message

    # Files of an image, without running it

    @contextlib.contextmanager
    def open_files(self, image: str) -> Iterator[Callable[[str], Iterator[tuple[tarfile.TarInfo, Any]]]]:
        """Yields a function: absolute folder -> (tar header, file object or None) of everything below it."""
        container = _name()
        try:
            self._client.api.create_container(image, entrypoint=["none"], name=container, labels=_TOOL_LABEL)

            def walk(folder: str) -> Iterator[tuple[tarfile.TarInfo, Any]]:
                try:
                    chunks, _ = self._client.api.get_archive(container, folder)
                except docker.errors.NotFound:
                    return
                yield from _entries(chunks)

            yield walk
        finally:
            self._remove(container)

    def history(self, image: str) -> list[Mapping[str, Any]]:
        return list(self._client.api.history(image))  # type: ignore[no-untyped-call]

    def layer_folders(self, image: str) -> list[Path]:
        """Where the engine keeps the files of an image, one folder a layer. Raises HostError."""
        driver = self._client.api.inspect_image(image).get("GraphDriver") or {}  # type: ignore[no-untyped-call]
        data = driver.get("Data") or {}
        folders = [data.get("UpperDir"), *str(data.get("LowerDir") or "").split(":")]
        if not data.get("UpperDir"):
            raise HostError(
                f"the engine does not say where it keeps the files of {image}",
                why=f"Its storage driver is {driver.get('Name') or 'unknown'}.",
                fix="Use the overlay2 driver.",
            )
        return [Path(folder) for folder in folders if folder]

    # Registry

    def registry_digest(self, reference: str) -> str:
        """`repository@sha256:...` of a local image, confirmed by the registry. Raises InputError.

        The engine asks, so that its credentials, certificates and mirrors are used.
        """
        repository = _repository(reference)
        known = [d for d in self.require_image(reference).repo_digests if d.split("@")[0] == repository]
        if not known:
            raise InputError(
                f"{reference} was never pushed to, or pulled from, {repository}",
                fix="Push it first: a benchmark removes no image that it cannot get back.",
            )
        try:
            self._client.api.inspect_distribution(known[0])  # type: ignore[no-untyped-call]
        except _ENGINE_ERRORS as error:
            raise InputError(
                f"the registry does not confirm {known[0]}",
                why=_short(error),
                fix="Push it again, or check the registry; nothing was removed.",
            ) from None
        return known[0]

    def pull_digest(self, digest: str, tag: str, patience: float) -> Iterator[Mapping[str, Any]]:
        """Pull `repository@sha256:...` and give it `tag`; the engine's messages. Raises BuildError.

        patience: seconds without a message after which the pull is given up. Leaving the generator early
        ends the pull too.
        """
        client = docker.from_env()  # of its own: closing its connection makes the engine stop
        post = client.api.post
        # docker-py would wait for ever.
        client.api.post = lambda url, **options: post(url, **{**options, "timeout": patience})  # type: ignore[method-assign]
        try:
            for message in client.api.pull(digest, stream=True, decode=True):
                if "error" in message:
                    raise BuildError(f"cannot pull {digest}", why=str(message["error"]).strip())
                yield message
            repository, _, name = _with_tag(tag).rpartition(":")
            self._client.api.tag(digest, repository, name)
        except _ENGINE_ERRORS as error:
            raise BuildError(f"cannot pull {digest}", why=_short(error), fix="Check the registry.") from None
        finally:
            client.close()

    # Volumes

    def create_volume(self, image: str) -> tuple[str, Path]:
        """An empty volume that every user may write to; its name and its folder on the engine's machine.

        image: any that has `chmod`, to open the volume with.
        """
        name = _name()
        try:
            made = self._client.api.create_volume(name, labels=_TOOL_LABEL)
            code, output = self._run(image, ["chmod", "1777", "/volume"], user="0", volumes={name: "/volume"})
            if code != 0:
                raise HostError("cannot prepare a volume", why=output.strip()[-200:])
        except BaseException as error:
            self.remove_volume(name)
            if not isinstance(error, _ENGINE_ERRORS):
                raise
            raise HostError("cannot make a volume", why=_short(error)) from None
        return name, Path(made["Mountpoint"])

    def remove_volume(self, name: str) -> None:
        """Nothing happens if it is not there. Raises HostError while a container uses it."""
        try:
            self._client.api.remove_volume(name, force=True)
        except _ENGINE_ERRORS as error:
            raise HostError(f"cannot remove volume {name}", why=_short(error)) from None

    def volume_is_empty(self, image: str, name: str) -> bool:
        code, output = self._run(image, ["ls", "-A", "/volume"], user="0", volumes={name: "/volume"})
        return code == 0 and not output.strip()

    # Containers

    def _run(
        self,
        image: str,
        command: Sequence[str],
        *,
        user: str | None = None,
        volumes: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """Run once, with no network, and return the exit code and all output."""
        container = _name()
        try:
            self._client.api.create_container(
                image,
                entrypoint=[command[0]],
                command=list(command[1:]),
                name=container,
                labels=_TOOL_LABEL,
                user=user,
                host_config=self._client.api.create_host_config(network_mode="none", mounts=_mounts(volumes)),
            )
            self._client.api.start(container)
            code = self._client.api.wait(container)["StatusCode"]
            return code, self._client.api.logs(container).decode(errors="replace")
        except docker.errors.APIError as error:
            return 127, _short(error)  # the command is not in the image
        finally:
            self._remove(container)

    def _remove(self, container: str) -> None:
        """By its name, which we chose: an interrupted create may have made it without telling us its id."""
        with contextlib.suppress(docker.errors.NotFound):
            self._client.api.remove_container(container, force=True, v=True)

    def start(
        self,
        image: str,
        *,
        arguments: Sequence[str] = (),
        network: str | None = None,
        publish: bool = True,
        gpus: bool = False,
        environment: Mapping[str, str] | None = None,
        volumes: Mapping[str, str] | None = None,
        health_checks: bool = True,
    ) -> Container:
        """Create and start; the serving port is published on a free port of 127.0.0.1.

        gpus: give it all of them, as `docker run --gpus all` does; volumes: name -> folder inside, where a
        name that is an absolute path is a folder of the engine's machine, mounted read-only.
        """
        api = self._client.api
        created_at = time.time()
        container = _name()
        all_gpus = [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
        try:
            api.create_container(
                image,
                command=list(arguments) or None,
                name=container,
                labels=_TOOL_LABEL,
                ports=[PORT] if publish else None,
                environment=dict(environment or {}),
                healthcheck=None if health_checks else {"test": ["NONE"]},
                host_config=api.create_host_config(
                    network_mode=network,
                    port_bindings={PORT: ("127.0.0.1", None)} if publish else None,
                    device_requests=all_gpus if gpus else None,
                    mounts=_mounts(volumes),
                ),
            )
            api.start(container)
        except BaseException as error:
            self._remove(container)
            if not isinstance(error, _ENGINE_ERRORS):
                raise
            raise HostError(f"cannot start a container of {image}", why=_short(error)) from None
        return Container(self._client, container, created_at)


def _mounts(volumes: Mapping[str, str] | None) -> list[docker.types.Mount]:
    """A folder that is not there is the engine's error; as a bind it would be made, and be empty."""
    return [
        docker.types.Mount(folder, name, type="bind", read_only=True)
        if name.startswith("/")
        # no_copy: what the image has at that place must not fill the volume
        else docker.types.Mount(folder, name, type="volume", no_copy=True)
        for name, folder in (volumes or {}).items()
    ]


def _repository(reference: str) -> str:
    """Without tag and digest, as repo digests name it."""
    return _with_tag(reference.split("@")[0]).rpartition(":")[0]


def _with_tag(reference: str) -> str:
    return reference if ":" in reference.rpartition("/")[2] else f"{reference}:latest"


def _is_for(info: ImageInfo, platform: str | None) -> bool:
    """platform: os/architecture, with an optional variant that the engine does not tell apart."""
    return platform is None or info.platform == "/".join(platform.split("/")[:2])


def _engine_errors(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """The engine's refusals as HostError: a container that somebody removed, an engine that stopped."""

    @functools.wraps(method)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(*args, **kwargs)
        except _ENGINE_ERRORS as error:
            raise HostError(
                f"Docker Engine could not {method.__name__} a container", why=_short(error)
            ) from None

    return wrapper


class Container:
    """A container that we started. created_at: epoch seconds just before it was created.

    Every method raises HostError when the engine refuses.
    """

    def __init__(self, client: docker.DockerClient, id: str, created_at: float) -> None:
        self._api = client.api
        self.id, self.created_at = id, created_at

    def _state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._api.inspect_container(self.id)["State"]
        return state

    @_engine_errors
    def host_port(self) -> int:
        """Raises HostError when the container died before its port was there."""
        ports = self._api.inspect_container(self.id)["NetworkSettings"]["Ports"] or {}
        bound = ports.get(f"{PORT}/tcp")
        if not bound:
            raise HostError(f"container {self.id[:12]} has no published port", why="It is not running.")
        return int(bound[0]["HostPort"])

    @_engine_errors
    def address(self) -> str:
        """Its own address. Behind a published port a proxy may accept connections in its place."""
        networks = self._api.inspect_container(self.id)["NetworkSettings"]["Networks"]
        return next(str(network["IPAddress"]) for network in networks.values())

    @_engine_errors
    def running(self) -> bool:
        return bool(self._state()["Running"])

    @_engine_errors
    def exit_code(self) -> int | None:
        state = self._state()
        return None if state["Running"] else int(state["ExitCode"])

    @_engine_errors
    def pid(self) -> int:
        """Of its first process, as the engine's machine counts; 0 when it does not run."""
        return int(self._state()["Pid"])

    @_engine_errors
    def started_at(self) -> float:
        """Epoch seconds of the engine's start of the first process."""
        return _epoch(self._state()["StartedAt"])

    @_engine_errors
    def timed_logs(self) -> list[tuple[float, str]]:
        """Each line of output so far, and when the engine received it, in epoch seconds."""
        return parse_timed_log(self._api.logs(self.id, timestamps=True).decode(errors="replace"))

    @_engine_errors
    def health(self) -> str:
        """HEALTHCHECK's verdict: starting, healthy or unhealthy."""
        return str((self._state().get("Health") or {}).get("Status", "none"))

    @_engine_errors
    def logs(self) -> str:
        return self._api.logs(self.id).decode(errors="replace")

    @_engine_errors
    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a command inside; exit code and output."""
        job = self._api.exec_create(self.id, list(command))["Id"]
        output = self._api.exec_start(job).decode(errors="replace")
        return int(self._api.exec_inspect(job)["ExitCode"]), output

    def wait_for(self, command: Sequence[str], seconds: float) -> bool:
        """Run a command inside until it succeeds; False when the container ended or time is up before."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            if self.run(command)[0] == 0:
                return True
            time.sleep(0.5)
        return False

    @_engine_errors
    def files(self, folder: str) -> dict[str, bytes]:
        """The content of every file right below an absolute folder; running or not. Empty without it."""
        try:
            chunks, _ = self._api.get_archive(self.id, folder)
        except docker.errors.NotFound:
            return {}
        return {entry.name.split("/", 1)[1]: file.read() for entry, file in _entries(chunks) if file}

    @_engine_errors
    def signal(self, name: str) -> None:
        self._api.kill(self.id, signal=name)

    @_engine_errors
    def wait(self, timeout: int) -> int:
        return int(self._api.wait(self.id, timeout=timeout)["StatusCode"])

    @_engine_errors
    def stop(self, timeout: int) -> int:
        """SIGTERM, then SIGKILL after `timeout` seconds; returns the exit code."""
        self._api.stop(self.id, timeout=timeout)
        return int(self._state()["ExitCode"])

    @_engine_errors
    def remove(self) -> None:
        with contextlib.suppress(docker.errors.NotFound):
            self._api.remove_container(self.id, force=True, v=True)


def _follow(message: Mapping[str, Any], tag: str, log: list[str], reporter: Reporter) -> None:
    """Keep and show a line of the engine's build output. Raises BuildError where it reports an error."""
    if "error" in message:
        raise BuildError(
            f"building {tag} failed",
            why=str(message["error"]).strip(),
            fix="What the step printed stands above.",
            log="\n".join(log[-_ERROR_LINES:]),
        )
    for line in str(message.get("stream", "")).splitlines():
        text = line.strip()
        if text:
            log.append(text)
        if re.match(r"Step \d+/\d+ :", text):
            reporter.note(text[:140])


class _Reader:
    """A file object over chunks, as much of one as tarfile's stream mode needs."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        parts = [self._rest]
        have = len(self._rest)
        while have < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]


def _entries(chunks: Iterator[bytes]) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    with tarfile.open(fileobj=cast(Any, _Reader(chunks)), mode="r|") as archive:
        for entry in archive:
            yield entry, archive.extractfile(entry) if entry.isfile() else None


def parse_timed_log(text: str) -> list[tuple[float, str]]:
    """(epoch seconds, line) of each line that the engine stamped; only a line feed ends a line."""
    pairs = (line.split(" ", 1) for line in text.split("\n"))
    return [(_epoch(at), rest[0] if rest else "") for at, *rest in pairs if _STAMP.match(at)]


def _epoch(stamp: str) -> float:
    """RFC 3339 with nanoseconds, in UTC, which datetime reads only up to microseconds."""
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def _name() -> str:
    return f"{CONTAINER_PREFIX}{uuid.uuid4().hex[:12]}"


def _short(error: Exception) -> str:
    """The engine's own words, without the HTTP wrapping."""
    explanation = getattr(error, "explanation", None)
    if isinstance(explanation, bytes):
        explanation = explanation.decode(errors="replace")
    if isinstance(explanation, str):
        with contextlib.suppress(ValueError, AttributeError):
            explanation = json.loads(explanation)["message"]
    return " ".join(str(explanation or error).split())[:400]
