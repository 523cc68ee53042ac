"""A model whose configuration class is code of its own repository."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builder.docker_engine import Container, DockerEngine
from tests.image.conftest import PREFIX, coldstart, wait_until
from tests.models import write_model

# Says where it runs by failing: what a build that fails shows is the end of the container's log.
_TELLS = """
import json, os, socket

said = {
    "user": os.getuid(),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "secrets": [name for name, value in os.environ.items() if "hf_planted" in value],
    "capabilities": [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")],
}
raise RuntimeError("SEEN " + json.dumps(said) + " NEES")
"""

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


def test_code_of_the_repository_runs_at_the_build_without_token_network_or_root(
    base: str, tmp_path: Path, engine: DockerEngine
) -> None:
    config = {"model_type": "own_llama", "auto_map": {"AutoConfig": "own_config.OwnConfig"}}
    folder = write_model(tmp_path / "telling", config=config)
    (folder / "own_config.py").write_text(_TELLS + _CODE)
    tag = f"{PREFIX}/telling:test"
    built = coldstart(
        *("build", str(folder), "--base", base, "-t", tag, "--trust-remote-code"),
        env={"HF_TOKEN": "hf_planted", "HUGGING_FACE_HUB_TOKEN": "hf_planted"},
    )
    try:
        assert built.code == 5
        assert "is built, but its start could not be recorded" in built.err
        said = re.search(r"SEEN (\{.*?\}) NEES", built.err)
        assert said, built.err
        assert json.loads(said[1]) == {
            "user": 2000,
            "interfaces": ["lo"],
            "secrets": [],
            "capabilities": ["0" * 16],
        }
    finally:
        labels = engine.require_image(tag).labels
        engine.remove_image(tag)
        engine.remove_image(f"coldstart/weights:{labels['dev.coldstart.weights.key'][:16]}")
