from __future__ import annotations

from pathlib import Path

import pytest

from builder import build, lockfile
from builder.errors import InputError
from builder.lockfile import Drift
from builder.models import ModelSnapshot
from builder.report import SilentReporter
from builder.spec import ImageSpec, load_spec
from tests.models import write_model


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", shards=2)
    path = tmp_path / "coldstart.yaml"
    path.write_text("model: model\n")
    return path


def _resolve(path: Path, locked: bool = False) -> ModelSnapshot:
    spec, lock = load_spec(path, {}), lockfile.beside(path)
    return build.resolve_model(spec, SilentReporter(), lock_path=lock, locked=locked)


def _drift(path: Path) -> Drift:
    spec, lock = load_spec(path, {}), path.with_name("coldstart.lock")
    found = build.resolve_model(spec, SilentReporter()).lock
    return lockfile.drift(spec, lockfile.read(lock), found)


def test_lock_is_written_once_and_the_same(spec_file: Path) -> None:
    assert _drift(spec_file) is Drift.NEW
    _resolve(spec_file)
    lock = spec_file.with_name("coldstart.lock")
    first, time = lock.read_bytes(), lock.stat().st_mtime_ns
    _resolve(spec_file)
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == (first, time)
    assert str(spec_file.parent).encode() not in first  # no path of this machine
    assert _drift(spec_file) is Drift.UNCHANGED
    _resolve(spec_file, locked=True)


def test_locked_refuses_a_missing_or_stale_lock_and_a_changed_model(spec_file: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        _resolve(spec_file, locked=True)
    with pytest.raises(InputError, match="needs a coldstart.yaml"):
        build.resolve_model(ImageSpec(model="org/a"), SilentReporter(), lock_path=None, locked=True)
    _resolve(spec_file)
    lock = spec_file.with_name("coldstart.lock").read_bytes()
    (spec_file.parent / "model" / "tokenizer.json").write_text("{ }")
    assert _drift(spec_file) is Drift.UPSTREAM_CHANGED
    with pytest.raises(InputError, match="tokenizer.json is not what was locked"):
        _resolve(spec_file, locked=True)
    write_model(spec_file.parent / "other")
    spec_file.write_text("model: other\n")
    assert _drift(spec_file) is Drift.CONFIGURATION_CHANGED
    with pytest.raises(InputError, match="is stale"):
        _resolve(spec_file, locked=True)
    assert spec_file.with_name("coldstart.lock").read_bytes() == lock  # a refusal changes nothing


def test_lock_names_what_made_it_and_what_the_model_is(spec_file: Path) -> None:
    _resolve(spec_file)
    lock = lockfile.read(spec_file.with_name("coldstart.lock"))
    assert lock is not None
    assert set(lock.tools) == {"coldstart", "huggingface_hub", "safetensors"}
    quantized = lockfile.tools(ImageSpec(model="org/a", quantize="awq"))
    assert {"llmcompressor", "torch"} <= set(quantized)
    assert (lock.model.parameters, lock.model.dtype, lock.model.quantization) == (32, "bfloat16", None)


def test_lock_of_another_schema_is_told(spec_file: Path) -> None:
    spec_file.with_name("coldstart.lock").write_text('{"schema_version": 1, "coldstart_version": "0"}')
    with pytest.raises(InputError, match="has schema 1"):
        _resolve(spec_file)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"schema_version": 2}'])
def test_damaged_lock_is_told(spec_file: Path, content: bytes) -> None:
    spec_file.with_name("coldstart.lock").write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        _resolve(spec_file)


def test_branch_is_followed_once(spec_file: Path) -> None:
    locked = _resolve(spec_file).lock.model_copy(update={"revision": "c" * 40, "source": "hf://org/a"})
    spec = ImageSpec(model="org/a@main")
    lock = lockfile.LockFile(tools={}, request=lockfile.Request.of(spec), model=locked)
    pinned = lockfile.pinned(spec, lock)
    assert (pinned.model, pinned.revision) == ("org/a", "c" * 40)
    assert lockfile.pinned(ImageSpec(model="org/b"), lock).revision is None


def test_quantizing_otherwise_is_another_configuration_of_the_same_model(spec_file: Path) -> None:
    locked = _resolve(spec_file).lock.model_copy(update={"revision": "c" * 40, "source": "hf://org/a"})
    spec = ImageSpec(model="org/a@main")
    lock = lockfile.LockFile(tools={}, request=lockfile.Request.of(spec), model=locked)
    quantized = spec.model_copy(update={"quantize": "awq"})
    assert lockfile.drift(spec, lock, locked) is Drift.UNCHANGED
    assert lockfile.drift(quantized, lock, locked) is Drift.CONFIGURATION_CHANGED
    assert lockfile.pinned(quantized, lock).revision == "c" * 40  # the branch is not followed again
    kept = lock.model_copy(update={"request": lockfile.Request.of(quantized)})
    other = quantized.model_copy(update={"calibration": "/elsewhere/texts.jsonl", "calibration_samples": 64})
    assert lockfile.drift(other, kept, locked) is Drift.CONFIGURATION_CHANGED
    assert "64 x 256 tokens of texts.jsonl" in (lockfile.Request.of(other).quantization or "")
    assert "elsewhere" not in lockfile.Request.of(other).model_dump_json()  # the same on every machine


class _Notes(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_calibration_text_is_locked(spec_file: Path) -> None:
    texts = spec_file.with_name("texts.txt")
    texts.write_text("one")
    spec_file.write_text("model: model\nquantize: awq\ncalibration: texts.txt\n")
    _resolve(spec_file)
    path = spec_file.with_name("coldstart.lock")
    lock = lockfile.read(path)
    assert lock is not None
    assert lock.calibration is not None
    assert (lock.calibration.source, lock.calibration.revision) == ("texts.txt", None)
    _resolve(spec_file, locked=True)
    texts.write_text("two")
    with pytest.raises(InputError, match="the calibration text differs from its lock"):
        _resolve(spec_file, locked=True)
    spec, notes = load_spec(spec_file, {}), _Notes()
    now = build.resolve_model(spec, SilentReporter())
    assert lockfile.drift(spec, lock, now.lock) is Drift.UNCHANGED  # the model is
    assert lockfile.drift(spec, lock, now.lock, now.calibration) is Drift.UPSTREAM_CHANGED
    build.resolve_model(spec, notes, lock_path=path)
    assert notes.said == ["the calibration text is not what was locked; locking anew"]
    _resolve(spec_file, locked=True)
    # A lock of before there were digests in it.
    path.write_bytes(lock.model_copy(update={"calibration": None}).to_bytes())
    with pytest.raises(InputError, match="did not keep its digest"):
        _resolve(spec_file, locked=True)


def test_changed_folder_is_noted(spec_file: Path) -> None:
    _resolve(spec_file)
    (spec_file.parent / "model" / "tokenizer.json").write_text("{ }")
    notes = _Notes()
    build.resolve_model(load_spec(spec_file, {}), notes, lock_path=lockfile.beside(spec_file))
    assert notes.said == ["tokenizer.json is not what was locked; locking anew"]


def test_commit_with_other_bytes_is_refused(spec_file: Path) -> None:
    found = _resolve(spec_file).lock.model_copy(update={"revision": "c" * 40, "source": "hf://org/a"})
    spec, notes = ImageSpec(model="org/a"), _Notes()
    lock = lockfile.LockFile(tools={}, request=lockfile.Request.of(spec), model=found)
    lockfile.require_constant(lock, spec, found, None, notes)
    changed = found.files[0].model_copy(update={"sha256": "0" * 64})
    other = found.model_copy(update={"files": (changed, *found.files[2:])})
    with pytest.raises(InputError, match=r"config.json of org/a is not what was locked.*\(cccccccccccc\)"):
        lockfile.require_constant(lock, spec, other, None, notes)
    assert notes.said == []
    # Another choice of files, another commit and another request are none of that.
    fewer = found.model_copy(update={"files": found.files[1:]})
    lockfile.require_constant(lock, spec, fewer, None, notes)
    moved = other.model_copy(update={"revision": "d" * 40})
    lockfile.require_constant(lock, spec, moved, None, notes)
    lockfile.require_constant(lock, ImageSpec(model="org/b"), other, None, notes)
    assert len(notes.said) == 2
