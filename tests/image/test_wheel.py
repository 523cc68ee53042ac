"""The built wheel in an empty environment: what users install from an index."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from tests.models import write_model

ROOT = Path(__file__).parents[2]


def test_wheel_in_an_empty_environment_renders(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path / "dist"), str(ROOT)], check=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env" / "bin"
    subprocess.run([str(bin_folder / "pip"), "--quiet", "install", str(wheel)], check=True)
    folder = write_model(tmp_path / "tiny")
    # Isolated from the checkout, and with no engine: rendering needs neither.
    done = subprocess.run(
        [str(bin_folder / "coldstart"), "render", "-o", str(tmp_path / "out"), str(folder)],
        env={"PATH": str(bin_folder), "HOME": str(tmp_path), "DOCKER_HOST": "unix:///no/engine.sock"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("docker build") == 2
    image = tmp_path / "out" / "image"
    assert (image / "Dockerfile").read_text().startswith("# ")
    assert (image / "coldstart" / "runtime" / "__main__.py").is_file()
    assert "FROM vllm/vllm-openai:v0.32.0" in (tmp_path / "out" / "weights" / "Dockerfile").read_text()
