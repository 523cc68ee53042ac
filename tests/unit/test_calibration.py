from __future__ import annotations

import json
from pathlib import Path

import pytest

from builder import calibration
from builder.errors import InputError
from builder.quantize import choose_recipe
from tests.models import CONFIG

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _file(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_texts_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = _file(tmp_path, "c.txt", "one\nstill one\n\n\n two \n")
    assert calibration.read(path).documents == ("one\nstill one", "two")


def test_lines_are_texts_or_chats(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a", "other": 1}), "", json.dumps({"messages": CHAT})]
    path = _file(tmp_path, "c.jsonl", "\n".join(lines))
    assert calibration.read(path).documents == ("a", CHAT)


@pytest.mark.parametrize(
    "line", ["{", "3", "{}", '{"text": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}']
)
def test_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = _file(tmp_path, "c.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2 of"):
        calibration.read(path)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        calibration.read(_file(tmp_path, "c.txt", " \n\n"))
    with pytest.raises(InputError, match="cannot read"):
        calibration.read(tmp_path / "none.txt")


def test_recipe_depends_on_the_documents(tmp_path: Path) -> None:
    one = calibration.read(_file(tmp_path, "a.txt", "one"))
    two = calibration.read(_file(tmp_path, "b.txt", "two"))
    digests = {choose_recipe(CONFIG, calibration=c).digest for c in (None, one, two)}
    assert len(digests) == 3
