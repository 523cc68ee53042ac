"""Each architecture, quantized, must say in vLLM what the library says that quantized it.

Random weights answer anything, so that an answer alone would show nothing: log-probabilities are compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import numpy as np
import pytest
from safetensors import deserialize, safe_open

from builder import calibration
from builder.architectures import VISION_LANGUAGE
from builder.docker_engine import Container, DockerEngine
from builder.errors import BuildError
from builder.methods import METHODS
from builder.models import parse_ref, resolve, snapshot_of_folder
from builder.quantize import Quantized, quantize
from builder.recipe import choose_recipe
from builder.report import SilentReporter
from builder.reshard import reshard
from builder.shards import tensors_of, write_shards
from tests.image import foreign_packing
from tests.image.conftest import (
    QUANTIZE,
    coldstart,
    in_base,
    result_of,
    share_quantizer,
    tiny_models,
    wait_ready,
)
from tests.image.tiny_models import TEXT

HERE = Path(__file__).parent
SEEING = ("gemma3_vl", "llava", "qwen2_5_vl")
SERVED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
SHARD_BYTES = 100_000  # of the tiny llama's 350 kB, quantized


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of random weights, a folder each."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o755)
    tiny_models("make", folder, home=folder)
    return folder


def _quantized(
    folder: Path, cache: Path, method: str = "awq", device: str = "cpu", *, symmetric: bool = False
) -> Quantized:
    """As a build does it; the quantizer's environment is the shared one, the results are this test's own.

    symmetric: without zero points, although the device's kernels take them.
    """
    snapshot = resolve(parse_ref(str(folder)), SilentReporter())
    recipe = choose_recipe(snapshot.config, method=method, device=device, samples=8, tokens=64)
    recipe = replace(recipe, symmetric=recipe.symmetric or symmetric)
    return quantize(snapshot, recipe, cache=share_quantizer(cache), reporter=SilentReporter())


def _in_vllm(base: str, folders: dict[str, Path], packages: Path | None = None) -> Any:
    """Log-probabilities from one container without network, which loads the models in turn.

    packages: a folder of Python packages that the base lacks.
    """
    volumes = {str(path): {"bind": f"/models/{name}", "mode": "ro"} for name, path in folders.items()}
    volumes[str(HERE)] = {"bind": "/scripts", "mode": "ro"}
    volumes[str(HERE.parent.parent / "runtime")] = {"bind": "/coldstart/runtime", "mode": "ro"}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    if packages:
        volumes[str(packages)] = {"bind": "/packages", "mode": "ro"}
        environment["PYTHONPATH"] = "/packages"
    output = docker.from_env(timeout=600).containers.run(
        base,
        entrypoint=["python3", "/scripts/vllm_logprobs.py"],
        command=[json.dumps(TEXT), *(f"/models/{name}" for name in folders)],
        environment=environment,
        volumes=volumes,
        network_mode="none",
        remove=True,
    )
    return {Path(name).name: scored for name, scored in result_of(output).items()}


def test_weights_are_reordered_as_vllm_does_it(base: str) -> None:
    result = in_base(base, "repack.py")
    assert result["left"] == "quick"
    assert result["other_stays"]
    assert len(result["same"]) == 6
    assert all(result["same"].values()), result
    assert result["unpacked"] == [True, True]  # for a CPU without the kernel


def _distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _split_by_the_quantizer(folder: Path, cache: Path) -> Quantized:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builder.quantize.SHARD_BYTES", SHARD_BYTES)
        return _quantized(folder, cache)


def _split_afterwards(done: Quantized, folder: Path, cache: Path) -> Quantized:
    """As a build does it with --max-shard-size."""
    original = resolve(parse_ref(str(folder)), SilentReporter())
    quantized = snapshot_of_folder(done.folder, original.lock, SilentReporter())
    return replace(done, folder=reshard(quantized, SHARD_BYTES, cache=cache, reporter=SilentReporter()).root)


def _require_split(folder: Path) -> None:
    shards = [path.name for path in folder.glob("*.safetensors")]
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(_tensors(folder))
    assert set(index["weight_map"].values()) == set(shards)


def test_vllm_serves_each_architecture_as_it_was_quantized(models: Path, base: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    done = {name: _quantized(models / name, tmp_path / "cache") for name in SERVED}
    for method in ("gptq", "awq-gptq"):
        done[method] = _quantized(models / "llama", tmp_path / "cache", method)
    # No build would put FP8 on a CPU, but vLLM's fallback there shows that its output is read right.
    done["fp8"] = _quantized(models / "llama", tmp_path / "cache", "fp8", "cuda")
    done["split"] = _split_by_the_quantizer(models / "llama", tmp_path / "cache")
    done["resharded"] = _split_afterwards(done["llama"], models / "llama", tmp_path / "cache")
    folders = {name: quantized.folder for name, quantized in done.items()}
    folders["symmetric"] = _quantized(models / "llama", tmp_path / "cache", symmetric=True).folder
    _require_split(folders["split"])
    assert set(_tensors(folders["split"])) == set(_tensors(folders["llama"]))
    _require_split(folders["resharded"])
    assert _tensors(folders["resharded"]) == _tensors(folders["llama"])
    originals = {name: models / (name if name in SERVED else "llama") for name in folders}
    tiny_models("logprobs", tmp_path / "scores.json", *folders.values(), *originals.values(), home=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    foreign = {
        "autoawq": foreign_packing.write_awq(folders["llama"], tmp_path / "autoawq"),
        "autogptq": foreign_packing.write_gptq(folders["symmetric"], tmp_path / "autogptq"),
    }
    in_vllm = _in_vllm(base, folders | foreign)
    for name, origin in (("autoawq", "llama"), ("autogptq", "symmetric")):
        apart = _distance(in_vllm[name]["following"], in_vllm[origin]["following"])
        print(f"{name}: {apart:.6f} apart from {origin}")
        assert apart < 0.001, name  # the same integers and scales, summed by the same kernel
    for name, folder in folders.items():
        reference, original = scores[str(folder)], scores[str(originals[name])]
        lost = _distance(reference["following"], original["following"])
        apart = _distance(in_vllm[name]["following"], reference["following"])
        print(f"{name}: lost {lost:.4f}, apart {apart:.4f}")
        if name == "fp8":  # vLLM rounds the activations too, which the reference does not
            assert apart < lost
            continue
        # bf16 in another order of sums; a lost zero point or scale would be a hundred times this
        assert apart < min(0.05, lost / 4), name
        same = sum(a == b for a, b in zip(in_vllm[name]["top"], reference["top"], strict=True))
        assert same >= 0.9 * (len(TEXT) - 1), name
        if name in done:  # no build leaves out zero points for a CPU, so that no loss is promised
            assert done[name].measurements.quality.mean_kl < 0.5, name


def test_what_others_quantized_is_named_and_baked_byte_for_byte_and_not_quantized_again(
    models: Path, base: str, tmp_path: Path
) -> None:
    ours = _quantized(models / "llama", tmp_path / "cache", "rtn", symmetric=True)
    folders = {
        "compressed-tensors": ours.folder,
        "awq": foreign_packing.write_awq(ours.folder, tmp_path / "awq" / "llama"),
        "gptq": foreign_packing.write_gptq(ours.folder, tmp_path / "gptq" / "llama"),
    }
    for method, folder in folders.items():
        lock = resolve(parse_ref(str(folder)), SilentReporter()).lock
        assert lock.quantization == f"{method} int4 g{ours.recipe.group_size}"
        refused = coldstart("build", str(folder), "--base", base, "--quantize", "awq")
        assert refused.code == 3, method
        assert f"quantized already (quant_method {method})" in refused.err
        out = tmp_path / method / "out"
        rendered = coldstart("render", str(folder), "--base", base, "-o", str(out))
        assert rendered.code == 0, rendered.err
        baked = (out / "weights" / "layers").glob("*/*")
        # By the digests of before: what is rendered may be links to the model's files.
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in baked}
        assert digests == {file.path: file.sha256 for file in lock.files}
        assert any(file.is_shard for file in lock.files)
        (manifest,) = out.rglob("manifest.json")
        said = json.loads(manifest.read_bytes())
        assert said["model"]["quantization"] == lock.quantization
        assert said["quantization"] is None  # nothing was quantized here


def _float8(data: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The values of F8_E4M3: sign, four bits of exponent with a bias of 7, three of mantissa."""
    bits = np.frombuffer(data, np.uint8).astype(int)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    return np.where(bits & 128, -size, size)


def _bfloat16(data: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def test_fp8_weights_are_the_models_rounded(models: Path, tmp_path: Path) -> None:
    """To half a step of what eight bits hold, per row; the quotient is first rounded to bf16."""
    done = _quantized(models / "llama", tmp_path / "cache", "fp8", "cuda")
    before, after = _tensors(models / "llama"), _tensors(done.folder)
    quantized = [name for name, (dtype, _) in after.items() if dtype == "F8_E4M3"]
    assert len(quantized) == 2 * 7
    for name in quantized:
        dtype, scales = after[f"{name}_scale"]
        assert dtype == "BF16"
        scale = _bfloat16(scales)[:, None]
        wanted = _bfloat16(before[name][1]).reshape(len(scale), -1) / scale
        given = _float8(after[name][1]).reshape(wanted.shape)
        half_step = np.maximum(np.abs(wanted) / 16, 2.0**-10)
        assert np.all(np.abs(given - wanted) <= half_step + np.abs(wanted) * 2.0**-8), name
        assert np.all(np.abs(given).max(axis=1) >= 448 * 15 / 16), name


def test_model_that_lacks_a_projection_is_not_quantized(models: Path, tmp_path: Path) -> None:
    """The library would make one up."""
    folder = tmp_path / "lacking"
    folder.mkdir()
    for path in (models / "llama").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    lost = "model.layers.1.mlp.down_proj.weight"
    kept = [tensor for tensor in tensors_of(models / "llama" / "model.safetensors") if tensor.name != lost]
    write_shards(folder, kept, 1 << 30, SilentReporter())
    with pytest.raises(BuildError) as failed:
        _quantized(folder, tmp_path / "cache")
    assert f"The model's files lack {lost}." in failed.value.log


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A file with enough of them to calibrate on some and measure on others."""
    said = [
        [
            {"role": "user", "content": f"How much is {i} times {i + 1}?"},
            {"role": "assistant", "content": f"{i} times {i + 1} is {i * (i + 1)}."},
        ]
        for i in range(40)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in said))
    return path


def test_a_killed_build_takes_its_quantizer_along_and_the_next_one_starts_afresh(
    models: Path, base: str, chats: Path, tmp_path: Path
) -> None:
    cache = share_quantizer(tmp_path / "cache")
    program = str(Path(sys.executable).parent / "coldstart")
    command = [program, "render", str(models / "llama"), "--base", base]
    flags = ["--quantize", "awq", "--calibration-samples", "8", "--calibration-tokens", "64"]
    flags += ["--calibration", str(chats)]
    environ = {**os.environ, "COLDSTART_CACHE": str(cache)}
    build = subprocess.Popen(
        [*command, *flags, "-o", str(tmp_path / "one")],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    job = _job_at_work(cache)
    build.kill()
    build.communicate()
    deadline = time.monotonic() + 30
    while job.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not job.exists()
    assert not list((cache / "quantized").glob("[!.]*/"))  # nothing that passes for a result
    again = subprocess.run(
        [*command, *flags, "-o", str(tmp_path / "two")],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "Quantizing to AWQ" in again.stderr
    assert not list((cache / "quantized").glob("*.partial"))
    (manifest,) = (tmp_path / "two").rglob("manifest.json")
    said = json.loads(manifest.read_bytes())["quantization"]
    assert said["calibration"] == f"sha256:{calibration.read(chats).digest}"
    assert (said["calibration_samples"], said["quality"]["measured_on"]) == (8, "file")


def _job_at_work(cache: Path) -> Path:
    """The folder in /proc of the quantizer's process, once torch has started its threads."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                program = (folder / "cmdline").read_bytes().decode(errors="replace")
                threads = len(list((folder / "task").iterdir()))
                if "quantize_job.py" in program and str(cache) in program and threads > 1:
                    return folder
        time.sleep(0.05)
    raise AssertionError("the quantizer did not start")


@pytest.fixture(scope="module")
def torchvision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision without its compiled operators: they do not fit a torch for CPUs, and text needs none."""
    folder = tmp_path_factory.mktemp("torchvision")
    folder.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", folder / "packages", "torchvision==0.28.*"], check=True)
    (folder / "packages" / "torchvision" / "_meta_registrations.py").write_text("")
    return folder / "packages"


def _tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor, over all shards."""
    return {
        name: (tensor["dtype"], bytes(tensor["data"]))
        for path in folder.glob("*.safetensors")
        for name, tensor in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    }


@pytest.mark.parametrize("method", METHODS)
def test_vision_part_is_the_models_own_and_the_text_part_is_quantized(
    models: Path, tmp_path: Path, method: str
) -> None:
    name = "gemma3_vl"
    done = _quantized(models / name, tmp_path / "cache", method, "cuda")
    before, after = _tensors(models / name), _tensors(done.folder)
    vision = {tensor for tensor in before if not tensor.startswith("language_model")}
    assert any("vision_tower" in tensor for tensor in vision)
    assert any("multi_modal_projector" in tensor for tensor in vision)
    assert {tensor: after[tensor] for tensor in vision} == {tensor: before[tensor] for tensor in vision}
    assert {dtype for dtype, _ in (before[tensor] for tensor in vision)} == {"BF16"}
    assert not [tensor for tensor in after if tensor not in before and "language_model" not in tensor]
    packed = "weight" if method == "fp8" else "weight_packed"
    for layer in range(2):
        for projection in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            dtype, _ = after[f"language_model.model.layers.{layer}.{projection}.{packed}"]
            assert dtype == ("F8_E4M3" if method == "fp8" else "I32")
    index = json.loads((done.folder / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(after)
    ignored = json.loads((done.folder / "config.json").read_bytes())["quantization_config"]["ignore"]
    assert {"re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head$"} <= set(ignored)


def test_vllm_answers_text_as_each_vision_language_model_was_quantized(
    models: Path, base: str, torchvision: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    done = {name: _quantized(models / name, tmp_path / "cache", device="cuda") for name in SEEING}
    folders = {name: quantized.folder for name, quantized in done.items()}
    tiny_models("logprobs", tmp_path / "scores.json", *folders.values(), home=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    in_vllm = _in_vllm(base, folders, torchvision)
    for name, folder in folders.items():
        apart = _distance(in_vllm[name]["following"], scores[str(folder)]["following"])
        assert apart < 0.05, name
        assert done[name].measurements.quality.mean_kl < 0.5, name


def test_shapes_that_a_config_may_leave_out_are_the_librarys(tmp_path: Path) -> None:
    left_out = {name: shapes for model in VISION_LANGUAGE.values() for name, shapes in model.text.items()}
    said = json.loads(tiny_models("shapes", *left_out, home=tmp_path))
    for name, shapes in left_out.items():
        assert {key: said[name][key] for key in shapes} == shapes


def test_experts_are_packed_and_their_router_is_not(models: Path, tmp_path: Path) -> None:
    done = _quantized(models / "qwen3_moe", tmp_path / "cache", device="cuda")
    with safe_open(done.folder / "model.safetensors", framework="np") as weights:
        names = set(weights.keys())
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for expert in range(4):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                assert f"{prefix}.mlp.experts.{expert}.{projection}.weight_packed" in names
                assert f"{prefix}.mlp.experts.{expert}.{projection}.weight" not in names
        assert f"{prefix}.self_attn.q_proj.weight_packed" in names
        assert f"{prefix}.mlp.gate.weight" in names
    assert "lm_head.weight" in names
    ignored = json.loads((done.folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= set(ignored)
    assert done.measurements.quality.mean_kl < 0.5


def test_experts_are_served_as_they_are_and_not_quantized_for_a_cpu(
    models: Path, base: str, build: Callable[..., Any], start: Callable[..., Container]
) -> None:
    refused = coldstart("build", str(models / "qwen3_moe"), "--base", base, "--quantize", "awq")
    assert refused.code == 3
    assert "Qwen3MoeForCausalLM on CPUs" in refused.err
    built = build("tiny-moe:plain", folder=models / "qwen3_moe", engine_args=("--max-model-len", "128"))
    assert built["manifest"]["quantization"] is None
    container = start(built["tag"])
    wait_ready(container)
    request = urllib.request.Request(
        f"http://127.0.0.1:{container.host_port()}/v1/completions",
        json.dumps({"model": "qwen3_moe", "prompt": "abc", "max_tokens": 4, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4


def test_fp8_for_a_cpu_is_refused_before_the_model_is_read(models: Path, base: str) -> None:
    refused = coldstart("build", str(models / "llama"), "--base", base, "--quantize", "fp8")
    assert refused.code == 3
    assert "fp8 does not run on CPUs" in refused.err
    assert "Checking the model's files" not in refused.err


def test_loss_above_the_limit_is_refused_and_the_result_is_not_made_again(
    awq: Any, model: str, base: str, tmp_path: Path
) -> None:
    flags = ("--base", base, *QUANTIZE, "--max-perplexity-increase")
    refused = coldstart("render", model, *flags, "0.001%", "-o", str(tmp_path / "one"))
    assert refused.code == 3
    assert "more than --max-perplexity-increase 0.00%" in refused.err
    assert "--calibration-samples" in refused.err
    assert not (tmp_path / "one").exists()
    allowed = coldstart("render", model, *flags, "0.9", "-o", str(tmp_path / "two"))
    assert allowed.code == 0, allowed.err
    assert "are in the cache" in allowed.err
    (manifest,) = (tmp_path / "two").rglob("manifest.json")
    said = json.loads(manifest.read_text())["quantization"]
    assert said == awq["manifest"]["quantization"]
    quality = said["quality"]
    assert 0 < quality["perplexity_increase"] < 0.9
    assert 0.5 < quality["top1_agreement"] < 1
    assert f"({quality['perplexity_increase']:+.2%})" in allowed.err
    assert f"({quality['perplexity_increase']:+.2%})" in refused.err


def test_quantized_weights_are_in_shards_of_the_users_size(
    awq: Any, model: str, base: str, tmp_path: Path
) -> None:
    flags = ("--base", base, *QUANTIZE, "--max-shard-size", "20MiB", "-o", str(tmp_path / "one"))
    done = coldstart("render", model, *flags)
    assert done.code == 0, done.err
    assert "are in the cache" in done.err  # whatever the size is, it is quantized once
    (index,) = (tmp_path / "one").rglob("model.safetensors.index.json")
    shards = {path.name for path in (tmp_path / "one").rglob("*.safetensors")}  # in folders by layer
    assert len(shards) > 2
    assert set(json.loads(index.read_bytes())["weight_map"].values()) == shards
    (manifest,) = (tmp_path / "one").rglob("manifest.json")
    assert json.loads(manifest.read_text())["quantization"] == awq["manifest"]["quantization"]


def test_quality_is_in_the_label(awq: Any, engine: DockerEngine) -> None:
    labels = engine.require_image(awq["tag"]).labels
    quality = awq["manifest"]["quantization"]["quality"]
    assert labels["dev.coldstart.quantization.perplexity-increase"] == f"{quality['perplexity_increase']:.4f}"
    assert labels["dev.coldstart.quantization.same-next-token"] == f"{quality['top1_agreement']:.4f}"
    assert "groups of 64" in labels["dev.coldstart.quantization.recipe"]
