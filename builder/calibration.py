"""Calibration text that the user gives: a file or a dataset of texts or chats, checked before any work."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from builder.errors import InputError
from builder.models import HUB_NAME
from builder.report import Reporter

# A text, or a chat as a list of {"role", "content"} messages.
Document = str | list[dict[str, str]]

DATASET_PREFIX = "hf://datasets/"
# Text that is read whole; a calibration needs a few thousand tokens. Parquet is read in pieces.
_MAX_TEXT_BYTES = 256 << 20
# In order of preference: what can be read here before what only the quantizer's Python can read.
_SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
_NOT_DATA = re.compile(r"(readme|licen[sc]e|requirements|dataset_infos?|\.|_)", re.IGNORECASE)


@dataclass(frozen=True)
class Calibration:
    """Documents in the order of the file, or a Parquet file of rows of them (documents is empty then).

    commit: of the dataset that they are from, None for a file of this machine.
    """

    documents: tuple[Document, ...]
    parquet: Path | None = None
    commit: str | None = None

    def canonical(self) -> bytes:
        return json.dumps(self.documents, ensure_ascii=False, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the documents, or of the Parquet file's bytes."""
        if self.parquet:
            with self.parquet.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(self.canonical()).hexdigest()


def load(source: str, reporter: Reporter, commit: str | None = None) -> Calibration:
    """A file, or `hf://datasets/org/name[@revision][/path]`. Raises InputError or ModelError.

    commit: of the dataset, in place of the revision that the source names.
    """
    if not source.startswith(DATASET_PREFIX):
        return read(Path(source))
    from builder.hub import Repository, download_dataset_file

    name, revision, wanted = _parse_dataset(source)
    path, found = download_dataset_file(
        Repository("dataset", name, commit or revision),
        lambda sizes: _choose(source, sizes, wanted),
        reporter,
    )
    return replace(read(path), commit=found)


def _parse_dataset(source: str) -> tuple[str, str | None, str | None]:
    """The name of the dataset, its revision, and the path in it."""
    parts = source.removeprefix(DATASET_PREFIX).split("/", 2)
    name, at, revision = "/".join(parts[:2]).partition("@")
    if not HUB_NAME.fullmatch(name) or (at and not revision):
        raise InputError(
            f"cannot read {source!r} as a dataset",
            fix=f"Write {DATASET_PREFIX}ORG/NAME, then perhaps @REVISION and /PATH.",
        )
    return name, revision or None, parts[2] if len(parts) > 2 and parts[2] else None


def _choose(source: str, sizes: Mapping[str, int], wanted: str | None) -> str:
    """The named file; else a data file: of the train split, text before Parquet, the first by name."""
    if wanted:
        if wanted not in sizes:
            raise InputError(f"{source} has no file {wanted!r}", fix="Name one of the dataset's files.")
        return _checked(wanted, sizes[wanted])
    data = [
        path for path in sizes if path.endswith(_SUFFIXES) and not _NOT_DATA.match(path.rsplit("/", 1)[-1])
    ]
    if not data:
        raise InputError(
            f"{source} has no {', '.join(_SUFFIXES)} file",
            fix="Use another dataset, or give a file of this machine.",
        )
    data.sort(
        key=lambda p: (not re.search(r"(?<![a-z])train(?![a-z])", p), _SUFFIXES.index(Path(p).suffix), p)
    )
    return _checked(data[0], sizes[data[0]])


def _checked(path: str, size: int) -> str:
    if not path.endswith(_SUFFIXES):
        raise InputError(f"{path} is not calibration text", fix=f"Name a {', '.join(_SUFFIXES)} file.")
    if not path.endswith(".parquet"):
        _require_modest(path, size)
    return path


def _require_modest(path: str, size: int) -> None:
    if size > _MAX_TEXT_BYTES:
        raise InputError(
            f"{path} has {size / 1e6:.0f} MB of calibration text",
            why=f"At most {_MAX_TEXT_BYTES / 1e6:.0f} MB are read; a few hundred kB suffice.",
            fix="Give a smaller file.",
        )


def read(path: Path) -> Calibration:
    """`.jsonl`: a document a line; `.json`: a list of them; `.parquet`: a document a row, left to the
    quantizer to read; anything else: texts with blank lines between. A document is {"text": …},
    {"messages": […]}, or {"prompt": …, "completion": …} of two texts or two lists of messages.

    Raises InputError that names the line or the item.
    """
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        _require_modest(str(path), path.stat().st_size)
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the calibration file {path}", why=f"{error}.", fix="Give a text file in UTF-8."
        ) from None
    documents: list[Document]
    if path.suffix == ".jsonl":
        documents = _lines(path, content)
    elif path.suffix == ".json":
        items = _json(content)
        # Many a .json on the hub is a .jsonl.
        if isinstance(items, list):
            documents = [_document(f"item {n} of {path}", item) for n, item in enumerate(items, 1)]
        else:
            documents = _lines(path, content)
    else:
        documents = [text for text in (part.strip() for part in content.split("\n\n")) if text]
    if not documents:
        raise InputError(
            f"the calibration file {path} is empty", fix="Give text like what the model will see."
        )
    return Calibration(tuple(documents))


def _parquet(path: Path) -> Calibration:
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(-4, 2)
        if magic != b"PAR1" or file.read(4) != b"PAR1":
            raise InputError(f"{path} is not a Parquet file, or is cut short", fix="Get it again.")
    return Calibration((), parquet=path)


def _lines(path: Path, content: str) -> list[Document]:
    # Not splitlines: it also cuts at characters that a JSON string may hold.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [_document(f"line {number} of {path}", _json(line)) for number, line in lines]


def _json(text: str) -> Any:
    """None where it is not JSON, or too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _document(where: str, data: Any) -> Document:
    document = _read_document(data) if isinstance(data, dict) else None
    if document is None:
        raise InputError(
            f"{where} is neither a text nor a chat",
            fix='It should be {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}.',
        )
    return document


def _read_document(row: Mapping[str, Any]) -> Document | None:
    prompt: Any = row.get("prompt")
    completion: Any = row.get("completion")
    if _is_text(row.get("text")):
        return str(row["text"])
    if _is_chat(row.get("messages")):
        return _chat(row["messages"])
    if _is_text(prompt) and _is_text(completion):
        return f"{prompt}{completion}"
    if _is_chat(prompt) and _is_chat(completion):
        return _chat(prompt) + _chat(completion)
    return None


def _is_text(value: Any) -> bool:
    # JSON can write half of a surrogate pair, which no encoding of text can hold.
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content")) for m in messages
        )
    )


def _chat(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["content"]} for m in messages]
