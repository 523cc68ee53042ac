"""What the container engine is asked for: the server's arguments and the GPUs, for images of any maker."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.docker_host import DockerHost
from builder.docker_engine import ImageInfo
from builder.errors import InputError


class StubEngine:
    """An engine with one image, which keeps what it is asked to start."""

    def __init__(self, labels: dict[str, str], *, has_gpus: bool) -> None:
        self.labels, self.has_gpus = labels, has_gpus
        self.asked: dict[str, Any] = {}

    def require_image(self, image: str) -> ImageInfo:
        assert image in ("vllm/vllm-openai:v0.32.0", "sha256:1")
        return ImageInfo("sha256:1", "linux/amd64", (), (), 9, self.labels, (), "", (), {})

    def start(self, image: str, **options: Any) -> None:
        self.asked = {"image": image, **options}


def test_the_arguments_behind_an_image_are_its_servers() -> None:
    engine = StubEngine({}, has_gpus=True)
    host = DockerHost(engine)  # type: ignore[arg-type]
    facts = host.image_facts("vllm/vllm-openai:v0.32.0 --model Qwen/Qwen3-8B --chat-template '{{ x }}'")
    assert facts.tag == "vllm/vllm-openai:v0.32.0"
    assert facts.reference.endswith("'{{ x }}'")
    host.start(facts.id, arguments=facts.arguments, environment={}, volumes={})
    assert engine.asked["image"] == "sha256:1"
    assert engine.asked["arguments"] == ("--model", "Qwen/Qwen3-8B", "--chat-template", "{{ x }}")
    with pytest.raises(InputError, match="is no image"):
        host.image_facts("vllm/vllm-openai:v0.32.0 'unfinished")


@pytest.mark.parametrize(
    ("labels", "has_gpus", "given"),
    [
        ({}, True, True),  # another maker's: what it serves on is not known
        ({}, False, False),
        ({"dev.coldstart.device": "cpu"}, True, False),
        ({"dev.coldstart.base.device": "cpu"}, True, False),  # stock vLLM on the CPU base
        ({"dev.coldstart.device": "cuda"}, False, True),  # the engine says what is wrong
    ],
)
def test_gpus_go_to_images_that_want_them(labels: dict[str, str], has_gpus: bool, given: bool) -> None:
    engine = StubEngine(labels, has_gpus=has_gpus)
    DockerHost(engine).start("sha256:1", arguments=(), environment={}, volumes={})  # type: ignore[arg-type]
    assert engine.asked["gpus"] is given
