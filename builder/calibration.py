"""Calibration text that the user gives: a file of texts or chats, read and checked before any work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.errors import InputError

# A text, or a chat as a list of {"role", "content"} messages.
Document = str | list[dict[str, str]]


@dataclass(frozen=True)
class Calibration:
    """Documents in the order of the file."""

    documents: tuple[Document, ...]

    def canonical(self) -> bytes:
        return json.dumps(self.documents, ensure_ascii=False, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


def read(path: Path) -> Calibration:
    """`.jsonl`: {"text": …} or {"messages": […]} a line; anything else: texts with blank lines between.

    Raises InputError that names the line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the calibration file {path}", why=f"{error}.", fix="Give a text file in UTF-8."
        ) from None
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        documents = [_document(path, number, line) for number, line in lines]
    else:
        documents = [text for text in (part.strip() for part in content.split("\n\n")) if text]
    if not documents:
        raise InputError(
            f"the calibration file {path} is empty", fix="Give text like what the model will see."
        )
    return Calibration(tuple(documents))


def _document(path: Path, number: int, line: str) -> Document:
    try:
        data = json.loads(line)
    except ValueError:
        data = None
    if isinstance(data, dict):
        if isinstance(data.get("text"), str):
            return str(data["text"])
        if _is_chat(data.get("messages")):
            return [{"role": m["role"], "content": m["content"]} for m in data["messages"]]
    raise InputError(
        f"line {number} of {path} is neither a text nor a chat",
        fix='Each line is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}.',
    )


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
