"""A model whose configuration class is code of its own repository."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builder.docker_engine import Container
from tests.image.conftest import wait_until

ASK = Path(__file__).parent / "ask.py"

_CODE = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""


def test_code_of_the_repository_runs_in_the_image_only(
    model: str, tmp_path: Path, build: Callable[..., Any], start: Callable[..., Container]
) -> None:
    folder = tmp_path / "own-llama"
    folder.mkdir()
    for file in Path(model).iterdir():
        os.link(file, folder / file.name)
    config = json.loads((folder / "config.json").read_bytes())
    config.update(model_type="own_llama", auto_map={"AutoConfig": "own_config.OwnConfig"})
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_config.py").write_text(_CODE)

    built = build("own-llama:test", "--trust-remote-code", folder=folder)
    assert built["manifest"]["model"]["remote_code"] is True
    container = start(built["tag"], network="none", publish=False)
    wait_until(lambda: container.run(["python3", "-m", "runtime", "health"])[0] == 0, container)
    code, output = container.run(["python3", "-c", ASK.read_text()])
    assert code == 0, output
    assert "Paris" in json.loads(output.strip().splitlines()[-1])["chat"]
