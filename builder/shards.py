"""safetensors files written from parts of others, in shards of bounded size.

Tensors are copied from file to file as bytes: nothing is decoded, and memory holds one chunk. That also
keeps types that numpy does not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from builder.errors import HostError
from builder.models import SHARD_INDEX
from builder.report import Reporter, Task

_COPY_CHUNK = 1 << 22


@dataclass(frozen=True)
class Tensor:
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


def write_shards(folder: Path, tensors: Sequence[Tensor], max_bytes: int, reporter: Reporter) -> None:
    """Shards of at most `max_bytes` of data and their index; a larger tensor has a shard of its own."""
    groups = list(_groups(tensors, max_bytes))
    weight_map: dict[str, str] = {}
    total = sum(tensor.bytes for tensor in tensors)
    with reporter.task("Writing shards", total) as task:
        for number, group in enumerate(groups, start=1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            _write_shard(folder / name, group, task)
            weight_map.update({tensor.name: name for tensor in group})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def tensors_of(path: Path) -> Iterator[Tensor]:
    """In the order of their bytes. The header was checked when the model was resolved."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        yield Tensor(name, path, entry["dtype"], tuple(entry["shape"]), start + begin, start + end)


def _groups(tensors: Sequence[Tensor], max_bytes: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(t.bytes for t in group) + tensor.bytes > max_bytes:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _write_shard(path: Path, group: Sequence[Tensor], task: Task) -> None:
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


def _copy(source: BinaryIO, tensor: Tensor, target: BinaryIO, task: Task) -> None:
    source.seek(tensor.begin)
    left = tensor.bytes
    while left:
        chunk = source.read(min(left, _COPY_CHUNK))
        if not chunk:
            raise HostError(f"{tensor.file} became shorter while it was read", fix="Get the model again.")
        target.write(chunk)
        task.advance(len(chunk))
        left -= len(chunk)
