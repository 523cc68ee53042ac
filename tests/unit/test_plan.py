from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.models import LockedFile, ModelLock
from builder.plan import MAX_WEIGHT_LAYERS, BaseImage, BuildPlan, make_plan, pack_layers
from builder.spec import ImageSpec


def lock(name: str = "org/Tiny-1B", files: tuple[LockedFile, ...] | None = None) -> ModelLock:
    default = (
        LockedFile(path="config.json", size=10, sha256="0" * 64),
        LockedFile(path="model-00001-of-00002.safetensors", size=3 << 20, sha256="1" * 64),
        LockedFile(path="model-00002-of-00002.safetensors", size=2 << 20, sha256="2" * 64),
    )
    return ModelLock(
        name=name,
        source=f"hf://{name}",
        revision="a" * 40,
        license="apache-2.0",
        architectures=("LlamaForCausalLM",),
        dtype="bfloat16",
        parameters=1_000_000,
        quantization=None,
        files=files or default,
    )


def plan(device: Any = "cpu", base_id: str | None = "sha256:b", **spec: Any) -> BuildPlan:
    base = BaseImage("base:1", base_id, device, "0.32.0")
    return make_plan(ImageSpec(model="org/Tiny-1B", **spec), lock(), base)


def test_weights_tag_depends_on_base_and_lock_only() -> None:
    same = plan()
    assert plan(engine_args=("--max-model-len", "8")).weights.tag == same.weights.tag
    assert plan(served_model_name="x", tag="y").weights.tag == same.weights.tag
    assert plan(base_id="sha256:c").weights.tag != same.weights.tag


def test_cpu_and_gpu_differ_in_data_only() -> None:
    cpu, gpu = plan("cpu"), plan("cuda")
    assert cpu.engine_args[0] == "--kv-cache-memory-bytes"
    assert gpu.engine_args == ()
    assert set(dict(cpu.environment)) - set(dict(gpu.environment)) == {
        *("VLLM_ENABLE_V1_MULTIPROCESSING", "TORCH_COMPILE_DISABLE")
    }
    assert (cpu.weights.layers, cpu.model_path) == (gpu.weights.layers, gpu.model_path)


@pytest.mark.parametrize("weights", ["download", "mount"])
def test_without_baked_weights_the_image_is_from_the_base(weights: str) -> None:
    made, baked = plan(weights=weights), plan()
    assert (made.parent, baked.parent) == ("base:1", baked.weights.tag)
    assert (made.weights.layers, made.disk_bytes) == ((), 0)
    assert made.manifest["weights"] == weights
    assert made.manifest["model"] == baked.manifest["model"]  # digests of what is to be there
    # Leftovers of a build are told by this label; a baked image inherits it.
    assert (
        "=".join(("dev.coldstart.weights.key", dict(made.labels)["dev.coldstart.weights.key"])) == made.label
    )


@pytest.mark.parametrize(("weights", "offline"), [("bake", True), ("mount", True), ("download", False)])
def test_only_the_image_that_downloads_may_reach_the_hub(weights: str, offline: bool) -> None:
    environment = dict(plan(weights=weights).environment)
    assert ("HF_HUB_OFFLINE" in environment, "TRANSFORMERS_OFFLINE" in environment) == (offline, offline)


def test_user_arguments_come_after_the_defaults() -> None:
    defaults = plan().engine_args
    assert plan(engine_args=("--no-enforce-eager",)).engine_args == (*defaults, "--no-enforce-eager")


def test_manifest_carries_the_whole_lock() -> None:
    manifest = json.loads(plan().manifest_bytes)
    assert manifest["model"]["lock_digest"] == lock().digest
    assert [file["path"] for file in manifest["model"]["files"]] == [file.path for file in lock().files]
    assert manifest["model"]["served_name"] == "org/Tiny-1B"


def test_default_tag_is_one_that_docker_takes() -> None:
    base = BaseImage("base:1", None, "cpu")
    for name in ("org/_X_", "Qwen/Qwen2.5-0.5B", "...", "org/a--b"):
        tag = make_plan(ImageSpec(model="m"), lock(name), base).tag
        assert ImageSpec(model="m", tag=tag).tag == tag
    quantized = lock().model_copy(update={"quantization": "gptq int4 g128"})
    assert make_plan(ImageSpec(model="m"), quantized, base).tag == "coldstart/tiny-1b:latest"


def test_licence_of_several_lines_is_one_label() -> None:
    odd = lock().model_copy(update={"license": "mit\nand more"})
    made = make_plan(ImageSpec(model="m"), odd, BaseImage("base:1", None, "cpu"))
    assert dict(made.labels)["org.opencontainers.image.licenses"] == "mit and more"


_files = st.lists(
    st.tuples(st.booleans(), st.integers(0, 1 << 33)),
    min_size=1,
    max_size=200,
    unique_by=lambda item: item[1],
).map(
    lambda items: [
        LockedFile(
            path=f"{'m' if shard else 't'}{i:04d}.{'safetensors' if shard else 'json'}", size=size, sha256=""
        )
        for i, (shard, size) in enumerate(items)
    ]
)


@given(_files, st.integers(1 << 20, 1 << 32))
def test_every_file_is_in_exactly_one_layer(files: list[LockedFile], bound: int) -> None:
    layers = pack_layers(files, bound)
    assert sorted(f.path for layer in layers for f in layer) == sorted(f.path for f in files)
    assert 1 <= len(layers) <= MAX_WEIGHT_LAYERS
    assert all(layer for layer in layers)


@given(_files, st.integers(1 << 20, 1 << 32))
def test_layers_do_not_depend_on_the_order_of_the_lock(files: list[LockedFile], bound: int) -> None:
    assert pack_layers(files, bound) == pack_layers(files[::-1], bound)


def test_layer_bound_holds_where_a_file_allows() -> None:
    files = [
        LockedFile(path=f"m{i}.safetensors", size=size, sha256="") for i, size in enumerate([5, 5, 20, 1])
    ]
    assert [[f.size for f in layer] for layer in pack_layers(files, 10)] == [[5, 5], [20], [1]]


def test_remote_code_is_in_label_and_arguments() -> None:
    trusted = make_plan(
        ImageSpec(model="org/Tiny-1B", trust_remote_code=True),
        lock().model_copy(update={"remote_code": True}),
        BaseImage("base:1", "sha256:b", "cuda", "0.32.0"),
    )
    assert trusted.engine_args == ("--trust-remote-code",)
    assert dict(trusted.labels)["dev.coldstart.remote-code"] == "yes"
    assert dict(plan().labels)["dev.coldstart.remote-code"] == "no"
    assert trusted.manifest["model"]["remote_code"] is True
