from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from builder import calibration
from builder.errors import InputError
from builder.recipe import choose_recipe
from builder.report import SilentReporter
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


ROWS = [
    {"text": "a", "other": 1},
    {"messages": CHAT},
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
]
DOCUMENTS = ("a", CHAT, "2+2=4", CHAT)


def test_rows_are_the_same_in_every_json_form(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    for name, text in (("c.jsonl", lines), ("c.json", json.dumps(ROWS, indent=1)), ("lines.json", lines)):
        assert calibration.read(_file(tmp_path, name, text)).documents == DOCUMENTS


def test_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "c.jsonl", json.dumps({"text": "a\u2028b"}, ensure_ascii=False))
    assert calibration.read(path).documents == ("a\u2028b",)


@pytest.mark.parametrize("text", ['[{"text": "a"}, 3]', '[{"text": "a"}, {"prompt": "a"}]'])
def test_wrong_item_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="item 2 of"):
        calibration.read(_file(tmp_path, "c.json", text))


def test_parquet_is_left_to_the_quantizer(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    path.write_bytes(b"PAR1 rows PAR1")
    read = calibration.read(path)
    assert (read.documents, read.parquet) == ((), path)
    assert read.digest == hashlib.sha256(b"PAR1 rows PAR1").hexdigest()
    path.write_bytes(b"PAR1 rows")
    with pytest.raises(InputError, match="is not a Parquet file"):
        calibration.read(path)


def test_too_much_text_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="MB of calibration text"):
        calibration.read(path)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name/", ("org/name", None, None)),
        ("org/name@v1", ("org/name", "v1", None)),
        ("org/name/data/a@b.txt", ("org/name", None, "data/a@b.txt")),
        ("org/name@v1/a.jsonl", ("org/name", "v1", "a.jsonl")),
    ],
)
def test_dataset_names(source: str, parts: tuple[str, ...]) -> None:
    assert calibration._parse_dataset(calibration.DATASET_PREFIX + source) == parts


@pytest.mark.parametrize("source", ["", "org", "org/na me", "org/name@", "../name", "org/..", "a/b--c"])
def test_wrong_dataset_names(source: str) -> None:
    with pytest.raises(InputError, match="as a dataset"):
        calibration.load(calibration.DATASET_PREFIX + source, SilentReporter())


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("test.jsonl", "train.txt"), "train.txt"),
        (("data/train-0.parquet", "LICENSE.txt", "README.txt"), "data/train-0.parquet"),
        (("train.parquet", "train.json", "train.jsonl"), "train.jsonl"),
        (("b/train/1.json", "a/train/1.json"), "a/train/1.json"),
        (("strained.txt", "z.txt"), "strained.txt"),
        (("dataset_infos.json", "constrained.parquet", "x.csv"), "constrained.parquet"),
    ],
)
def test_best_file_of_a_dataset(files: tuple[str, ...], chosen: str) -> None:
    assert calibration._choose("hf://…", dict.fromkeys(files, 1), None) == chosen


@pytest.mark.parametrize(
    ("sizes", "wanted", "words"),
    [
        ({"a.csv": 1}, None, "has no .jsonl"),
        ({"a.csv": 1}, "b.txt", "has no file 'b.txt'"),
        ({"a.csv": 1}, "a.csv", "is not calibration text"),
        ({"a.txt": 1 << 40}, None, "MB of calibration text"),
    ],
)
def test_no_file_of_a_dataset(sizes: dict[str, int], wanted: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        calibration._choose("hf://…", sizes, wanted)


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
