"""A token that a download needs is nowhere: not in the quantizer, not in any byte of `docker save`."""

from __future__ import annotations

import base64
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from builder.docker_engine import DockerEngine
from tests.hub import serve
from tests.image.conftest import PREFIX, Finished, share_quantizer, tiny_models

_CHUNK = 4 << 20
_OVERLAP = 256  # longer than anything that is looked for


def _forms(text: str) -> list[bytes]:
    """As it is, and in base64 wherever it begins in what is encoded."""
    shifted = [base64.b64encode(b"\0" * shift + text.encode())[4:-4] for shift in range(3)]
    return [text.encode(), base64.b64encode(text.encode()), *shifted]


def _saved(image: str) -> Iterator[bytes]:
    """The image as a tar, layers uncompressed, in pieces that overlap."""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as process:
        assert process.stdout
        end = b""
        while piece := process.stdout.read(_CHUNK):
            yield end + piece
            end = piece[-_OVERLAP:]
    assert process.returncode == 0


def _descendants(pid: int) -> Iterator[Path]:
    """The folders in /proc of every process below one."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield Path(f"/proc/{child}")
                yield from _descendants(int(child))


def _watched_build(
    arguments: list[str], environ: dict[str, str], cache: Path
) -> tuple[Finished, dict[str, bytes], set[bytes]]:
    """Runs `coldstart build`; also what was seen meanwhile: the environment of each program below it by its
    command line, and the files that the quantizer's job reads and writes until it is done.
    """
    programs: dict[str, bytes] = {}
    files: set[bytes] = set()
    out, err = cache / "out", cache / "err"
    command = [str(Path(sys.executable).parent / "coldstart"), "build", *arguments]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=stdout, stderr=stderr)
        while process.poll() is None:
            for folder in _descendants(process.pid):
                with suppress(OSError):
                    # In this order: a fork has its parent's environment until it runs another program.
                    program = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if "coldstart build" not in program:
                        programs[program] = (folder / "environ").read_bytes()
            for path in (*cache.glob("quantized/.*/.work/job.*"), *cache.glob("quantized/.*/*/*.json")):
                with suppress(OSError):
                    files.add(path.name.encode() + b"\n" + path.read_bytes())
            time.sleep(0.02)
    return Finished(process.returncode, out.read_text(), err.read_text()), programs, files


def test_token_is_nowhere(engine: DockerEngine, base: str, tmp_path: Path) -> None:
    token, repo = f"hf_{secrets.token_hex(17)}", "org/secret-model"
    tag, cache = f"{PREFIX}/token:test", share_quantizer(tmp_path / "cache")
    tiny_models("make", tmp_path, "llama", home=tmp_path)
    with serve(repo, tmp_path / "llama") as hub:
        hub.token = token
        environ = {
            "HF_TOKEN": token,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "COLDSTART_CACHE": str(cache),
        }
        flags = ["--quantize", "awq", "--calibration-samples", "4", "--calibration-tokens", "32"]
        flags += ["--base", base, "-t", tag, "--optimize", "startup", "--json"]
        built, programs, files = _watched_build([repo, *flags], environ, cache)
    assert built.code == 0, built.err
    try:
        assert built.json["recording"]  # its layer is searched too
        secret = re.compile(b"|".join(map(re.escape, _forms(token))))
        digest = built.json["model_digest"]
        known = {
            text: re.compile(re.escape(text.encode())) for text in (digest, repo, "q_proj.weight_packed")
        }
        found: set[bytes] = set()
        here: set[str] = set()
        for piece in _saved(tag):
            found.update(secret.findall(piece))
            here.update(text for text, pattern in known.items() if pattern.search(piece))
        assert here == set(known)  # config and layers: what is there, the search finds
        assert found == set()
        assert not secret.search(repr(engine.history(tag)).encode())
        assert not secret.search((built.out + built.err).encode())
        kept = [path for path in cache.rglob("*") if path.is_file() and "quantizer" not in path.parts]
        assert [path for path in kept if secret.search(path.read_bytes())] == []
        # The quantizer, seen at work.
        [job] = [program for program in programs if "quantize_job.py" in program]
        assert b"HF_HUB_OFFLINE=1" in programs[job].split(b"\0")
        assert b"HF_HOME" not in programs[job]  # where the hub's own login is
        assert [name for name, environment in programs.items() if secret.search(environment)] == []
        assert [name for name in programs if secret.search(name.encode())] == []
        assert {data.split(b"\n", 1)[0] for data in files} >= {b"job.json", b"job.log", b"config.json"}
        assert not any(secret.search(data) for data in files)
    finally:
        engine.remove_image(tag)
        engine.remove_image(built.json["weights_image"])
