"""What `coldstart bench` needs of Docker Engine, as benchmarks/ asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ImageFacts
from builder.docker_engine import Container, DockerEngine


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
        info = self._engine.require_image(image)
        return ImageFacts(reference=image, id=info.id, size=info.size, labels=dict(info.labels))

    def start(self, image: str, *, environment: Mapping[str, str], volumes: Mapping[str, str]) -> Container:
        on_gpu = self._engine.require_image(image).labels.get("dev.coldstart.device") == "cuda"
        return self._engine.start(image, gpus=on_gpu, environment=environment, volumes=volumes)

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
