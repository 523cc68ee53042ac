"""Whether the model's folder is as an image without weights needs it: mounted whole, or writable."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from runtime.settings import Manifest

# Digests of mounted files are checked as far as this goes: reading weights here would delay every start.
_DIGEST_BYTES = 16 << 20


def problem(manifest: Manifest, deadline: float = math.inf) -> str:
    """What is wrong, and what to change; empty when nothing is. Makes the folder of a download.

    deadline: of time.monotonic(), after which no more digests are computed.
    """
    root = Path(manifest.model_path)
    if manifest.weights == "download":
        return _download_problem(root)
    return _mount_problem(manifest, root, deadline) if manifest.weights == "mount" else ""


def _download_problem(root: Path) -> str:
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return ""
    except OSError:
        pass
    return (
        f"this image downloads its model to {root}, which user {os.getuid()}:{os.getgid()} cannot write. "
        f"Mount a writable volume with `docker run -v VOLUME:{root.parent} …` (Kubernetes: an emptyDir, "
        "or a claim with fsGroup)."
    )


def _mount_problem(manifest: Manifest, root: Path, deadline: float) -> str:
    how = (
        f"Mount the model's folder with `docker run -v FOLDER:{root}:ro …` "
        "(Kubernetes: a volumeMount with readOnly: true)."
    )
    try:
        if not (root / "config.json").exists():
            return f"this image expects its model mounted at {root}, and no config.json is there. {how}"
        wrong = [file.path for file in manifest.files if not file.has_size(root)]
        for file in sorted(manifest.files, key=lambda file: file.size):
            if wrong or file.size >= _DIGEST_BYTES or time.monotonic() > deadline:
                break
            wrong = [] if file.is_whole(root, deadline) else [file.path]
    except OSError as error:
        return (
            f"user {os.getuid()}:{os.getgid()} cannot read {error.filename}: {error.strerror}. "
            "Make the mounted folder readable with `chmod -R a+rX FOLDER`."
        )
    return (
        f"{wrong[0]} at {root} is missing or not the file that this image was built for. {how}"
        if wrong
        else ""
    )
