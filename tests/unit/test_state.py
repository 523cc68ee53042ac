"""Recordings: used where they were made for, never elsewhere, and never when damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import fingerprint, modes, state
from runtime.preflight import Facts, Gpu
from runtime.settings import Manifest, Settings, load
from runtime.state import Mode, Recording, StateError

CPUINFO = """processor\t: 0
flags\t\t: fpu vme sse sse2 avx avx2 avx512f avx512_bf16 rdtscp fma hypervisor bmi1 bmi2
processor\t: 1
flags\t\t: fpu sse
"""
MANIFEST = Manifest("/models/m", "m", "cpu", ("--kv-cache-memory-bytes", "8"), digest="d", dtype="bfloat16")
CHANGED = 1_700_000_000_123_456_789
FACTS = Facts(False, 0, None, None, None, None, (), None)


def settings(*argv: str, **changes: Any) -> Settings:
    return load(argv, {}, replace(MANIFEST, **changes))


def facts(*argv: str, environ: dict[str, str] | None = None, **options: Any) -> dict[str, str]:
    options.setdefault("cpuinfo", CPUINFO)
    return fingerprint.gather(settings(*argv), environ or {}, ("VLLM_X", "CXX"), **options)


def recording(folder: Path, files: dict[str, bytes], **here: str) -> Recording:
    """A recording with these files in a folder of state."""
    root = folder / state.RECORDINGS / state.key(here)
    entries = {}
    for path, data in files.items():
        (root / state.FILES / path).parent.mkdir(parents=True, exist_ok=True)
        (root / state.FILES / path).write_bytes(data)
        entries[path] = (len(data), hashlib.sha256(data).hexdigest(), CHANGED)
    root.mkdir(parents=True, exist_ok=True)
    made = Recording(root, here, ("VLLM_X",), Mode("compiled", ("--no-enforce-eager",), {"A": "1"}), entries)
    made.write()
    return made


def test_only_what_matters_is_a_fact() -> None:
    same = facts()
    neutral = ("--uvicorn-log-level", "warning", "--disable-log-stats", "--max-log-len", "3")
    assert facts(*neutral, "--kv-cache-memory-bytes", "99") == same
    assert facts(environ={"VLLM_LOGGING_LEVEL": "DEBUG", "PATH": "/x"}) == same
    other_tables = CPUINFO.replace("hypervisor", "spec_ctrl md_clear")
    assert facts(cpuinfo=other_tables) == same


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (facts("--max-model-len", "7"), "engine arguments"),
        (facts("--dtype=float16"), "engine arguments"),
        (facts(environ={"VLLM_X": "1"}), "environment: recorded for none, here VLLM_X=1"),
        (facts(cpuinfo=CPUINFO.replace(" avx512_bf16", "")), "processor"),
        (facts(gpus=(Gpu("H100", (9, 0), 80),), driver=(570, 1)), "GPUs: recorded for none, here H100 9.0"),
    ],
)
def test_what_matters_is_told(other: dict[str, str], told: str) -> None:
    assert told in fingerprint.differences(facts(), other)


def test_a_processor_that_lacks_instructions_is_told_by_them() -> None:
    long = CPUINFO.replace("avx2", "avx2 " + " ".join(f"avx512_{i}" for i in range(20)))
    here = facts(cpuinfo=long.replace(" avx512_bf16", ""))
    assert fingerprint.differences(facts(cpuinfo=long), here) == "processor: here without avx512_bf16"


def test_arm_features_are_instructions() -> None:
    assert fingerprint.instructions("Features\t: fp asimd sve\n") == ["asimd", "fp", "sve"]


def test_the_recording_of_these_facts_is_chosen_among_several(tmp_path: Path) -> None:
    recording(tmp_path, {}, processor="a", vllm="1")
    wanted = recording(tmp_path, {}, processor="b", vllm="1")
    assert state.choose({"processor": "b", "vllm": "1"}, tmp_path) == wanted
    with pytest.raises(StateError, match="processor: recorded for"):
        state.choose({"processor": "c", "vllm": "1"}, tmp_path)
    assert state.choose({}, tmp_path / "nothing") is None
    assert state.variables(tmp_path) == ("VLLM_X",)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"facts": {}}', b"\xff\xfe"])
def test_a_damaged_description_is_told(tmp_path: Path, content: bytes) -> None:
    made = recording(tmp_path, {}, processor="a")
    (made.folder / state.RECORDING).write_bytes(content)
    with pytest.raises(StateError, match="is damaged"):
        state.choose({"processor": "a"}, tmp_path)


def test_files_are_copied_writable(tmp_path: Path) -> None:
    made = recording(tmp_path, {"vllm/a/model": b"code", "inductor/b": b""}, processor="a")
    (made.folder / state.FILES / "vllm/a/model").chmod(0o444)
    state.install(made, tmp_path / "cache")
    copy = tmp_path / "cache/vllm/a/model"
    assert copy.read_bytes() == b"code"
    assert copy.stat().st_mtime_ns == CHANGED
    copy.write_bytes(b"more")
    assert set(state.cache_environment(tmp_path / "cache")) >= {"VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(b"c0de"), "is damaged"),
        (lambda path: path.write_bytes(b"co"), "is damaged"),
        (lambda path: path.unlink(), "cannot be copied"),
    ],
)
def test_damaged_files_are_not_used_and_nothing_is_left(tmp_path: Path, damage: Any, told: str) -> None:
    made = recording(tmp_path, {"vllm/first": b"1", "vllm/model": b"code"}, processor="a")
    damage(made.folder / state.FILES / "vllm/model")
    with pytest.raises(StateError, match=told):
        state.install(made, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", ["../../evil", "/etc/evil"])
def test_a_path_outside_the_recording_is_refused(tmp_path: Path, path: str) -> None:
    made = recording(tmp_path, {}, processor="a")
    made = replace(made, files={path: (0, hashlib.sha256(b"").hexdigest(), 0)})
    with pytest.raises(StateError, match="outside"):
        state.install(made, tmp_path / "cache")


def test_locks_and_unfinished_files_are_not_kept(tmp_path: Path) -> None:
    for name in ("model", "x.lock", "y.tmp"):
        (tmp_path / name).write_bytes(b"1")
    assert [path for path, _, _ in state.collect(tmp_path)] == ["model"]


def test_a_start_without_a_recording_runs_as_it_is_safe_on_the_device() -> None:
    found, chosen = modes.find_recording(settings(), FACTS, {})
    assert chosen is None
    assert found.vllm_args()[-1] == "--enforce-eager"
    cuda, _ = modes.find_recording(settings(device="cuda"), FACTS, {})
    assert cuda.mode_args == ()


def test_the_users_arguments_come_after_those_of_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path))
    here = fingerprint.gather(settings(), {}, ("VLLM_X",))
    made = recording(tmp_path, {}, **here)
    found, chosen = modes.find_recording(settings(), FACTS, {})
    assert chosen == made
    assert found.recorded["status"] == "used"
    assert found.vllm_args()[-1] == "--no-enforce-eager"
    for argv, environ, reason in (
        (("--max-model-len", "7"), {}, "engine arguments"),
        (("--off", "recording"), {}, "--off"),
        ((), {"VLLM_CACHE_ROOT": "/x"}, "VLLM_CACHE_ROOT is set"),
        ((), {"VLLM_X": "1"}, "environment"),
    ):
        found, chosen = modes.find_recording(settings(*argv), FACTS, environ)
        assert chosen is None
        assert reason in found.recorded["reason"]
        assert "--enforce-eager" in found.vllm_args()


@pytest.mark.parametrize(
    ("changes", "argv", "names"),
    [
        ({}, (), ["compiled", "compiled-float32"]),
        ({"optimize": "startup"}, (), []),
        ({}, ("--enforce-eager",), []),
        ({}, ("--dtype", "float16"), ["compiled"]),
        ({"quantization": "compressed-tensors int4"}, (), ["compiled"]),
        ({"dtype": "float32"}, (), ["compiled"]),
        ({"device": "cuda"}, (), ["default"]),
        ({"device": "cuda", "optimize": "startup"}, (), ["few-graphs"]),
        ({"device": "cuda", "optimize": "throughput"}, (), ["O3", "default"]),
    ],
)
def test_the_modes_that_are_tried(changes: dict[str, Any], argv: tuple[str, ...], names: list[str]) -> None:
    assert [mode.name for mode in modes.candidates(settings(*argv, **changes))] == names


# A CPU without AVX-512, whose memory is enough for whatever this model takes.
OLD = Facts(
    False, 0, None, None, 64 << 30, None, (),
    {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 8, "max_position_embeddings": 100},
    lacks_avx512=True,
)  # fmt: skip
ROOMY = {"weight_bytes": 1 << 30, "engine_args": ("--kv-cache-memory-bytes", "8000000")}
PACKED = {**(OLD.config or {}), "quantization_config": {"quant_method": "awq", "bits": 4}}


@pytest.mark.parametrize(
    ("changes", "argv", "facts", "names"),
    [
        ({}, (), OLD, ["eager-float32", "compiled-float32"]),
        ({"device": "cuda"}, (), replace(OLD, lacks_avx512=False), ["default", "eager", "default"]),
        ({}, (), replace(OLD, lacks_avx512=False), ["eager", "compiled", "compiled-float32"]),
        ({}, (), replace(OLD, memory=3 << 30), ["eager", "compiled"]),
        ({}, (), replace(OLD, memory=None), ["eager", "compiled", "compiled-float32"]),
        ({}, ("--dtype", "auto"), OLD, ["eager", "compiled"]),
        ({}, ("--kv-cache-dtype", "fp8"), OLD, ["eager", "compiled"]),
        ({"dtype": "float32"}, (), OLD, ["eager", "compiled"]),
        (
            {"quantization": "awq int4"},
            (),
            replace(OLD, config=PACKED),
            ["eager-float32", "compiled-float32"],
        ),
        ({"quantization": "int8"}, (), OLD, ["eager", "compiled"]),
    ],
)
def test_where_16_bits_are_computed_in_software_float32_is_taken(
    changes: dict[str, Any], argv: tuple[str, ...], facts: Facts, names: list[str]
) -> None:
    found, _ = modes.find_recording(settings(*argv, **{**ROOMY, **changes}), facts, {})
    assert found.mode_args == modes.unrecorded(found).engine_args
    every = [modes.unrecorded(found), modes.eager(found), *modes.candidates(found)]
    assert list(dict.fromkeys(mode.name for mode in every)) == list(dict.fromkeys(names))


def test_a_recording_in_float32_is_not_used_where_memory_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "folder", lambda: tmp_path)
    image = settings(**ROOMY)
    made = recording(tmp_path, {}, **fingerprint.gather(image, {}, ("VLLM_X",)))
    replace(made, mode=Mode("compiled-float32", ("--no-enforce-eager", "--dtype", "float32"))).write()
    found, chosen = modes.find_recording(image, OLD, {})
    assert chosen is not None
    assert found.recorded["mode"] == "compiled-float32"
    found, chosen = modes.find_recording(image, replace(OLD, memory=3 << 30), {})
    assert chosen is None
    assert "memory is too small" in found.recorded["reason"]
    assert found.mode_args == ("--enforce-eager",)


def test_a_mode_is_held_against_eager_of_its_dtype() -> None:
    compiled, wide = modes.candidates(settings())
    assert modes.reference(compiled).engine_args == ("--enforce-eager",)
    assert modes.reference(wide).engine_args == ("--enforce-eager", "--dtype", "float32")


@pytest.mark.parametrize(
    ("optimize", "rates", "chosen"),
    [
        ("balanced", [130.0], "compiled 0"),
        ("balanced", [110.0], "eager"),
        ("balanced", [], "eager"),
        ("throughput", [101.0, 105.0], "compiled 1"),
        ("throughput", [90.0], "eager"),
        ("startup", [90.0], "compiled 0"),
    ],
)
def test_what_is_chosen(optimize: str, rates: list[float], chosen: str) -> None:
    right = [modes.Measured(Mode(f"compiled {i}"), rate) for i, rate in enumerate(rates)]
    assert modes.choose(optimize, modes.Measured(Mode("eager"), 100.0), right).mode.name == chosen


def test_the_description_is_readable_json(tmp_path: Path) -> None:
    made = recording(tmp_path, {"vllm/a": b"1"}, processor="a")
    data = json.loads((made.folder / state.RECORDING).read_bytes())
    assert data["mode"]["engine_args"] == ["--no-enforce-eager"]
    assert Recording.read(made.folder) == made
