from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from builder import reshard as module
from builder import shards
from builder.errors import HostError
from builder.models import SHARD_INDEX, ModelSnapshot, parse_ref, resolve
from builder.report import SilentReporter
from builder.reshard import reshard
from tests.models import write_model

# Types that numpy lacks among them: bytes go over as they are.
_ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "I64": 8, "U8": 1}


def _shard(path: Path, tensors: dict[str, tuple[str, int]], seed: str) -> None:
    """A safetensors file made by hand. tensors: name -> type and count; bytes follow from the seed."""
    header, data = {}, b""
    for name, (dtype, count) in tensors.items():
        size = count * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [len(data), len(data) + size]}
        data += hashlib.shake_128(f"{seed}{name}".encode()).digest(size)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _model(folder: Path, shards: list[dict[str, tuple[str, int]]]) -> ModelSnapshot:
    write_model(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _shard(folder / name, tensors, seed=name)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / SHARD_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return resolve(parse_ref(str(folder)), SilentReporter())


def _tensors(snapshot: ModelSnapshot) -> dict[str, Any]:
    return {
        name: tensor
        for file in snapshot.lock.files
        if file.is_shard
        for name, tensor in deserialize((snapshot.root / file.path).read_bytes())  # type: ignore[no-untyped-call]
    }


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(
        st.lists(
            st.tuples(st.sampled_from(sorted(_ITEM_BYTES)), st.integers(0, 400)), min_size=1, max_size=6
        ),
        min_size=1,
        max_size=4,
    ),
    bound=st.integers(64, 1500),
)
def test_tensors_are_the_same_bytes_in_bounded_shards(
    sizes: list[list[tuple[str, int]]], bound: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("reshard")
    shards = [{f"s{i}.t{j}": entry for j, entry in enumerate(shard)} for i, shard in enumerate(sizes)]
    before = _model(tmp_path / "model", shards)
    after = reshard(before, bound, cache=tmp_path / "cache", reporter=SilentReporter())
    assert _tensors(after) == _tensors(before)
    if after.root == before.root:
        assert all(file.size <= bound for file in before.lock.files if file.is_shard)
        return
    index = json.loads((after.root / SHARD_INDEX).read_bytes())["weight_map"]
    for file in after.lock.files:
        if not file.is_shard:
            continue
        with safe_open(after.root / file.path, framework="np") as shard:
            names = list(shard.keys())  # the library's own reader finds the header sound
        assert {index[name] for name in names} == {file.path}
        entries = json.loads((after.root / file.path).read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
        data = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        assert data <= bound or len(names) == 1
    assert (after.lock.parameters, after.lock.license) == (before.lock.parameters, "apache-2.0")


def test_second_time_is_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = _model(tmp_path / "model", [{f"t{i}": ("F32", 100) for i in range(4)}])
    first = reshard(snapshot, 400, cache=tmp_path / "cache", reporter=SilentReporter())
    monkeypatch.setattr(module, "_write", None)
    again = reshard(snapshot, 400, cache=tmp_path / "cache", reporter=SilentReporter())
    assert again.lock == first.lock
    assert sum(file.is_shard for file in first.lock.files) == 4


@pytest.mark.parametrize("mebibytes", [16, 128])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, mebibytes: int) -> None:
    """One chunk at a time, whatever the size of model, shard or tensor."""
    write_model(tmp_path / "model")
    name, size = tmp_path / "model" / "model.safetensors", mebibytes << 20
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    last = {"dtype": "U8", "shape": [1], "data_offsets": [size, size + 1]}
    header = json.dumps({"large": entry, "last": last}).encode()
    with name.open("wb") as file:  # with a hole instead of data
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size + 1)
    snapshot = resolve(parse_ref(str(tmp_path / "model")), SilentReporter())
    tracemalloc.start()
    try:
        after = reshard(snapshot, size, cache=tmp_path / "cache", reporter=SilentReporter())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(file.is_shard for file in after.lock.files) == 2
    assert peak < 12 << 20


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = _model(tmp_path / "model", [{f"t{i}": ("F32", 100) for i in range(4)}])
    copied = 0

    def full(*arguments: Any) -> None:
        nonlocal copied
        copied += 1
        if copied == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_copy", full)
    with pytest.raises(HostError, match="No space left on device. Free some"):
        reshard(snapshot, 400, cache=tmp_path / "cache", reporter=SilentReporter())
    assert [path.suffix for path in (tmp_path / "cache" / "resharded").iterdir()] == [".lock"]


def test_disk_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = _model(tmp_path / "model", [{f"t{i}": ("F32", 100) for i in range(4)}])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 10})())
    with pytest.raises(HostError, match="--max-shard-size"):
        reshard(snapshot, 400, cache=tmp_path / "cache", reporter=SilentReporter())
