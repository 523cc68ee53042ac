"""What can be told in milliseconds, before anything is imported: may this start work at all?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtime.settings import Manifest


class PreflightError(Exception):
    """This container cannot serve this model. The message ends with what to change."""


# NVIDIA's container toolkit mounts the first; WSL 2 offers the second.
_GPU_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def check(manifest: Manifest, exists: Callable[[Path], bool] = Path.exists) -> None:
    """Raises PreflightError on the first thing that is missing."""
    if manifest.device == "cuda" and not any(exists(node) for node in _GPU_NODES):
        raise PreflightError(
            "no NVIDIA GPU is visible in this container, and this image serves on one. "
            "Start it with `docker run --gpus all …` (NVIDIA Container Toolkit), or in Kubernetes "
            "request `nvidia.com/gpu: 1`; for a node without a GPU build with a CPU base image."
        )
    if not exists(Path(manifest.model_path) / "config.json"):
        raise PreflightError(
            f"the model is not at {manifest.model_path}. "
            "A volume mounted over it hides the baked files: mount it elsewhere."
        )
