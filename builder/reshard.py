"""Weights in shards of bounded size, so that an image's layers are pulled in parallel.

Tensors are copied from file to file as bytes: nothing is decoded, and memory holds one chunk. That also
keeps types that numpy does not know.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from builder.errors import HostError
from builder.files import exclusive, finished_folder
from builder.models import SHARD_INDEX, ModelSnapshot, snapshot_of_folder
from builder.report import Reporter, Task

_COPY_CHUNK = 1 << 22
_SLACK_BYTES = 1 << 28


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a shard. begin, end: offsets in bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def item_bytes(self) -> float:
        return self.bytes / max(1, math.prod(self.shape))


def reshard(snapshot: ModelSnapshot, max_bytes: int, *, cache: Path, reporter: Reporter) -> ModelSnapshot:
    """The same tensors in shards of at most `max_bytes` of data; a larger tensor has a shard of its own.

    Returns the snapshot itself where its shards are small enough. Raises HostError without disk space.
    """
    shards = [file for file in snapshot.lock.files if file.is_shard]
    if all(file.size <= max_bytes for file in shards):
        return snapshot
    folder = cache.absolute() / "resharded" / f"{snapshot.lock.digest}-{max_bytes}"
    result = folder / snapshot.lock.name.rsplit("/", 1)[-1]
    with exclusive(folder.with_suffix(".lock"), "this model is being resharded", reporter):
        if not result.is_dir():
            _require_space(snapshot, folder.parent)
            with finished_folder(folder) as partial:
                _write(
                    snapshot,
                    [snapshot.root / file.path for file in shards],
                    max_bytes,
                    partial / result.name,
                    reporter,
                )
    resharded = snapshot_of_folder(result, snapshot.lock, reporter)
    count = sum(file.is_shard for file in resharded.lock.files)
    reporter.note(f"{len(shards)} shards became {count} of at most {max_bytes / 1e6:.0f} MB")
    return resharded


def _write(
    snapshot: ModelSnapshot, shards: list[Path], max_bytes: int, target: Path, reporter: Reporter
) -> None:
    target.mkdir()
    for file in snapshot.lock.files:
        if not file.is_shard and file.path != SHARD_INDEX:
            (target / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot.root / file.path, target / file.path)
    tensors = [tensor for path in shards for tensor in _tensors(path)]
    groups = list(_groups(tensors, max_bytes))
    weight_map: dict[str, str] = {}
    total = sum(tensor.bytes for tensor in tensors)
    with reporter.task("Writing smaller shards", total) as task:
        for number, group in enumerate(groups, start=1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            _write_shard(target / name, group, task)
            weight_map.update({tensor.name: name for tensor in group})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(path: Path) -> Iterator[_Tensor]:
    """In the order of their bytes. The header was checked when the model was resolved."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        yield _Tensor(name, path, entry["dtype"], tuple(entry["shape"]), start + begin, start + end)


def _groups(tensors: list[_Tensor], max_bytes: int) -> Iterator[list[_Tensor]]:
    group: list[_Tensor] = []
    for tensor in tensors:
        if group and sum(t.bytes for t in group) + tensor.bytes > max_bytes:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _write_shard(path: Path, group: list[_Tensor], task: Task) -> None:
    # Wide items first, as the library's own writer does: then every tensor is aligned.
    ordered = sorted(group, key=lambda tensor: -tensor.item_bytes)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            with tensor.file.open("rb") as source:
                _copy(source, tensor, target, task)


def _copy(source: BinaryIO, tensor: _Tensor, target: BinaryIO, task: Task) -> None:
    source.seek(tensor.begin)
    left = tensor.bytes
    while left:
        chunk = source.read(min(left, _COPY_CHUNK))
        if not chunk:
            raise HostError(f"{tensor.file} became shorter while it was read", fix="Get the model again.")
        target.write(chunk)
        task.advance(len(chunk))
        left -= len(chunk)


def _require_space(snapshot: ModelSnapshot, folder: Path) -> None:
    needed = snapshot.lock.total_bytes + _SLACK_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HostError(
            f"smaller shards of {snapshot.lock.name} need {needed / 1e9:.1f} GB in {folder}",
            why=f"{free / 1e9:.1f} GB are free.",
            fix="Free some space, set COLDSTART_CACHE to a larger disk, or leave out --max-shard-size.",
        )
