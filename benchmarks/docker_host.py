"""What `coldstart bench` needs of Docker Engine, as benchmarks/ asks for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import ImageFacts
from builder.docker_engine import Container, DockerEngine
from builder.errors import InputError
from builder.verify import read_manifest

_OURS = "dev.coldstart.version"
_LIST_SECONDS = 60


@dataclass(frozen=True, slots=True)
class DockerVolume:
    """Implements benchmarks.harness.Volume. image: any, to look into it with."""

    engine: DockerEngine
    image: str
    name: str
    folder: Path

    def empty(self) -> bool:
        return self.engine.volume_is_empty(self.image, self.name)

    def remove(self) -> None:
        self.engine.remove_volume(self.name)


class DockerHost:
    """Implements benchmarks.harness.ContainerHost."""

    def __init__(self, engine: DockerEngine) -> None:
        self._engine = engine

    def image_facts(self, image: str) -> ImageFacts:
        """image: its name, and behind it the server's arguments, as in `docker run`. Raises InputError."""
        try:
            name, *arguments = shlex.split(image)
        except ValueError as error:
            raise InputError(
                f"{image!r} is no image", why=str(error), fix="Quote it as a shell would."
            ) from None
        info = self._engine.require_image(name)
        facts = ImageFacts(image, info.id, info.size, dict(info.labels), arguments=tuple(arguments))
        if _OURS not in info.labels:
            return facts
        manifest = read_manifest(self._engine, name)
        model = manifest["model"]
        return replace(
            facts,
            weights=manifest.get("weights", "bake"),
            weight_bytes=sum(f["size"] for f in model["files"] if f["path"].endswith(".safetensors")),
            model_path=model["path"],
        )

    def switches(self, image: str) -> tuple[str, ...]:
        """The optimisations that the image's runtime can be started without. Raises InputError."""
        name = image.partition(" ")[0]
        container = self._engine.start(name, arguments=["switches"], network="none", publish=False)
        try:
            code, output = container.wait(_LIST_SECONDS), container.logs()
        finally:
            container.remove()
        try:
            if code == 0:
                return tuple(str(entry["name"]) for entry in json.loads(output))
        except (ValueError, TypeError, KeyError):
            pass
        raise InputError(
            f"{image} does not say which optimisations it has",
            why=f"`docker run {name} switches` ended with code {code}: {output.strip()[-200:]!r}.",
            fix="Build it with this version of Coldstart.",
        )

    def start(
        self,
        image: str,
        *,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        volumes: Mapping[str, str],
    ) -> Container:
        """Other makers' images do not say what they serve on: they get the GPUs where there are any."""
        labels = self._engine.require_image(image).labels
        device = labels.get("dev.coldstart.device") or labels.get("dev.coldstart.base.device")
        return self._engine.start(
            image,
            arguments=arguments,
            gpus=device == "cuda" or (device is None and self._engine.has_gpus),
            environment=environment,
            volumes=volumes,
        )

    def image_folders(self, image: str) -> list[Path]:
        return self._engine.layer_folders(image)

    def new_volume(self, image: str) -> DockerVolume:
        return DockerVolume(self._engine, image, *self._engine.create_volume(image))

    def registry_digest(self, reference: str) -> str:
        return self._engine.registry_digest(reference)

    def remove_image(self, reference: str) -> None:
        self._engine.remove_image(reference)

    def pull(self, digest: str, tag: str, patience: float) -> Iterator[Mapping[str, Any]]:
        return self._engine.pull_digest(digest, tag, patience)
