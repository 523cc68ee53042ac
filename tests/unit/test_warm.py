"""What `warm` records, and when it refuses: with a stub in place of the server, whose answers are given."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import deferred, golden, modes, prefetch, record, state, warm
from runtime.golden import Answer
from runtime.preflight import Facts
from runtime.settings import Manifest, SettingsError, load
from runtime.state import Mode, Recording

FACTS = Facts(False, 0, None, None, None, None, (), None)
MANIFEST = Manifest("/models/m", "m", "cpu", (), digest="d", dtype="bfloat16")
RIGHT = Answer(("The", "end"), ({"The": -0.1, "L": -0.3}, {"end": -0.1}))
OTHER = Answer(("L", "end"), ({"L": -0.2, "The": -0.2}, {"end": -0.1}))
USED = {"status": "used", "reason": "", "mode": "", "key": ""}


class Stub:
    """Servers by mode: what they answer, and how fast; and what the start from the recording says."""

    def __init__(self, answers: Mapping[str, Answer], rates: Mapping[str, float]) -> None:
        self.answers, self.rates = answers, rates
        self.compiled: list[str] = ["loaded from the cache"]
        self.recording: Mapping[str, str] = USED
        self.last: Answer | None = None
        self.generates = True
        self.asked: list[str] = []
        self.started: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
        stub = self

        @contextmanager
        def server(self: Any, mode: Mode | None, environment: Any = None, off: Any = ()) -> Iterator[int]:
            stub.started.append(mode.name if mode else "recording")
            # A shortcut that computes wrongly must not be what answers are held to.
            assert bool(off) == (mode is not None and mode.name.startswith("eager"))
            if mode is not None:
                cache = self._cache(mode)
                (cache / "vllm").mkdir(parents=True)
                (cache / "vllm" / "model").write_text(mode.name)
                if "compiled" in mode.name:
                    (cache / "vllm" / "torch_compile_cache").mkdir()
                    (cache / "vllm" / "torch_compile_cache" / "code").write_text("")
                (cache / record.VARIABLES).write_text('["VLLM_X"]')
            else:
                (output / record.OPENED).write_text("/etc/hostname\n")
                (output / deferred.TOUCHED).write_text("json\n")
            yield 1 << 22  # a process without any below it

        def get(url: str) -> Any:
            phases = [{"phase": "compile", "detail": detail} for detail in stub.compiled]
            return {"recording": stub.recording, "phases": phases, "elapsed": 1.0}

        def post(url: str, _: Any) -> Any:
            stub.asked.append(url.partition("8000")[2])
            return {}

        def ask(*_: Any, **__: Any) -> list[Answer]:
            now = stub.started[-1]
            if now == "recording":
                # What only log-probabilities need is no part of an ordinary start.
                with (output / deferred.TOUCHED).open("a") as file:
                    file.write("torch._dynamo\n")
                assert stub.last is not None
                return [stub.last]
            return [stub.answers[now]]

        monkeypatch.setattr(warm._Warm, "_server", server)
        monkeypatch.setattr(golden, "get", get)
        monkeypatch.setattr(golden, "ask", ask)
        monkeypatch.setattr(golden, "has_chat", lambda *_: False)
        monkeypatch.setattr(golden, "generates", lambda *_: stub.generates)
        monkeypatch.setattr(golden, "post", post)
        monkeypatch.setattr(golden, "tokens_per_second", lambda *_: stub.rates[stub.started[-1]])


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    """bf16 compiled answers differently, float32 compiled is right and fast."""
    made = Stub(
        {"eager": RIGHT, "compiled": OTHER, "eager-float32": RIGHT, "compiled-float32": RIGHT},
        {"eager": 100.0, "eager-float32": 80.0, "compiled-float32": 150.0},
    )
    made.last = RIGHT
    made.install(monkeypatch, tmp_path)
    return made


def run(
    output: Path, optimize: str = "balanced", *argv: str, mode: str | None = None, loaders: bool = False
) -> int:
    settings = load(argv, {}, replace(MANIFEST, optimize=optimize))
    insisted = modes.named(settings, mode) if mode else None
    return warm.warm(settings, argv, FACTS, output, insisted, loaders=loaders)


def read(output: Path) -> Recording:
    (folder,) = state.recordings(output)
    return Recording.read(folder)


def test_the_mode_that_answers_differently_is_refused_and_the_next_is_recorded(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    made = read(tmp_path)
    assert made.mode.name == "compiled-float32"
    assert "--no-enforce-eager" in made.mode.engine_args
    assert (made.folder / state.FILES / "vllm" / "model").read_text() == "compiled-float32"
    assert golden.read(made.folder / golden.FILE) == [RIGHT]
    assert made.report["chosen"] == "compiled-float32"
    assert made.report["against_eager"] == pytest.approx(0.5)
    assert (tmp_path / prefetch.FILE_LIST).read_text() == "/etc/hostname\n"
    assert (tmp_path / deferred.TOUCHED).read_text() == "json\n"
    said = capsys.readouterr().err
    assert "compiled: refused; answers differently" in said
    assert "serves with compiled-float32: 150 tokens/s; +50% against eager" in said


def test_eager_is_recorded_where_nothing_is_gained(stub: Stub, tmp_path: Path) -> None:
    stub.rates = {**stub.rates, "compiled-float32": 110.0}
    assert run(tmp_path) == 0
    assert read(tmp_path).mode.name == "eager"


def test_a_mode_that_is_insisted_on_is_recorded_however_slow(stub: Stub, tmp_path: Path) -> None:
    stub.rates = {**stub.rates, "compiled-float32": 1.0}
    assert run(tmp_path, "startup", mode="compiled-float32") == 0
    assert stub.started == ["eager-float32", "compiled-float32", "recording"]
    assert read(tmp_path).report["against_eager"] == pytest.approx(1 / 80 - 1)


def test_a_mode_that_is_insisted_on_must_answer_right(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, mode="compiled") == 1
    assert "--mode compiled is refused" in capsys.readouterr().err
    assert not state.recordings(tmp_path)


def test_eager_is_recorded_on_demand_without_trying_others(stub: Stub, tmp_path: Path) -> None:
    assert run(tmp_path, mode="eager") == 0
    assert stub.started == ["eager", "recording"]


@pytest.mark.parametrize("argv", [(), ("--enforce-eager",)])
def test_an_unknown_mode_is_refused_with_those_that_there_are(argv: tuple[str, ...]) -> None:
    name = "compiled" if argv else "fast"
    with pytest.raises(SettingsError, match=f"--mode {name}: no such mode .* there are: .*eager"):
        modes.named(load(argv, {}, MANIFEST), name)


def test_startup_tries_nothing_else_but_measures(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "startup") == 0
    assert stub.started == ["eager", "recording"]
    assert golden.read(read(tmp_path).folder / golden.FILE) == [RIGHT]
    assert read(tmp_path).report["tokens_per_second"] == 100.0
    assert "serves with eager: 100 tokens/s; no other way was tried" in capsys.readouterr().err


def test_a_model_that_generates_nothing_is_recorded_as_vllm_runs_it(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.generates = False
    stub.compiled = []
    assert run(tmp_path) == 0
    assert stub.started == ["eager", "recording"]
    assert "/v1/embeddings" in stub.asked
    assert "/v1/completions" not in stub.asked
    assert not (read(tmp_path).folder / golden.FILE).exists()
    assert "generates no text" in capsys.readouterr().err
    assert run(tmp_path, mode="eager") == 0
    assert run(tmp_path, mode="compiled") == 1
    assert "no text to hold it to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"compiled": ["not in the cache", "compiled"]}, "vLLM compiled again what was recorded"),
        ({"compiled": []}, "does not say that it loaded the compiled code"),
        (
            {"recording": {"status": "unused", "reason": "it rains"}},
            "its own recording: it rains",
        ),
        ({"last": OTHER}, "a start from the recording answers differently"),
    ],
)
def test_a_recording_that_does_not_hold_fails(
    change: dict[str, Any], told: str, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in change.items():
        setattr(stub, name, value)
    assert run(tmp_path) == 1
    assert told in capsys.readouterr().err


def test_recordings_of_other_machines_are_kept(stub: Stub, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, "balanced", "--max-model-len", "9") == 0
    assert len(state.recordings(tmp_path)) == 2
    described = [json.loads((folder / state.RECORDING).read_bytes()) for folder in state.recordings(tmp_path)]
    assert {one["facts"]["engine arguments"] for one in described} == {"", "--max-model-len 9"}


LOADERS = ("vLLM's own", "prefetch", "4 threads")


def _cold_starts(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> list[str]:
    """What the starts with each loader take, one after the other; their names are noted."""
    begun: list[str] = []

    def start(_: Any, name: str, arguments: tuple[str, ...]) -> float:
        loader = name.rpartition("-")[0]
        begun.append(loader)
        assert bool(arguments) == (loader != "vLLM's own")
        if not seconds[loader]:
            raise warm.WarmError("the server ended, see above")
        return seconds[loader].pop(0)

    monkeypatch.setattr(warm._Warm, "_cold_start", start)
    return begun


def test_the_quickest_loader_is_recorded(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, prefetch, threads = LOADERS
    begun = _cold_starts(
        monkeypatch, {own: [5.0, 5.2, 9.0], prefetch: [4.9, 3.0, 3.1], threads: [5.1, 5.1, 5.1]}
    )
    assert run(tmp_path, "startup", loaders=True) == 0
    assert begun == [own, prefetch, threads, threads, prefetch, own, own, prefetch, threads]
    assert stub.started == ["eager", "recording"]
    recording = read(tmp_path)
    assert recording.mode.name == "eager"
    assert recording.mode.engine_args == ("--enforce-eager", "--safetensors-load-strategy", "prefetch")
    assert recording.report["loader"] == prefetch
    assert "vLLM's own 5.2 s, prefetch 3.1 s, 4 threads 5.1 s; taken: prefetch" in capsys.readouterr().err


def test_a_loader_that_is_hardly_quicker_or_missing_is_not_taken(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, prefetch, threads = LOADERS
    _cold_starts(monkeypatch, {own: [5.0, 5.2, 9.0], prefetch: [5.1, 3.0, 3.1], threads: []})
    assert run(tmp_path, "startup", loaders=True) == 0
    assert read(tmp_path).mode.engine_args == ("--enforce-eager",)
    error = capsys.readouterr().err
    assert "loader 4 threads is left out: the server ended" in error
    assert "taken: vLLM's own" in error


def test_no_loader_is_tried_where_the_user_has_chosen_one(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = _cold_starts(monkeypatch, {})
    assert run(tmp_path, "startup", "--load-format", "dummy", loaders=True) == 0
    assert begun == []
    assert "no other way is tried" in capsys.readouterr().err


def test_a_cold_start_that_finds_the_weights_in_memory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(32 << 20))
    settings = load((), {}, replace(MANIFEST, model_path=str(tmp_path)))
    read = {"bytes": 31 << 20}

    @contextmanager
    def server(*_: Any) -> Iterator[int]:
        yield os.getpid()

    monkeypatch.setattr(warm._Warm, "_server", server)
    monkeypatch.setattr(warm, "descendants", lambda _: [])
    monkeypatch.setattr(warm, "_read_bytes", lambda _: read["bytes"])
    monkeypatch.setattr(golden, "get", lambda _: {"elapsed": 4.5})
    one = warm._Warm(settings, (), FACTS, tmp_path / "out", tmp_path / "cache")
    assert one._cold_start("prefetch-0", ("--safetensors-load-strategy", "prefetch")) == 4.5
    assert "in memory still" not in capsys.readouterr().err
    read["bytes"] = 3 << 20
    one._cold_start("prefetch-1", ())
    assert "read 3 MiB of 32 MiB of weights from the disk" in capsys.readouterr().err


def test_what_a_process_reads_from_the_disk_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(os.urandom(8 << 20))
        os.fsync(file.fileno())
    warm._forget(path)
    before = warm._read_bytes(os.getpid())
    path.read_bytes()
    assert warm._read_bytes(os.getpid()) - before >= 8 << 20
    path.read_bytes()
    assert warm._read_bytes(os.getpid()) - before < 16 << 20
    assert warm._read_bytes(1 << 22) == 0
