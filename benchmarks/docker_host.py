"""What `coldstart bench` needs of Docker Engine, as benchmarks/ asks for it."""

from __future__ import annotations

from benchmarks.harness import ImageFacts
from builder.docker_engine import Container, DockerEngine


class DockerHost:
    """Implements benchmarks.harness.ContainerHost."""

    def __init__(self, engine: DockerEngine) -> None:
        self._engine = engine

    def image_facts(self, image: str) -> ImageFacts:
        info = self._engine.require_image(image)
        return ImageFacts(reference=image, id=info.id, size=info.size, labels=dict(info.labels))

    def start(self, image: str) -> Container:
        on_gpu = self._engine.require_image(image).labels.get("dev.coldstart.device") == "cuda"
        return self._engine.start(image, gpus=on_gpu)
