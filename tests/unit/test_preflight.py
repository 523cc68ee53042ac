"""Each check with the facts of a machine that fails it, and of one that does not."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import preflight
from runtime.preflight import (
    Facts,
    Gpu,
    PreflightError,
    cache_bytes,
    check,
    chosen_gpus,
    gather,
    memory_limit,
    minimum_driver,
    parse_driver,
    parse_gpus,
)
from runtime.settings import LockedFile, Manifest, load

GIB = 1 << 30
CONFIG = {"num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 8}
CPU = Manifest("/models/tiny", "tiny", "cpu", ("--kv-cache-memory-bytes", str(2 * GIB)), weight_bytes=GIB)
GPU = Manifest("/models/tiny", "tiny", "cuda", (), weight_bytes=8 * GIB, quantization="awq int4 g128")
L4 = Gpu("NVIDIA L4", (8, 9), 23 * GIB)
GOOD = Facts(
    gpu_visible=True,
    gpu_count=4,
    driver=(580, 95),
    gpus=(L4,) * 4,
    memory=64 * GIB,
    shm_free=GIB,
    read_only=(),
    config=CONFIG,
)
ENVIRON = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.mark.parametrize(
    ("manifest", "argv"),
    [
        (CPU, []),
        (GPU, []),
        (GPU, ["-tp", "4"]),
        (GPU, ["-tp", "2", "-pp", "2"]),
        (GPU, ["-tp", "12", "--nnodes", "3"]),
        (GPU, ["-tp", "what"]),
        (GPU, ["--gpu-memory-utilization", "0.9"]),
        (GPU, ["--gpu-memory-utilization", "much"]),
    ],
)
def test_good_machine_passes(manifest: Manifest, argv: list[str]) -> None:
    check(load(argv, {}, manifest), GOOD, ENVIRON if manifest is CPU else {"CUDA_VERSION": "13.0.1"})


@pytest.mark.parametrize(
    ("manifest", "argv", "facts", "words"),
    [
        (GPU, [], replace(GOOD, gpu_visible=False), "--gpus all"),
        (GPU, [], replace(GOOD, driver=(535, 104)), "driver is 535.104, and CUDA 13.0.1.*wants 580.65"),
        (GPU, [], replace(GOOD, gpus=(Gpu("Tesla V100", (7, 0), 16 * GIB),)), "capability 7.0.*needs 7.5"),
        (GPU, [], replace(GOOD, gpus=(replace(L4, memory=6 * GIB),)), "weights take 8.0 GiB on each GPU"),
        (
            GPU,
            [],
            replace(GOOD, gpus=(replace(L4, free=6 * GIB),)),
            "the NVIDIA L4 has 23.0 GiB, 6.0 GiB of it free",
        ),
        (
            GPU,
            ["--gpu-memory-utilization=.3"],
            GOOD,
            "weights take 8.0 GiB.*--gpu-memory-utilization allows 6.9 GiB",
        ),
        (
            GPU,
            ["--gpu-memory-utilization", "0.9"],
            replace(GOOD, gpus=(replace(L4, free=20 * GIB),)),
            "--gpu-memory-utilization 0.9 asks for 20.7 GiB of the NVIDIA L4, and 20.0 GiB of it is free",
        ),
        (GPU, ["-tp", "2"], replace(GOOD, gpus=(L4,)), "needs 2 GPUs, and 1 is visible.*--gpus all"),
        (GPU, ["-tp", "4"], replace(GOOD, gpus=None, gpu_count=2), "needs 4 GPUs, and 2 are visible"),
        (GPU, ["-tp", "4"], replace(GOOD, config={"num_attention_heads": 14}), "--tensor-parallel-size 2"),
        (GPU, ["-tp", "3"], GOOD, "4 key-value heads.*--tensor-parallel-size 2"),
        (GPU, ["-pp", "4"], replace(GOOD, config={**CONFIG, "num_hidden_layers": 3}), "3 layers"),
        (GPU, ["-tp", "2"], replace(GOOD, shm_free=64 << 20), "64 MiB free.*--shm-size 1g"),
        (CPU, [], replace(GOOD, memory=2 * GIB), "may use 2.0 GiB.*--memory 5g"),
        (CPU, ["--distributed-executor-backend", "mp"], replace(GOOD, shm_free=64 << 20), "--shm-size 1g"),
        (CPU, [], replace(GOOD, read_only=("/tmp",)), "--tmpfs /tmp"),
        (CPU, [], replace(GOOD, config=None), "mounted over it"),
    ],
)
def test_bad_machine_is_told_with_the_way_out(
    manifest: Manifest, argv: list[str], facts: Facts, words: str
) -> None:
    environ = ENVIRON if manifest is CPU else {"CUDA_VERSION": "13.0.1"}
    with pytest.raises(PreflightError, match=words):
        check(load(argv, {}, manifest), facts, environ)


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        (None, "abc"),
        ("0", "a"),
        ("2,0", "ca"),
        ("1,7,0", "b"),
        ("-1", ""),
        ("", ""),
        ("GPU-3f,GPU-91", "ab"),
    ],
)
def test_gpus_that_the_environment_leaves(chosen: str | None, left: str) -> None:
    assert "".join(chosen_gpus("abc", chosen)) == left


def test_hidden_gpus_are_told() -> None:
    none = replace(GOOD, gpus=(), gpu_count=0)
    with pytest.raises(PreflightError, match="CUDA_VISIBLE_DEVICES is '', which hides every GPU"):
        check(load([], {}, GPU), none, {"CUDA_VISIBLE_DEVICES": ""})


def test_multiprocess_executor_of_the_cpu_needs_shared_memory() -> None:
    with pytest.raises(PreflightError, match="--shm-size"):
        check(load([], {}, CPU), replace(GOOD, shm_free=64 << 20), {})


def test_what_cannot_be_told_refuses_nothing() -> None:
    unknown = Facts(True, 0, None, None, None, None, (), {})
    check(load(["-tp", "2"], {}, GPU), unknown, {"CUDA_VERSION": "13.0.1"})
    check(load([], {}, CPU), unknown, ENVIRON)


def test_latent_attention_has_no_key_value_heads_to_spread() -> None:
    config = {"num_attention_heads": 12, "num_key_value_heads": 4, "kv_lora_rank": 512}
    check(load(["-tp", "3"], {}, GPU), replace(GOOD, config={"text_config": config}), {})


def test_memory_is_the_least_of_group_and_node() -> None:
    meminfo = "MemTotal: 9 kB\nMemAvailable:    1024 kB\n"
    assert memory_limit(meminfo, None, None) == 1 << 20
    assert memory_limit(meminfo, "4096\n", None) == 4096
    assert memory_limit(meminfo, "max\n", None) == 1 << 20
    assert memory_limit(meminfo, None, "9223372036854771712\n") == 1 << 20
    assert memory_limit(None, None, None) is None


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("1024", {}, 1024),
        ("2G", {}, 2 * GIB),
        ("1.5g", {}, 1_500_000_000),
        ("auto", {}, 0),
        ("1", {"VLLM_CPU_KVCACHE_SPACE": "4"}, 4 * GIB),
    ],
)
def test_cache_that_is_asked_for(text: str, environ: dict[str, str], expected: int) -> None:
    manifest = replace(CPU, engine_args=())
    assert cache_bytes(load(["--kv-cache-memory-bytes", text], {}, manifest), environ) == expected


def test_what_nvidias_tools_print() -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    assert parse_driver(text) == (535, 104)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    assert parse_driver(text) == (580, 95)
    assert parse_driver(None) is None
    assert parse_gpus("NVIDIA L4, 8.9, 23034, 22565\n") == (
        Gpu("NVIDIA L4", (8, 9), 23034 << 20, 22565 << 20),
    )
    assert parse_gpus("NVIDIA GH200, 9.0, 97871, [N/A]\n") == (Gpu("NVIDIA GH200", (9, 0), 97871 << 20),)
    assert parse_gpus("NVIDIA L4, [N/A], 23034, 22565\n") is None
    assert parse_gpus("") is None


def test_driver_is_not_asked_for_where_the_image_brings_its_own() -> None:
    assert minimum_driver({"CUDA_VERSION": "12.9.1"}) == (525, 60)
    assert minimum_driver({"CUDA_VERSION": "13.0", "VLLM_ENABLE_CUDA_COMPATIBILITY": "1"}) is None
    assert minimum_driver({"CUDA_VERSION": "13.0", "LD_LIBRARY_PATH": "/usr/local/cuda/compat"}) is None
    assert minimum_driver({}) is None


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'NVIDIA L4, 8.9, 23034, 22565'", (Gpu("NVIDIA L4", (8, 9), 23034 << 20, 22565 << 20),)),
        ("echo 'NVIDIA L4, 8.9, 23034, 22565'; exit 9", None),
        ("echo NVIDIA-SMI has failed", None),
        ("exec sleep 30", None),
    ],
)
def test_gpus_and_digests_have_one_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, gpus: tuple[Gpu, ...] | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocabulary").write_bytes(bytes(8 << 20))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(preflight, "_GPU_NODES", (tmp_path,))
    monkeypatch.setattr(preflight, "_BUDGET_SECONDS", 0.5)
    files = (LockedFile("vocabulary", 8 << 20, "0" * 64),)
    manifest = replace(GPU, model_path=str(tmp_path), weights="mount", files=files)
    begun = time.monotonic()
    facts = gather(manifest, {})
    assert time.monotonic() - begun < 2
    assert facts.gpus == gpus
    assert "vocabulary" in facts.model_problem
    monkeypatch.setattr(preflight, "_BUDGET_SECONDS", 0.0)
    assert gather(manifest, {}).model_problem == ""


def test_home_need_not_be_writable(tmp_path: Path) -> None:
    facts = gather(CPU, {"HOME": "/none", "TMPDIR": str(tmp_path)})
    assert (facts.home, facts.read_only) == ("/none", ())
    check(load([], {}, CPU), replace(GOOD, home="/none"), ENVIRON)


_AVX2 = "processor\t: 0\nflags\t\t: fpu sse2 avx avx2 fma\nbugs\t\t: avx512f\n"


@pytest.mark.parametrize(
    ("cpuinfo", "lacks"),
    [
        (_AVX2, True),
        (_AVX2.replace("avx2", "avx2 avx512f avx512bw"), False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),  # ARM
        (None, False),
    ],
)
def test_avx512_is_looked_for_on_x86(cpuinfo: str | None, lacks: bool) -> None:
    assert preflight.lacks_avx512(cpuinfo) == lacks


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        ({"quant_method": "awq", "bits": 4}, True),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, True),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, False),
        (None, False),
    ],
)
def test_weights_without_a_kernel_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any, told: bool
) -> None:
    monkeypatch.setattr(preflight, "lacks_avx512", lambda _: True)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    environ = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    facts = gather(replace(CPU, model_path=str(tmp_path)), environ)
    settings = load([], {}, CPU)
    assert [line.split(",")[0] for line in preflight.shortcomings(settings, facts)] == [
        "this CPU lacks AVX-512"
    ] * told
    assert not gather(replace(GPU, model_path=str(tmp_path)), environ).unpacks


# Of eight layers, twice eight heads of 64, 1,000 positions: 32 MiB of bf16, 63 of float32.
WIDE = {**CONFIG, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 1000}


@pytest.mark.parametrize(
    ("argv", "changes", "room"),
    [
        ([], {}, True),
        ([], {"memory": 5 * GIB}, False),  # 2 of weights, 2 of cache, 1.5 of processes
        ([], {"memory": None}, None),
        ([], {"config": None}, None),
        ([], {"config": {**WIDE, "num_hidden_layers": "eight"}}, None),
        ([], {"config": {"text_config": WIDE}}, True),
        (["--kv-cache-memory-bytes", "60000000"], {}, True),
        (["--kv-cache-memory-bytes", "30000000"], {}, False),
        (["--kv-cache-memory-bytes", "30000000", "--max-model-len", "400"], {}, True),
        (["--max-model-len", "100000"], {}, False),
    ],
)
def test_room_for_float32(argv: list[str], changes: dict[str, Any], room: bool | None) -> None:
    facts = replace(GOOD, **{"config": WIDE, "memory": 6 * GIB, **changes})
    assert preflight.room_for_float32(load(argv, {}, CPU), facts, {}) is room


def test_unpacked_weights_take_eight_times_the_room_in_float32() -> None:
    packed = {**WIDE, "quantization_config": {"quant_method": "awq", "bits": 4}}
    facts = replace(GOOD, config=packed, memory=11 * GIB, lacks_avx512=True)
    assert preflight.room_for_float32(load([], {}, CPU), facts, {}) is False
    assert preflight.room_for_float32(load([], {}, CPU), replace(facts, memory=12 * GIB), {})
    assert preflight.room_for_float32(load([], {}, CPU), replace(facts, lacks_avx512=False), {})


def test_facts_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    manifest = replace(CPU, model_path=str(tmp_path))
    missing = str(tmp_path / "not-there")
    facts = gather(manifest, {"HOME": str(tmp_path), "TMPDIR": missing})
    assert facts.config == {"num_attention_heads": 2}
    assert (facts.read_only, facts.home) == ((missing,), "")
    assert facts.memory is not None
    assert facts.gpus is None
    assert gather(replace(manifest, model_path=missing), {}).config is None
