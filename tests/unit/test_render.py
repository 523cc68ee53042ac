from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import context, render
from builder.base_cpu import CpuBase
from builder.errors import BuildError
from builder.models import LockedFile
from builder.plan import BaseImage, make_plan
from builder.render import ContextFile, Rendered, dockerfile_string
from builder.rendered_folder import write
from builder.spec import ImageSpec
from tests.unit.test_plan import lock, plan

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["weights", "image"])
def test_dockerfile_is_the_golden_one(device: str, name: str) -> None:
    made = plan(device, engine_args=("--max-model-len", "2048"))
    rendered = render.render_weights(made, Path("m")) if name == "weights" else render.render_image(made)
    golden = GOLDEN / f"{device}.{name}.Dockerfile"
    if os.environ.get("COLDSTART_UPDATE_GOLDEN"):
        golden.write_text(rendered.dockerfile)
    assert rendered.dockerfile == golden.read_text()


@pytest.mark.parametrize("weights", ["download", "mount"])
def test_dockerfile_without_baked_weights_is_the_golden_one(weights: str) -> None:
    text = render.render_image(plan("cpu", weights=weights)).dockerfile
    golden = GOLDEN / f"cpu.{weights}.Dockerfile"
    if os.environ.get("COLDSTART_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("extras", [False, True])
def test_cpu_base_dockerfile_is_the_golden_one(extras: bool) -> None:
    text = render.render_base_cpu(
        base=CpuBase("debian:12", "0.32.0", "2.13.0", has_wheels=extras, has_ca=extras)
    )
    golden = GOLDEN / f"base-cpu{'-extras' if extras else ''}.Dockerfile"
    if os.environ.get("COLDSTART_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    # A backslash that is not the line's last character would escape a blank instead of joining lines.
    assert not re.search(r"\\[ \t]", text)


def test_missing_variable_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render.render_base_cpu()


def test_runtime_in_the_context_is_whole_and_builder_is_not_there() -> None:
    paths = {file.path for file in render.render_image(plan()).files}
    assert {
        "coldstart/manifest.json",
        "coldstart/runtime/__main__.py",
        "coldstart/runtime/phases.py",
    } <= paths
    assert not any("builder" in path for path in paths)


def test_list_of_vllms_arguments_is_baked_where_the_base_told_it() -> None:
    def paths(arguments: str | None) -> dict[str, Path | bytes]:
        base = BaseImage("base:1", "sha256:b", "cpu", vllm_arguments=arguments)
        rendered = render.render_image(make_plan(ImageSpec(model="m"), lock(), base))
        return {file.path: file.source for file in rendered.files}

    assert paths("[]\n")["coldstart/vllm-arguments.json"] == b"[]\n"
    assert "coldstart/vllm-arguments.json" not in paths(None)


@given(st.text(alphabet=st.characters(blacklist_categories=("C", "Z"))))
def test_quoted_string_cannot_leave_its_quotes(text: str) -> None:
    if not text.isprintable():
        return
    quoted = dockerfile_string(text)
    body = quoted[1:-1]
    index = 0
    while index < len(body):  # every special character is escaped, every escape is complete
        if body[index] == "\\":
            assert body[index + 1] in '\\"$'
            index += 2
        else:
            assert body[index] not in '"$'
            index += 1


def test_hostile_names_stay_inside_their_strings() -> None:
    hostile = 'x" && RUN evil {{ 7*7 }} $(id) ${PATH}'
    made = make_plan(ImageSpec(model="m"), lock(hostile), BaseImage("base:1", None, "cpu"))
    text = render.render_image(made).dockerfile + render.render_weights(made, Path("m")).dockerfile
    assert "{{ 7*7 }}" in text
    assert '\\"' in text
    assert not [line for line in text.splitlines() if line.startswith("RUN") and "evil" in line]
    assert made.model_path == "/models/x-RUN-evil-7-7-id-PATH"


def test_line_break_is_refused_in_a_dockerfile_string() -> None:
    with pytest.raises(ValueError, match="not printable"):
        dockerfile_string("a\nRUN evil")


def _rendered(tmp_path: Path) -> Rendered:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"w" * 1000)
    weights.chmod(0o600)
    files = (ContextFile("layers/01/model.safetensors", weights), ContextFile("a/b.json", b"{}"))
    return Rendered("FROM scratch\n", files)


def test_context_stream_is_the_same_every_time_and_readable(tmp_path: Path) -> None:
    rendered = _rendered(tmp_path)
    sent: list[int] = []
    first = b"".join(context.stream(rendered, sent.append))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert first == b"".join(context.stream(rendered))
    assert sum(sent) == context.size(rendered)
    with tarfile.open(fileobj=io.BytesIO(first)) as archive:
        entries = {entry.name: entry for entry in archive}
        assert list(entries) == [
            "Dockerfile",
            "a",
            "a/b.json",
            "layers",
            "layers/01",
            "layers/01/model.safetensors",
        ]
        assert {entry.mode for entry in entries.values() if entry.isfile()} == {0o644}
        assert {entry.mode for entry in entries.values() if entry.isdir()} == {0o755}
        assert {(entry.uid, entry.gid, entry.mtime) for entry in entries.values()} == {(0, 0, 0)}
        file = archive.extractfile("layers/01/model.safetensors")
        assert file is not None
        assert file.read() == b"w" * 1000


def test_file_that_grows_while_it_is_sent_fails_the_build(tmp_path: Path) -> None:
    rendered = _rendered(tmp_path)
    stream = context.stream(rendered)
    with pytest.raises(BuildError, match="changed while it was sent"):
        for chunk in stream:
            if b"layers/01/model.safetensors" in chunk:
                with (tmp_path / "model.safetensors").open("ab") as file:
                    file.write(b"more")


def test_rendered_folder_has_the_same_files_and_modes_as_the_stream(tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    small = LockedFile(path="config.json", size=2, sha256="")
    shard = LockedFile(path="model.safetensors", size=3, sha256="")
    (root / "config.json").write_bytes(b"{}")
    (root / "model.safetensors").write_bytes(b"abc")
    (root / "model.safetensors").chmod(0o600)
    base = BaseImage("base:1", None, "cpu")
    made = make_plan(ImageSpec(model="m"), lock(files=(small, shard)), base)
    umask = os.umask(0o077)
    try:
        write(made, root, tmp_path / "out")
    finally:
        os.umask(umask)
    streamed = b"".join(context.stream(render.render_weights(made, root)))
    with tarfile.open(fileobj=io.BytesIO(streamed)) as archive:
        names = {entry.name for entry in archive if entry.isfile()}
    folder = tmp_path / "out" / "weights"
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(written) == names
    assert {path.stat().st_mode & 0o777 for path in written.values()} == {0o644}
    folders = [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o755}
    assert (root / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_recorded_state_is_one_layer_on_top(tmp_path: Path) -> None:
    (tmp_path / "files.txt").write_text("/lib/a.so\n")
    rendered = render.render_prewarm("a/b:c", [("x.y", "1"), ("x.z", "$HOME")], tmp_path, ["files.txt"])
    assert rendered.dockerfile.splitlines()[1:] == [
        "FROM a/b:c",
        'LABEL "x.y"="1" "x.z"="\\$HOME"',
        'COPY ["state/", "/opt/coldstart/state/"]',
    ]
    assert rendered.files == (ContextFile("state/files.txt", tmp_path / "files.txt"),)


@pytest.mark.parametrize("weights", ["download", "mount"])
def test_rendered_folder_without_baked_weights_is_one_image(tmp_path: Path, weights: str) -> None:
    write(plan(weights=weights), tmp_path / "not-read", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image"]
