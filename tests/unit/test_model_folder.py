from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import preflight, processes
from runtime.model_folder import problem
from runtime.settings import LockedFile, Manifest, load

MANIFEST = Manifest("/models/tiny", "tiny", "cpu", ())


def _expecting(root: Path, weights: str) -> Manifest:
    """A manifest of two files at `root`, which are written there."""
    contents = {"config.json": b"{}", "model.safetensors": b"x" * 99}
    root.mkdir(exist_ok=True)
    for name, content in contents.items():
        (root / name).write_bytes(content)
    files = tuple(LockedFile(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items())
    return replace(MANIFEST, model_path=str(root), weights=weights, files=files)


def test_mounted_folder_with_the_locked_files(tmp_path: Path) -> None:
    assert problem(_expecting(tmp_path / "tiny", "mount")) == ""


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "config.json").unlink(), "no config.json is there"),
        (lambda root: (root / "model.safetensors").unlink(), "model.safetensors at"),
        (lambda root: (root / "model.safetensors").write_bytes(b"cut"), "model.safetensors at"),
        (lambda root: (root / "config.json").write_bytes(b"[]"), "config.json at"),
    ],
)
def test_mounted_folder_that_is_another_is_told(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    manifest = _expecting(tmp_path / "tiny", "mount")
    damage(tmp_path / "tiny")
    found = problem(manifest)
    assert words in found
    assert f"-v FOLDER:{tmp_path / 'tiny'}:ro" in found


def test_weights_are_not_read_before_the_start(tmp_path: Path) -> None:
    manifest = _expecting(tmp_path / "tiny", "mount")
    large = LockedFile("model.safetensors", 16 << 20, "0" * 64)
    with (tmp_path / "tiny" / large.path).open("wb") as file:
        file.truncate(large.size)
    manifest = replace(manifest, files=(manifest.files[0], large))
    assert problem(manifest) == ""  # its digest is another
    with (tmp_path / "tiny" / large.path).open("wb") as file:
        file.truncate(large.size - 1)
    assert "model.safetensors at" in problem(manifest)


def test_download_wants_a_folder_that_it_may_write(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, weights="download", model_path=str(tmp_path / "models" / "tiny"))
    assert problem(manifest) == ""
    assert (tmp_path / "models" / "tiny").is_dir()
    (tmp_path / "file").touch()
    found = problem(replace(manifest, model_path=str(tmp_path / "file" / "tiny")))
    assert f"-v VOLUME:{tmp_path / 'file'} " in found


@pytest.mark.parametrize("weights", ["bake", "mount"])
def test_missing_model_ends_the_start_and_a_download_has_none_yet(tmp_path: Path, weights: str) -> None:
    missing = replace(MANIFEST, model_path=str(tmp_path / "none"), weights=weights)
    with pytest.raises(preflight.PreflightError, match=f"{tmp_path}/none"):
        preflight.check(load([], {}, missing), preflight.gather(missing, {}), {})
    download = replace(missing, weights="download")
    preflight.check(load([], {}, download), preflight.gather(download, {}), {})


def test_engine_processes_have_neither_token_nor_hub() -> None:
    environ = {"HF_TOKEN": "x", "HUGGING_FACE_HUB_TOKEN": "x", "HF_HUB_OFFLINE": "0", "HF_HOME": "/h"}
    processes.leave_hub(environ)
    assert environ == {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": "/h"}
