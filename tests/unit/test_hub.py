"""The real, unmodified hub client against a hub on loopback, through `coldstart plan --json`."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from builder import hub as client
from builder.errors import ModelError
from builder.hub import remove_orphans
from tests.hub import COMMIT, Hub, redirecting, serve
from tests.models import write_model

REPO = "org/tiny-model"
SHARDS = tuple(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
FILES = sorted(("README.md", "config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS))
TOKEN = "hf_" + secrets.token_hex(17)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_model(tmp_path / "repository", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"a second format")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"a third")
    with serve(REPO, folder) as served:
        yield served


def _environ(hub: Hub, home: Path) -> dict[str, str]:
    """The user's own, without what would reach for their token or cache; `home` has the hub's cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "DOCKER_HOST": "unix:///no/engine.sock",
        "COLDSTART_CACHE": str(home / "cache"),
    }


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "builder.cli", *arguments]


def _plan(hub: Hub, home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command("plan", *(arguments or (REPO,)), "--json"),
        env=_environ(hub, home) | environ,
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def _started(hub: Hub, home: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        _command("plan", REPO, "--json"),
        env=_environ(hub, home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    while not condition():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def _flip(home: Path, name: str) -> None:
    [cached] = (home / "hf").rglob(f"snapshots/*/{name}")
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.resolve().write_bytes(data)


def _incomplete(home: Path) -> list[Path]:
    return list((home / "hf").rglob("*.incomplete"))


def test_branch_becomes_a_commit_and_only_what_serving_needs_comes(hub: Hub, tmp_path: Path) -> None:
    done = _plan(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["manifest"]["model"]
    assert (model["source"], model["revision"], model["license"]) == (f"hf://{REPO}", COMMIT, "apache-2.0")
    assert (model["served_name"], model["path"]) == (REPO, "/models/tiny-model")
    names = {file["path"] for file in model["files"]}
    assert names == {
        *("config.json", "tokenizer.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    assert sorted(hub.bodies) == FILES


def test_repository_of_pickles_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    for path in hub.folder.rglob("*.safetensors"):
        path.unlink()
    done = _plan(hub, tmp_path)
    assert done.returncode == 3
    assert "org/tiny-model has its weights as pickles only (pytorch_model.bin)" in done.stderr
    assert "Loading a pickle runs code from it." in done.stderr
    assert "`save_pretrained`" in done.stderr
    assert hub.bodies == []
    (hub.folder / "pytorch_model.bin").unlink()
    assert "has no *.safetensors" in _plan(hub, tmp_path).stderr


def test_login_of_the_hub_is_used_where_no_token_is_in_the_environment(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    done = _plan(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_second_time_fetches_nothing_and_offline_works(hub: Hub, tmp_path: Path) -> None:
    first = _plan(hub, tmp_path)
    hub.requests.clear()
    again = _plan(hub, tmp_path)
    assert again.stdout == first.stdout
    assert hub.bodies == []
    hub.requests.clear()
    offline = _plan(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["manifest"]["model"]["revision"] == COMMIT
    assert hub.requests == []


def test_branch_is_followed_once_and_its_drift_is_shown(hub: Hub, tmp_path: Path) -> None:
    spec = tmp_path / "coldstart.yaml"
    spec.write_text(f"model: {REPO}@main\n")

    def run(*arguments: str) -> str:
        return subprocess.run(
            _command(*arguments, "-f", str(spec)),
            env=_environ(hub, tmp_path),
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert json.loads(run("plan", "--json"))["drift"] == "new"
    run("render", "-o", str(tmp_path / "first"))
    assert json.loads(run("plan", "--json"))["drift"] == "unchanged"
    hub.push("f" * 40, write_model(tmp_path / "next"))
    assert json.loads(run("plan", "--json"))["drift"] == "upstream changed"
    run("render", "-o", str(tmp_path / "second"))
    first, second = ((tmp_path / name / "weights" / "Dockerfile").read_text() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json", "README.md"])
def test_flipped_byte_is_found_and_that_file_fetched_again(hub: Hub, tmp_path: Path, name: str) -> None:
    first = _plan(hub, tmp_path)
    _flip(tmp_path, name)
    hub.requests.clear()
    again = _plan(hub, tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert f"{name} is not what the hub has" in again.stderr
    assert hub.bodies == [name]


def test_file_that_arrives_damaged_every_time_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.lies = {"tokenizer.json": b"[]"}
    done = _plan(hub, tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "tokenizer.json of org/tiny-model arrived damaged twice" in done.stderr


def test_offline_a_damaged_or_missing_file_is_told(hub: Hub, tmp_path: Path) -> None:
    assert _plan(hub, tmp_path).returncode == 0
    _flip(tmp_path, "tokenizer.json")
    done = _plan(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (3, "")
    assert "tokenizer.json of org/tiny-model is damaged in the local hub cache" in done.stderr
    [cached] = (tmp_path / "hf").rglob("snapshots/*/tokenizer.json")
    cached.unlink()
    done = _plan(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (3, "")
    assert "tokenizer.json of org/tiny-model is not in the local hub cache" in done.stderr


def test_ctrl_c_does_not_wait_for_the_file_under_way(hub: Hub, tmp_path: Path) -> None:
    hub.stalled = set(SHARDS)
    with _started(hub, tmp_path) as process:
        _wait(lambda: set(SHARDS) <= set(hub.bodies), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)  # the files themselves would never end
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    hub.stalled.clear()
    assert _plan(hub, tmp_path).returncode == 0


def test_ctrl_c_does_not_wait_for_the_next_try(hub: Hub, tmp_path: Path) -> None:
    hub.refuse("/api/models/", 429, headers={"Retry-After": "500"})
    with _started(hub, tmp_path) as process:
        _wait(lambda: f"GET /api/models/{REPO}" in hub.requests, process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_killed_download_goes_on_with_the_file_that_was_cut(hub: Hub, tmp_path: Path) -> None:
    hub.stalled = {SHARDS[1]}
    others = set(FILES) - hub.stalled
    with _started(hub, tmp_path) as process:
        # Both at once: the others come while one is under way.
        _wait(lambda: set(FILES) == set(hub.bodies), process)
        _wait(lambda: all(any((tmp_path / "hf").rglob(f"snapshots/*/{n}")) for n in others), process)
        process.kill()
    assert len(_incomplete(tmp_path)) == 1
    hub.stalled.clear()
    hub.requests.clear()
    done = _plan(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.bodies == [SHARDS[1]]
    assert _incomplete(tmp_path) == []


def test_orphan_goes_only_when_nobody_writes_it(hub: Hub, tmp_path: Path) -> None:
    cache, folder = tmp_path / "hf" / "hub", "models--org--tiny-model"
    hub.stalled = {SHARDS[0]}
    with _started(hub, tmp_path) as process:
        _wait(lambda: SHARDS[0] in hub.bodies and len(_incomplete(tmp_path)) == 1, process)
        remove_orphans(cache, folder)
        assert len(_incomplete(tmp_path)) == 1
        process.kill()
        process.wait()
    remove_orphans(cache, "models--org--other")
    assert len(_incomplete(tmp_path)) == 1
    remove_orphans(cache, folder)
    assert _incomplete(tmp_path) == []


def test_two_builds_share_a_cache(hub: Hub, tmp_path: Path) -> None:
    hub.stalled = {SHARDS[0]}
    with _started(hub, tmp_path) as one, _started(hub, tmp_path) as two:
        asked = f"HEAD /{REPO}/resolve/{COMMIT}/{SHARDS[0]}"
        _wait(lambda: hub.requests.count(asked) == 2, one, two)
        hub.stalled.clear()
        results = [process.communicate() for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), results
    assert results[0][0] == results[1][0]
    assert sorted(hub.bodies) == FILES  # nothing twice
    assert _incomplete(tmp_path) == []
    # A damaged cache is mended under both without a file ever missing.
    _flip(tmp_path, SHARDS[0])
    with _started(hub, tmp_path) as one, _started(hub, tmp_path) as two:
        again = [process.communicate() for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), again
    assert [out for out, _ in again] == [out for out, _ in results]


def test_disk_is_checked_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.sizes = {SHARDS[0]: 10**18}
    done = _plan(hub, tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert "the download needs 1000000000.0 GB" in done.stderr
    assert hub.bodies == ["model.safetensors.index.json"]  # it says which weights are needed


def test_progress_is_of_the_whole_model(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "vocab.txt").write_bytes(b"word\n" * 1_000_000)
    assert f"Downloading {REPO}: 5.0 of 5.0 MB" in _plan(hub, tmp_path).stderr
    [cached] = (tmp_path / "hf").rglob(f"snapshots/*/{SHARDS[0]}")
    cached.resolve().unlink()
    cached.unlink()
    assert f"Downloading {REPO}: 5.0 of 5.0 MB" in _plan(hub, tmp_path).stderr


def test_what_passes_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.refuse("/api/", 503, times=2)
    hub.refuse(f"/{REPO}/resolve/{COMMIT}/{SHARDS[0]}", 429, times=3)
    hub.refuse(f"/{REPO}/resolve/{COMMIT}/config.json", 500, times=1)
    done = _plan(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the hub answered 503; trying again in 0 s" in done.stderr
    assert "the hub answered 429; trying again in 0 s" in done.stderr
    assert [refusal.times for refusal in hub.refusals] == [0, 0, 0]


@pytest.mark.parametrize("how", ["cuts", "resets"])
def test_cut_body_goes_on_from_where_it_was(hub: Hub, tmp_path: Path, how: str) -> None:
    # The client keeps whole pieces of 10 MiB; half of this is one and a bit.
    (hub.folder / "vocab.txt").write_bytes(b"word\n" * 5_000_000)
    getattr(hub, how)["vocab.txt"] = 1
    done = _plan(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the hub cut the connection; going on from there" in done.stderr
    assert hub.bodies.count("vocab.txt") == 2
    [resumed] = hub.ranges
    assert resumed == f"vocab.txt bytes={10 << 20}-"


def test_what_does_not_pass_is_one_message(hub: Hub, tmp_path: Path) -> None:
    hub.refuse("/api/", 503)
    done = _plan(hub, tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"cannot get {REPO}\n  The hub answered 503, at the last of 6 tries.\n" in done.stderr
    assert hub.requests.count(f"GET /api/models/{REPO}") == 6
    hub.refusals.clear()
    hub.refuse(f"/{REPO}/", 429, headers={"Retry-After": "86400"})
    done = _plan(hub, tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "The hub answered 429 and asks to wait 86400 s." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("", ""),
        ("503", "the hub answered 503; trying again in 0 s"),
        ("429", "the hub answered 429; trying again in 0 s"),
        ("cuts", "the hub cut the connection; going on from there"),
        ("resets", "the hub cut the connection; going on from there"),
        ("pauses", "the hub fell silent; going on from there"),
    ],
)
def test_another_host_is_retried_alike_and_sees_no_token(
    hub: Hub, tmp_path: Path, fault: str, words: str
) -> None:
    hub.token = TOKEN
    with redirecting(hub) as cdn:
        if fault.isdigit():
            cdn.refuse("/blobs/", int(fault), times=3)
        elif fault:
            getattr(cdn, fault)[SHARDS[0]] = 1
        done = _plan(hub, tmp_path, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert done.returncode == 0, done.stderr
        assert words in done.stderr
        assert {request.split(" ")[0] for request in cdn.requests} == {"GET"}
        assert len(cdn.requests) == 2 + (3 if fault.isdigit() else bool(fault))
        assert cdn.authorizations == []


def test_large_file_of_another_host_goes_on_from_where_it_was(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "vocab.txt").write_bytes(b"word\n" * 5_000_000)
    with pytest.MonkeyPatch.context() as patched, redirecting(hub) as cdn:
        patched.setattr("tests.hub._LFS_SUFFIXES", (".safetensors", ".txt"))
        cdn.resets["vocab.txt"] = 1
        done = _plan(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert cdn.ranges == [f"vocab.txt bytes={10 << 20}-"]


def test_other_host_that_asks_for_a_day_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    with redirecting(hub) as cdn:
        cdn.refuse("/blobs/", 429, headers={"Retry-After": "86400"})
        done = _plan(hub, tmp_path)
        assert done.returncode == 3
        assert "The hub answered 429 and asks to wait 86400 s." in done.stderr


def test_headers_come_from_another_host_too(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    with redirecting(hub) as cdn:
        cdn.refuse("/blobs/", 503, times=1)
        done = _plan(hub, tmp_path, REPO, "--weights", "download", HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        assert len(cdn.ranges) == 2
        assert cdn.authorizations == []


class _Panic(BaseException):
    """As pyo3's, which is no Exception."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CAS error"), "cannot get org/a@v1 CAS error. .*HF_HUB_DISABLE_XET=1"),
        (_Panic("in Rust"), "cannot get org/a@v1 _Panic: in Rust"),
        (RecursionError("deep"), "the answer about org/a@v1 is not like a hub's It is nested too deeply"),
    ],
)
def test_errors_of_the_chunk_transfer_are_told(error: BaseException, words: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(ModelError, match=words):
        client._call(client.Repository("model", "org/a", "v1"), fail)


@pytest.mark.parametrize(
    "says",
    [
        *({"sha": None}, {"sha": 5}, {"sha": "../../x"}, {"siblings": 3}, {"siblings": None}),
        *({"siblings": [{"rfilename": 5}]}, {"siblings": [{"rfilename": "config.json", "size": "10"}]}),
        {"siblings": [{"rfilename": "config.json", "size": -1}]},
        {"siblings": [{"rfilename": "model.safetensors", "size": 1, "lfs": {"sha256": None, "size": 1}}]},
        {"siblings": [{"rfilename": "a.safetensors", "lfs": {"sha256": "x", "size": 1, "pointerSize": 1}}]},
        {"siblings": [{"rfilename": "../model.safetensors", "size": 1}]},
    ],
)
def test_odd_answers_about_a_repository_are_refused(
    hub: Hub, tmp_path: Path, says: dict[str, object]
) -> None:
    hub.says = says
    for weights in ("bake", "download"):
        done = _plan(hub, tmp_path, REPO, "--weights", weights)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "Traceback" not in done.stderr
        assert "should not happen" not in done.stderr


@dataclass(frozen=True)
class _Case:
    """What the hub does, and the words that the user must see; the token is sent where there is one."""

    words: tuple[str, ...]
    refusal: tuple[str, int, str] | None = None
    model: str = REPO
    token: str = ""
    hub_token: str = ""


_REFUSALS = {
    "401 missing": _Case(
        ("org/other is not on the hub, or is private and no token", "HF_TOKEN"), model="org/other"
    ),
    "401 private": _Case(("is not on the hub, or is private and no token", "HF_TOKEN"), hub_token=TOKEN),
    "401 wrong token": _Case(
        ("does not accept the token", "Make a new token"), hub_token="other", token=TOKEN
    ),
    "404 with a token": _Case(
        ("does not exist on the hub, or the token may not see it",), model="org/other", token=TOKEN
    ),
    "404 without": _Case(("does not exist on the hub, or is private",), ("/api/", 404, "RepoNotFound")),
    "no revision": _Case(("has no revision 'nope'", "a branch, a tag or a commit"), model=f"{REPO}@nope"),
    "403 gated": _Case(
        ("is gated", "has not accepted", "with that account"), ("/api/", 403, "GatedRepo"), token=TOKEN
    ),
    "401 gated": _Case(("is gated", "then set HF_TOKEN"), ("/api/", 401, "GatedRepo")),
    "403 gated file": _Case(("is gated", "Accept the terms"), (f"/{REPO}/", 403, "GatedRepo"), token=TOKEN),
    "403": _Case(
        ("The hub answered 403", "Use a token that may read it"), (f"/{REPO}/", 403, ""), token=TOKEN
    ),
    "410": _Case(("The hub answered 410",), ("/api/", 410, "")),
    "not a hub": _Case(("is not like a hub's", "HF_ENDPOINT"), ("/api/", 200, "")),
}


@pytest.mark.parametrize("name", _REFUSALS)
def test_refusals_are_told_apart(hub: Hub, tmp_path: Path, name: str) -> None:
    case = _REFUSALS[name]
    hub.token = case.hub_token or None
    if case.refusal:
        hub.refuse(*case.refusal)
    done = _plan(hub, tmp_path, case.model, **({"HF_TOKEN": case.token} if case.token else {}))
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    for words in case.words:
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr


def _everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        yield str(path), os.fsencode(path)
        if path.is_file():
            yield str(path), path.read_bytes()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("failure", ["none", "401", "403", "404", "503", "damaged"])
def test_token_is_nowhere(hub: Hub, tmp_path: Path, failure: str, debug: bool) -> None:
    hub.token = TOKEN
    if failure == "401":
        hub.token = "another"
    elif failure == "damaged":
        hub.lies = {"tokenizer.json": b"[]"}
    elif failure != "none":
        hub.refuse(
            "/api/" if failure == "404" else f"/{REPO}/",
            int(failure),
            "GatedRepo" if failure == "403" else "",
        )
    out = tmp_path / "rendered"
    (tmp_path / "cache").mkdir()
    done = subprocess.run(
        _command(*(["--debug"] if debug else []), "render", REPO, "-o", str(out)),
        env=_environ(hub, tmp_path) | {"HF_TOKEN": TOKEN},
        capture_output=True,
        check=False,
    )
    assert (done.returncode == 0) == (failure == "none"), done.stderr.decode()
    assert out.exists() == (failure == "none")
    assert hub.requests
    secret = re.compile(b"|".join(re.escape(s) for s in (TOKEN.encode(), base64.b64encode(TOKEN.encode()))))
    found = [("stdout", done.stdout), ("stderr", done.stderr)]
    for folder in (out, tmp_path / "cache", tmp_path / "hf"):
        found += _everything(folder)
    assert [name for name, data in found if secret.search(data)] == []


DATASET = "org/texts"


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# Texts")
    (folder / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    (folder / "data" / "train-0.parquet").write_bytes(b"PAR1PAR1")
    (folder / "test.txt").write_text("other")
    with serve(DATASET, folder, "datasets") as served:
        yield served


_LOAD = """
import sys
from builder import calibration
from builder.errors import ColdstartError
from builder.report import SilentReporter
try:
    loaded = calibration.load(sys.argv[1], SilentReporter())
    print(loaded.documents, loaded.parquet and loaded.parquet.name)
except ColdstartError as error:
    print("refused", error)
"""


def _load(hub: Hub, home: Path, source: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, source],
        env=_environ(hub, home) | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_dataset_is_a_source_of_calibration(dataset: Hub, tmp_path: Path) -> None:
    name = f"hf://datasets/{DATASET}"
    dataset.refuse("/datasets/", 503, times=2)
    assert _load(dataset, tmp_path, name) == "('one',) None"
    assert dataset.bodies == ["data/train.jsonl"]
    assert _load(dataset, tmp_path, f"{name}@{COMMIT}/test.txt") == "('other',) None"
    assert _load(dataset, tmp_path, f"{name}/data/train-0.parquet") == "() train-0.parquet"
    _flip(tmp_path, "data/train.jsonl")
    assert "train.jsonl of the dataset org/texts is damaged" in _load(
        dataset, tmp_path, name, HF_HUB_OFFLINE="1"
    )
    dataset.requests.clear()
    assert _load(dataset, tmp_path, name) == "('one',) None"
    assert dataset.bodies == ["data/train.jsonl"]  # again, since it was damaged
    dataset.requests.clear()
    assert _load(dataset, tmp_path, name, HF_HUB_OFFLINE="1") == "('one',) None"
    assert dataset.requests == []


def test_dataset_that_cannot_be_had_is_told(dataset: Hub, tmp_path: Path) -> None:
    missing = _load(dataset, tmp_path, "hf://datasets/org/missing")
    assert missing.startswith("refused the dataset org/missing is not on the hub, or is private")
    name = f"hf://datasets/{DATASET}"
    assert "has no revision 'v9'" in _load(dataset, tmp_path, f"{name}@v9")
    assert "is not in the local hub cache" in _load(dataset, tmp_path, name, HF_HUB_OFFLINE="1")
    dataset.lies = {"data/train.jsonl": b'{"text": "two"}\n'}
    assert "arrived damaged twice" in _load(dataset, tmp_path, name)


def test_recipe_is_of_the_datasets_documents(hub: Hub, dataset: Hub, tmp_path: Path) -> None:
    """Through the command line: the model is a folder, so that the one hub is that of the dataset."""
    spec = tmp_path / "coldstart.yaml"
    spec.write_text(f"model: repository\nquantize: awq\ncalibration: hf://datasets/{DATASET}\n")
    done = _plan(dataset, tmp_path, "-f", str(spec))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quantize_first"]
    assert dataset.bodies == ["data/train.jsonl"]


def test_model_that_cannot_be_quantized_is_refused_before_its_weights_come(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 128}
    with serve(REPO, write_model(tmp_path / "repository", config=config)) as hub:
        done = _plan(hub, tmp_path, REPO, "--quantize", "awq", "--base", "coldstart/base-cpu:any")
        assert done.returncode == 3
        assert "Qwen3MoeForCausalLM on CPUs" in done.stderr
        assert any("config.json" in request for request in hub.requests)
        assert not any("safetensors" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 128, "desc_act": false}'),
        ("quant_config.json", '{"w_bit": 4, "q_group_size": 128, "zero_point": true}'),
        ("hf_quant_config.json", '{"producer": {}, "quantization": {"quant_algo": "FP8"}}'),
        ("params.json", '{"quantization": {"qformat_weight": "fp8_e4m3"}}'),
        (SHARDS[0], ""),
    ],
)
def test_quantized_model_is_refused_before_its_weights_come(
    hub: Hub, tmp_path: Path, name: str, content: str
) -> None:
    if content:
        (hub.folder / name).write_text(content)
    else:
        shard = hub.folder / name
        shard.write_bytes(shard.read_bytes().replace(b"F32", b"I32").replace(b'"t0"', b'"t0.qweight"'))
        header = shard.read_bytes()[8:].split(b"}}", 1)[0].strip() + b"}}"
        shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        index = hub.folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace('"t0"', '"t0.qweight"'))
    done = _plan(hub, tmp_path, REPO, "--quantize", "awq", "--base", "coldstart/base-cpu:any")
    assert done.returncode == 3, done.stderr
    assert "the model is quantized already" in done.stderr
    assert len([path for path in hub.bodies if path.endswith(".safetensors")]) == len(hub.ranges)
    plain = _plan(hub, tmp_path, REPO)
    assert plain.returncode == 0, plain.stderr
    model = json.loads(plain.stdout)["manifest"]
    assert "quantization" in json.dumps(model)


def test_quantization_that_memory_lacks_for_is_refused_before_the_weights_come(
    hub: Hub, tmp_path: Path
) -> None:
    parameters = 10**13
    header = {"t0": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}
    text = json.dumps(header).encode()
    (hub.folder / SHARDS[0]).write_bytes(len(text).to_bytes(8, "little") + text)
    hub.sizes = {SHARDS[0]: 5 * parameters}
    done = _plan(hub, tmp_path, REPO, "--quantize", "awq", "--base", "coldstart/base-cpu:any")
    assert done.returncode == 4, done.stderr
    assert "of memory" in done.stderr
    assert "10000.00e9 parameters" in done.stderr
    assert len([path for path in hub.bodies if path.endswith(".safetensors")]) == len(hub.ranges) == 2


def test_weights_that_the_index_does_not_name_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    doubles = ("model.safetensors", "model-fp16.safetensors")
    for name in doubles:
        (hub.folder / name).write_bytes(b"the same again")
    done = _plan(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(hub.bodies) == FILES
    _flip(tmp_path, "model.safetensors.index.json")
    assert _plan(hub, tmp_path).stdout == done.stdout
    assert sorted(hub.bodies) == sorted([*FILES, "model.safetensors.index.json"])
    assert _plan(hub, tmp_path, HF_HUB_OFFLINE="1").stdout == done.stdout


def test_download_takes_the_lock_from_the_hub_and_leaves_the_weights_there(hub: Hub, tmp_path: Path) -> None:
    left = _plan(hub, tmp_path, REPO, "--weights", "download")
    assert left.returncode == 0, left.stderr
    # Of a shard its header is read; nothing of it is in the cache.
    assert sorted(hub.ranges) == [
        "model-00001-of-00002.safetensors bytes=0-100000",
        "model-00002-of-00002.safetensors bytes=0-100000",
    ]
    assert not [name for name in hub.bodies if name.endswith(".safetensors")][2:]
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    manifest, baked = (json.loads(done.stdout)["manifest"] for done in (left, _plan(hub, tmp_path)))
    assert manifest["weights"] == "download"
    assert manifest["model"] == baked["model"]


def test_shard_that_the_index_names_and_the_hub_lacks(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "model-00002-of-00002.safetensors").unlink()
    done = _plan(hub, tmp_path, REPO, "--weights", "download")
    assert done.returncode == 3
    assert "the shard model-00002-of-00002.safetensors is missing" in done.stderr


def test_tensor_that_the_index_names_and_no_header_has(hub: Hub, tmp_path: Path) -> None:
    index = hub.folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"t1"', '"t9"'))
    done = _plan(hub, tmp_path, REPO, "--weights", "download")
    assert done.returncode == 3
    assert "has no tensor 't9'" in done.stderr


@pytest.mark.parametrize("header", [b"", b"[" * 90_000, b'{"t0":' * 90_000, b'{"t0": {"shape": [1e999]}}'])
def test_shard_on_the_hub_without_a_header(hub: Hub, tmp_path: Path, header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header if header else b"not safetensors at all"
    (hub.folder / "model-00001-of-00002.safetensors").write_bytes(content)
    done = _plan(hub, tmp_path, REPO, "--weights", "download")
    assert done.returncode == 3
    assert "model-00001-of-00002.safetensors of org/tiny-model is corrupt" in done.stderr


def test_weights_that_the_hub_keeps_in_git_are_looked_at_here(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.hub._LFS_SUFFIXES", (".bin",))
    done = _plan(hub, tmp_path, REPO, "--weights", "download")
    assert done.returncode == 0, done.stderr
    shard = next(f for f in json.loads(done.stdout)["manifest"]["model"]["files"] if "00001" in f["path"])
    assert shard["sha256"] == sha256((hub.folder / shard["path"]).read_bytes()).hexdigest()


_LOCK = """
import sys
from pathlib import Path
from builder import build, lockfile
from builder.errors import ColdstartError
from builder.report import SilentReporter
from builder.spec import load_spec
file = Path(sys.argv[1])
spec, lock = load_spec(file, {}), lockfile.beside(file)
try:
    found = build.resolve_model(spec, SilentReporter(), lock_path=lock, locked=len(sys.argv) > 2)
    print(found.calibration.documents, found.calibration.commit)
except ColdstartError as error:
    print("refused", error)
"""


def test_branch_of_a_dataset_is_followed_once(hub: Hub, dataset: Hub, tmp_path: Path) -> None:
    file, lock = tmp_path / "coldstart.yaml", tmp_path / "coldstart.lock"
    file.write_text(f"model: repository\nquantize: awq\ncalibration: hf://datasets/{DATASET}@main\n")

    def resolve(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", _LOCK, str(file), *arguments],
            env=_environ(dataset, tmp_path),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    first = resolve()
    assert first == f"('one',) {COMMIT}"
    kept = json.loads(lock.read_text())["calibration"]
    assert (kept["source"], kept["revision"]) == (f"hf://datasets/{DATASET}@main", COMMIT)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "train.txt").write_text("two")
    dataset.push("f" * 40, moved)
    assert resolve() == resolve("--locked") == first
    # The same commit with other bytes.
    (dataset.folder / "data" / "train.jsonl").write_text('{"text": "three"}\n')
    told = f"refused the calibration text of hf://datasets/{DATASET}@main is not what was locked"
    before = lock.read_bytes()
    for path in (tmp_path / "hf").rglob("train.jsonl"):
        path.unlink()
    assert resolve().startswith(told)
    assert "the calibration text differs from its lock" in resolve("--locked")
    assert lock.read_bytes() == before
    lock.unlink()
    assert resolve() == f"('two',) {'f' * 40}"


def test_folder_cannot_be_downloaded(hub: Hub, tmp_path: Path) -> None:
    done = _plan(hub, tmp_path, str(hub.folder), "--weights", "download")
    assert done.returncode == 2
    assert "Bake or mount it" in done.stderr
