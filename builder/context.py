"""The build context as a tar stream: sorted, fixed owner, mode and time, never a copy on disk."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from builder.errors import BuildError
from builder.render import ContextFile, Rendered

_CHUNK = 1 << 20
_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


def entries(rendered: Rendered) -> list[ContextFile]:
    """Every file of the context, the Dockerfile among them, sorted by path."""
    dockerfile = ContextFile("Dockerfile", rendered.dockerfile.encode())
    return sorted((dockerfile, *rendered.files), key=lambda file: file.path)


def size(rendered: Rendered) -> int:
    """Bytes of all files, without tar headers."""
    return sum(_size(file) for file in entries(rendered))


def stream(rendered: Rendered, advance: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """Tar bytes in chunks of at most 1 MiB. The same input gives the same bytes on every machine.

    Modes are set here, readable for the image's user: files of safetensors are 0600, and a chmod in
    the Dockerfile would store every weight a second time. Raises BuildError if a file changes meanwhile.
    """
    folders: set[str] = set()
    for file in entries(rendered):
        for parent in reversed(Path(file.path).parents[:-1]):
            if parent.as_posix() not in folders:
                folders.add(parent.as_posix())
                yield _header(parent.as_posix(), 0, tarfile.DIRTYPE, _FOLDER_MODE)
        expected = _size(file)
        yield _header(file.path, expected, tarfile.REGTYPE, _FILE_MODE)
        sent = 0
        for chunk in _read(file):
            sent += len(chunk)
            advance(len(chunk))
            yield chunk
        if sent != expected:
            raise BuildError(
                f"{file.path} changed while it was sent",
                why=f"It had {expected} bytes, then {sent}.",
                fix="Let nothing write to the model folder and build again.",
            )
        if sent % tarfile.BLOCKSIZE:
            yield b"\0" * (tarfile.BLOCKSIZE - sent % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def write_folder(rendered: Rendered, folder: Path) -> None:
    """The same context as files, for plain `docker build`. Hard links where the disk allows, else copies."""
    write_files(entries(rendered), folder)


def write_files(files: Iterable[ContextFile], folder: Path) -> None:
    for file in files:
        target = folder / file.path
        for parent in reversed([target.parent, *target.parent.parents]):
            if parent.is_relative_to(folder) and not parent.is_dir():
                parent.mkdir(parents=True)
                parent.chmod(_FOLDER_MODE)  # whatever the umask is
        target.unlink(missing_ok=True)
        if isinstance(file.source, bytes):
            target.write_bytes(file.source)
            target.chmod(_FILE_MODE)
        else:
            _place(file.source, target)


def _place(source: Path, target: Path) -> None:
    real = source.resolve()
    if real.stat().st_mode & 0o777 == _FILE_MODE:  # a link shares its mode, so only where it is right already
        try:
            os.link(real, target)
            return
        except OSError:
            pass  # another file system
    with target.open("wb") as out:
        for chunk in _read(ContextFile(str(target), real)):
            out.write(chunk)
    target.chmod(_FILE_MODE)


def _header(path: str, length: int, kind: bytes, mode: int) -> bytes:
    info = tarfile.TarInfo(path)
    info.size, info.type, info.mode = length, kind, mode
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = 0
    return info.tobuf(format=tarfile.PAX_FORMAT)


def _size(file: ContextFile) -> int:
    return len(file.source) if isinstance(file.source, bytes) else file.source.stat().st_size


def _read(file: ContextFile) -> Iterator[bytes]:
    if isinstance(file.source, bytes):
        buffer: io.BufferedIOBase = io.BytesIO(file.source)
    else:
        buffer = file.source.open("rb")
    with buffer:
        while chunk := buffer.read(_CHUNK):
            yield chunk
