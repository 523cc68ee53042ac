"""Weights in shards of bounded size, so that an image's layers are pulled in parallel."""

from __future__ import annotations

import shutil
from pathlib import Path

from builder.files import exclusive, finished_folder, require_space
from builder.models import SHARD_INDEX, ModelSnapshot, snapshot_of_folder
from builder.report import Reporter
from builder.shards import tensors_of, write_shards

_SLACK_BYTES = 1 << 28


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
            require_space(
                folder,
                snapshot.lock.total_bytes + _SLACK_BYTES,
                what=f"smaller shards of {snapshot.lock.name} need",
                fix="Free some, set COLDSTART_CACHE to a larger disk, or leave out --max-shard-size.",
            )
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
    write_shards(target, [tensor for path in shards for tensor in tensors_of(path)], max_bytes, reporter)
