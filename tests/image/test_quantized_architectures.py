"""Each architecture, quantized, must say in vLLM what the library says that quantized it.

Random weights answer anything, so that an answer alone would show nothing: log-probabilities are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
from safetensors import safe_open

from builder.build import cache_folder
from builder.docker_engine import Container, DockerEngine
from builder.models import parse_ref, resolve
from builder.quantize import Quantized, ensure_environment, job_environment, quantize
from builder.recipe import choose_recipe
from builder.report import SilentReporter
from tests.image.conftest import coldstart, wait_ready
from tests.image.tiny_models import TEXT

HERE = Path(__file__).parent
SERVED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


def _run(*arguments: str | Path, home: Path) -> None:
    """tiny_models.py on the quantizer's Python."""
    python = ensure_environment(cache_folder().absolute(), SilentReporter())
    subprocess.run(
        [python, "-I", HERE / "tiny_models.py", *arguments],
        env=job_environment(os.environ, home),
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of random weights, a folder each."""
    folder = tmp_path_factory.mktemp("models")
    folder.chmod(0o755)
    _run("make", folder, home=folder)
    return folder


def _quantized(folder: Path, cache: Path, method: str = "awq", device: str = "cpu") -> Quantized:
    """As a build does it; the quantizer's environment is the shared one, the results are this test's own."""
    (cache / "quantizer").parent.mkdir(parents=True, exist_ok=True)
    if not (cache / "quantizer").exists():
        ensure_environment(cache_folder().absolute(), SilentReporter())
        (cache / "quantizer").symlink_to(cache_folder().absolute() / "quantizer")
    snapshot = resolve(parse_ref(str(folder)), SilentReporter())
    recipe = choose_recipe(snapshot.config, method=method, device=device, samples=8, tokens=64)
    return quantize(snapshot, recipe, cache=cache, reporter=SilentReporter())


def _in_vllm(base: str, folders: dict[str, Path]) -> Any:
    """Log-probabilities from one container without network, which loads the models in turn."""
    volumes = {str(path): {"bind": f"/models/{name}", "mode": "ro"} for name, path in folders.items()}
    volumes[str(HERE)] = {"bind": "/scripts", "mode": "ro"}
    output = docker.from_env(timeout=600).containers.run(
        base,
        entrypoint=["python3", "/scripts/vllm_logprobs.py"],
        command=[json.dumps(TEXT), *(f"/models/{name}" for name in folders)],
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
        volumes=volumes,
        network_mode="none",
        remove=True,
    )
    (line,) = [line for line in output.decode().splitlines() if line.startswith("RESULT ")]
    return {Path(name).name: scored for name, scored in json.loads(line.removeprefix("RESULT ")).items()}


def _distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def test_vllm_serves_each_architecture_as_it_was_quantized(models: Path, base: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    done = {name: _quantized(models / name, tmp_path / "cache") for name in SERVED}
    done["gptq"] = _quantized(models / "llama", tmp_path / "cache", "gptq")
    # No build would put FP8 on a CPU, but vLLM's fallback there shows that its output is read right.
    done["fp8"] = _quantized(models / "llama", tmp_path / "cache", "fp8", "cuda")
    folders = {name: quantized.folder for name, quantized in done.items()}
    originals = {name: models / (name if name in SERVED else "llama") for name in folders}
    _run("logprobs", tmp_path / "scores.json", *folders.values(), *originals.values(), home=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    in_vllm = _in_vllm(base, folders)
    for name, folder in folders.items():
        reference, original = scores[str(folder)], scores[str(originals[name])]
        lost = _distance(reference["following"], original["following"])
        apart = _distance(in_vllm[name]["following"], reference["following"])
        if name == "fp8":  # vLLM rounds the activations too, which the reference does not
            assert apart < lost
            continue
        # bf16 in another order of sums; a lost zero point or scale would be a hundred times this
        assert apart < min(0.05, lost / 4), name
        same = sum(a == b for a, b in zip(in_vllm[name]["top"], reference["top"], strict=True))
        assert same >= 0.9 * (len(TEXT) - 1), name
        assert done[name].measurements.quality.mean_kl < 0.5, name


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
    flags = ("--base", base, "--quantize", "awq", "--max-perplexity-increase")
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


def test_quality_is_in_the_label(awq: Any, engine: DockerEngine) -> None:
    labels = engine.require_image(awq["tag"]).labels
    quality = awq["manifest"]["quantization"]["quality"]
    assert labels["dev.coldstart.quantization.perplexity-increase"] == f"{quality['perplexity_increase']:.4f}"
    assert "groups of 64" in labels["dev.coldstart.quantization.recipe"]
