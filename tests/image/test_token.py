"""A token that a download needs is nowhere in the image: every byte of `docker save` is searched."""

from __future__ import annotations

import base64
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

from builder.docker_engine import DockerEngine
from tests.hub import serve
from tests.image.conftest import PREFIX, coldstart
from tests.models import write_model

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


def test_token_is_nowhere_in_the_image(engine: DockerEngine, base: str, tmp_path: Path) -> None:
    token, repo = f"hf_{secrets.token_hex(17)}", "org/secret-model"
    tag, cache = f"{PREFIX}/token:test", tmp_path / "cache"
    with serve(repo, write_model(tmp_path / "repository", shards=2)) as hub:
        hub.token = token
        environ = {
            "HF_TOKEN": token,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "COLDSTART_CACHE": str(cache),
        }
        # These weights are random and have no tokenizer: nothing could be started and recorded.
        flags = ("--base", base, "-t", tag, "--no-prewarm", "--json")
        built = coldstart("build", repo, *flags, env=environ)
    assert built.code == 0, built.err
    try:
        digest = built.json["model_digest"]
        secret = re.compile(b"|".join(map(re.escape, _forms(token))))
        known = {text: re.compile(re.escape(text.encode())) for text in (digest, repo, "t0")}
        found: set[bytes] = set()
        here: set[str] = set()
        for piece in _saved(tag):
            found.update(secret.findall(piece))
            here.update(text for text, pattern in known.items() if pattern.search(piece))
        assert here == set(known)  # config and layers: what is there, the search finds
        assert found == set()
        assert not secret.search(repr(engine.history(tag)).encode())
        assert not secret.search((built.out + built.err).encode())
        assert [
            path for path in cache.rglob("*") if path.is_file() and secret.search(path.read_bytes())
        ] == []
    finally:
        engine.remove_image(tag)
        engine.remove_image(built.json["weights_image"])
