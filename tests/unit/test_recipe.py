from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quantization import fitted_costs
from builder.architectures import DENSE
from builder.cli import main
from builder.errors import HostError, InputError, ModelError
from builder.kernels import KERNELS, rank_layers, tensor_parallel_size
from builder.methods import METHODS
from builder.methods.method import Method, Modifier
from builder.models import ModelLock, describe_quantization, parse_ref, resolve
from builder.quantization_cost import COSTS, Cost, available_memory, predict, require_memory
from builder.recipe import HELD_OUT_BLOCKS, Recipe, choose_recipe, require_device
from builder.report import SilentReporter
from builder.spec import CPU_BASE, load_spec
from tests.models import write_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_MOE: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
}
RECIPE = Recipe("awq", 128, False, ("lm_head",), 16, 256, 0)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("config", "group_size"),
    [
        ({}, 128),
        # SmolLM2-135M
        (
            {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "head_dim": 64,
            },
            64,
        ),
        # Qwen2.5-0.5B: no head_dim in its config.json
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
            },
            128,
        ),
        # only the input of o_proj, 5 heads of 32, is not a multiple of 64
        (
            {
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "head_dim": 32,
            },
            32,
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "hidden_size": 640, "intermediate_size": 2048}, 128),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_group_size_is_the_largest_that_divides_every_input(
    config: dict[str, Any], group_size: int, device: str
) -> None:
    assert choose_recipe(LLAMA | config, device=device) == dataclasses.replace(RECIPE, group_size=group_size)


@given(hidden=st.integers(1, 300), intermediate=st.integers(1, 300), heads=st.integers(1, 40))
def test_group_size_divides_or_the_model_is_refused(hidden: int, intermediate: int, heads: int) -> None:
    shapes = [hidden * 16, intermediate * 16, heads * 16]
    keys = {
        "hidden_size": shapes[0],
        "intermediate_size": shapes[1],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    fitting = [size for size in (128, 64, 32) if all(shape % size == 0 for shape in shapes)]
    if fitting:
        assert choose_recipe(LLAMA | keys | {"head_dim": 16}).group_size == max(fitting)
    else:
        with pytest.raises(ModelError, match="cannot quantize"):
            choose_recipe(LLAMA | keys | {"head_dim": 16})


# Qwen2.5-0.5B's 4864 intermediate features: 128 x 38, 64 x 19 on each of 4 ranks, 32 x 19 on each of 8.
@pytest.mark.parametrize(("ranks", "group_size"), [(1, 128), (2, 128), (4, 64), (8, 32)])
def test_groups_do_not_straddle_tensor_parallel_ranks(ranks: int, group_size: int) -> None:
    recipe = choose_recipe(LLAMA | {"intermediate_size": 4864}, ranks=ranks)
    assert recipe.group_size == group_size


@given(
    ranks=st.sampled_from([1, 2, 4, 8]),
    heads=st.integers(1, 8),
    width=st.integers(1, 200),
    key_heads=st.integers(1, 4),
)
def test_every_rank_has_whole_groups(ranks: int, heads: int, width: int, key_heads: int) -> None:
    config = LLAMA | {
        "hidden_size": 512,
        "num_attention_heads": heads * 8,
        "num_key_value_heads": key_heads,
        "head_dim": 32,
        "intermediate_size": width * 32,
    }
    try:
        recipe = choose_recipe(config, ranks=ranks)
    except ModelError:
        return
    assert recipe.group_size is not None
    assert width * 32 % (ranks * recipe.group_size) == 0
    assert heads * 8 * 32 % (ranks * recipe.group_size) == 0


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (
            {"hidden_size": 104, "num_attention_heads": 8, "head_dim": 32},
            {},
            "No group size of 128, 64, 32 divides all input features .q/k/v_proj 104",
        ),
        ({}, {"ranks": 3}, "cannot be split over 3 tensor-parallel ranks It has 8 key-value heads"),
        ({"intermediate_size": 14337}, {"ranks": 2}, "2 tensor-parallel ranks It has 14337 intermediate"),
        # 4 heads of 8 make 32 features for the queries, one of 8 for the keys: 48 is no multiple of 32
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
            {"device": "cpu"},
            r"q/k/v_proj has 32 \+ 8 \+ 8 output features, not a multiple of 32",
        ),
    ],
)
def test_shapes_that_no_kernel_takes_are_refused(
    config: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        choose_recipe(LLAMA | config, **arguments)


def test_only_the_device_that_needs_them_has_kernel_minimums() -> None:
    narrow = LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    assert choose_recipe(narrow, device="cuda").group_size == 32


def test_groups_are_symmetric_where_a_kernel_has_no_zero_points(monkeypatch: pytest.MonkeyPatch) -> None:
    without = dataclasses.replace(KERNELS["cpu"]["int4"], zero_points=False)
    monkeypatch.setitem(KERNELS["cpu"], "int4", without)
    recipe = choose_recipe(LLAMA, device="cpu")
    assert recipe == dataclasses.replace(RECIPE, symmetric=True)
    assert "groups of 128, symmetric" in recipe.describe()
    group = recipe.modifiers()[-1]["arguments"]["config_groups"]["group_0"]
    assert group["weights"]["symmetric"] is True
    assert choose_recipe(LLAMA, device="cuda") == RECIPE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(quant_method gptq\)"),
        ({"architectures": ["MixtralForCausalLM"]}, "mixture-of-experts model MixtralForCausalLM"),
        ({"num_local_experts": 8, "architectures": ["OtherForCausalLM"]}, "mixture-of-experts"),
        (
            {"architectures": ["Qwen2VLForConditionalGeneration"]},
            "does not support Qwen2VL.*LlamaForCausalLM",
        ),
        (
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "text_config": {"model_type": "phi", "hidden_size": 4096},
            },
            "Llava.* with this text part .*not llama",
        ),
        ({"architectures": None}, "does not support"),
    ],
)
def test_models_that_quantization_would_spoil_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        choose_recipe(LLAMA | config)
    assert "Build without --quantize" in refused.value.fix


def test_config_without_shapes_is_refused_by_the_missing_key() -> None:
    with pytest.raises(ModelError, match="has no intermediate_size"):
        choose_recipe({key: value for key, value in LLAMA.items() if key != "intermediate_size"})


def test_experts_are_quantized_for_gpus_without_their_router_and_refused_on_cpus() -> None:
    recipe = choose_recipe(QWEN3_MOE, device="cuda")
    assert recipe.group_size == 128
    assert recipe.ignore[0] == "lm_head"
    assert any("gate$" in name for name in recipe.ignore)
    assert choose_recipe(QWEN3_MOE, device="cuda", ranks=4).group_size == 64
    with pytest.raises(ModelError, match="Qwen3MoeForCausalLM on CPUs .*AMX"):
        choose_recipe(QWEN3_MOE, device="cpu")
    with pytest.raises(ModelError, match="hidden size that 128 divides, not 2080"):
        choose_recipe(QWEN3_MOE | {"hidden_size": 2080, "head_dim": 64}, device="cuda")
    with pytest.raises(ModelError, match="gptq does not support the mixture-of-experts model"):
        choose_recipe(QWEN3_MOE, device="cuda", method="gptq")


@pytest.mark.parametrize(
    ("architecture", "config", "group_size", "vision"),
    [
        # google/gemma-3-4b-it says no more of its text part than this
        (
            "Gemma3ForConditionalGeneration",
            {"text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}},
            128,
            ("vision_tower", "multi_modal_projector"),
        ),
        # llava-hf/llava-1.5-7b-hf says nothing
        (
            "LlavaForConditionalGeneration",
            {"text_config": {"model_type": "llama"}},
            128,
            ("vision_tower", "multi_modal_projector"),
        ),
        # Qwen/Qwen2.5-VL-3B-Instruct: at the top; its vision part's 3420 features no group divides
        (
            "Qwen2_5_VLForConditionalGeneration",
            {
                "model_type": "qwen2_5_vl",
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "vision_config": {"hidden_size": 1280, "intermediate_size": 3420},
            },
            128,
            ("visual",),
        ),
        # as transformers 5 writes it; 960 = 64 x 15
        (
            "Qwen2_5_VLForConditionalGeneration",
            {
                "text_config": {
                    "model_type": "qwen2_5_vl_text",
                    "hidden_size": 960,
                    "intermediate_size": 2560,
                    "num_attention_heads": 15,
                    "num_key_value_heads": 5,
                },
            },
            64,
            ("visual",),
        ),
    ],
)
def test_vision_language_models_are_quantized_without_what_they_see_with(
    architecture: str, config: dict[str, Any], group_size: int, vision: tuple[str, ...]
) -> None:
    recipe = choose_recipe({"architectures": [architecture], **config}, device="cuda")
    assert recipe.group_size == group_size
    assert recipe.ignore == ("re:.*lm_head$", *(f"re:.*{part}.*" for part in vision))
    assert recipe.describe().endswith(f"; {', '.join(('lm_head', *vision))} left as is")


def test_vision_language_models_are_not_quantized_for_bases_that_cannot_serve_them() -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "llama"}}
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration on CPUs .*torchvision"):
        choose_recipe(config, device="cpu")


def test_quantized_text_part_is_recognised() -> None:
    text = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    assert describe_quantization(config) == "awq int4"
    with pytest.raises(ModelError, match="quantized already"):
        choose_recipe(config, device="cuda")


def test_fp8_is_for_gpus_and_needs_no_group_and_no_calibration() -> None:
    with pytest.raises(
        ModelError, match="--quantize fp8 does not run on CPUs .*Use awq or awq-gptq or gptq or rtn"
    ):
        require_device("fp8", "cpu")
    recipe = choose_recipe(LLAMA, method="fp8", device="cuda")
    assert (recipe.group_size, recipe.symmetric, recipe.calibration_samples) == (None, True, 0)
    (modifier,) = recipe.modifiers()
    group = modifier["arguments"]["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["dynamic"]) == ("channel", True)


def test_a_method_is_data_and_a_line_of_registration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = Method("Other", "int4", DENSE, True, Modifier("library:Other", {"strength": 3}))
    monkeypatch.setitem(METHODS, "other", other)
    spec = load_spec(None, {"model": "some/model", "quantize": "other"})
    assert spec.quantize == "other"
    (modifier,) = choose_recipe(LLAMA, method="other", device="cpu").modifiers()
    assert (modifier["name"], modifier["arguments"]["strength"]) == ("library:Other", 3)
    assert modifier["arguments"]["config_groups"]["group_0"]["weights"]["group_size"] == 128


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_modifiers_are_json_and_end_with_the_quantizer(method: str) -> None:
    modifiers = choose_recipe(LLAMA, method=method, device="cuda").modifiers()
    assert json.loads(json.dumps(modifiers)) == modifiers
    assert ["config_groups" in modifier["arguments"] for modifier in modifiers] == [
        *[False] * (len(modifiers) - 1),
        True,
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_somewhere(method: str) -> None:
    assert any(METHODS[method].format in formats for formats in KERNELS.values())


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((), 1),
        (("--max-model-len", "2048"), 1),
        (("--tensor-parallel-size", "4"), 4),
        (("--tensor-parallel-size=4",), 4),
        (("--tensor_parallel_size", "4"), 4),
        (("-tp", "2", "--dtype", "auto"), 2),
        (("-tp=2", "-tp", "8"), 8),
    ],
)
def test_tensor_parallel_size_is_read_from_the_engine_arguments(
    arguments: tuple[str, ...], size: int
) -> None:
    assert tensor_parallel_size(arguments) == size


def test_key_value_heads_are_repeated_where_there_are_fewer_than_ranks() -> None:
    queries_keys_values, *_ = rank_layers(LLAMA, 16)
    assert queries_keys_values.outputs == (256, 128, 128)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
            "awq int4 g128",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}, "gptq int4 g64"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 32}}},
            },
            "compressed-tensors int4 g32",
        ),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8bit"),
        # older releases named no method
        ({"w_bit": 4, "q_group_size": 128}, "awq int4 g128"),
        ({"load_in_4bit": True}, "bitsandbytes 4bit"),
        # Mistral's own form
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}, "fp8"),
    ],
)
@pytest.mark.parametrize("method", ["awq", "fp8"])
def test_quantized_models_are_recognised_and_not_quantized_again(
    quantization: dict[str, Any], said: str, method: str
) -> None:
    config = LLAMA | {"quantization_config": quantization}
    assert describe_quantization(config) == said
    with pytest.raises(ModelError, match="quantized already") as refused:
        choose_recipe(config, method=method)
    assert said.split()[0] in refused.value.what


def test_mistrals_own_format_says_it_in_params_json(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    assert resolve(parse_ref(str(folder)), SilentReporter()).lock.quantization is None
    (folder / "params.json").write_text(json.dumps({"quantization": {"qformat_weight": "fp8_e4m3"}}))
    snapshot = resolve(parse_ref(str(folder)), SilentReporter())
    assert snapshot.lock.quantization == "fp8"
    with pytest.raises(ModelError, match="quantized already"):
        choose_recipe(snapshot.config)


def test_older_compressed_tensors_name_is_recognised() -> None:
    config = LLAMA | {"compression_config": {"quant_method": "compressed-tensors"}}
    assert describe_quantization(config) == "compressed-tensors"
    with pytest.raises(ModelError, match="quantized already"):
        choose_recipe(config)


@pytest.mark.parametrize(("given", "meant"), [("5%", 0.05), ("0.5 %", 0.005), ("0.05", 0.05), (0.1, 0.1)])
def test_perplexity_limit_is_a_ratio_or_per_cent(given: object, meant: float) -> None:
    flags = {"model": "some/model", "quantize": "awq", "max_perplexity_increase": given}
    assert load_spec(None, flags).max_perplexity_increase == pytest.approx(meant)


@pytest.mark.parametrize("given", ["much", "x%", "-1", "nan", "inf%"])
def test_perplexity_limit_that_is_no_number_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="max_perplexity_increase"):
        load_spec(None, {"model": "m", "quantize": "awq", "max_perplexity_increase": given})


def test_perplexity_limit_without_quantization_is_refused() -> None:
    with pytest.raises(InputError, match="without quantization does nothing"):
        load_spec(None, {"model": "some/model", "max_perplexity_increase": 0.05})


def _lock(parameters: int | None) -> ModelLock:
    return ModelLock(
        name="m",
        source="folder",
        revision=None,
        license=None,
        architectures=(),
        dtype=None,
        parameters=parameters,
        quantization=None,
        files=(),
    )


def test_cost_grows_with_parameters_and_tokens() -> None:
    small, large = predict(10**9, RECIPE), predict(2 * 10**9, RECIPE)
    assert large.memory_bytes - small.memory_bytes == pytest.approx(COSTS["awq"].bytes_per_parameter * 10**9)
    longer = predict(10**9, dataclasses.replace(RECIPE, calibration_samples=16 + 16 + HELD_OUT_BLOCKS))
    assert longer.seconds - small.seconds == pytest.approx(small.seconds - COSTS["awq"].seconds, abs=2)


def test_a_method_that_was_not_measured_is_taken_for_the_dearest_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fp8 = dataclasses.replace(RECIPE, method="fp8")
    assert predict(10**9, fp8) == predict(10**9, dataclasses.replace(RECIPE, method="rtn"))
    monkeypatch.setitem(METHODS, "another", METHODS["gptq"])
    another = predict(10**9, dataclasses.replace(RECIPE, method="another"))
    calibrated = [name for name in COSTS if METHODS[name].calibrated]
    assert another.seconds == max(
        predict(10**9, dataclasses.replace(RECIPE, method=name)).seconds for name in calibrated
    )


def _run(model: str, parameters: int, memory: int, seconds: float) -> dict[str, Any]:
    return {
        "model": model,
        "method": "awq",
        "parameters": parameters,
        "peak_memory_bytes": memory,
        "seconds": seconds,
        "calibration_samples": 16,
        "calibration_tokens": 256,
    }


# 24 blocks of 256 tokens
@pytest.mark.parametrize(
    ("seconds", "cost"),
    [
        ((20.0, 40.0), Cost(1e9, 5.0, 10.0, 10 / 10**8 / 6144)),
        # a line that would start below zero is drawn from zero, and still meets the larger model
        ((10.0, 40.0), Cost(1e9, 5.0, 0.0, 40 / (3 * 10**8) / 6144)),
    ],
)
def test_cost_is_a_line_through_two_random_models(seconds: tuple[float, float], cost: Cost) -> None:
    small = _run("random-53M", 10**8, 1_500_000_000, seconds[0])
    large = _run("random-172M", 3 * 10**8, 2_500_000_000, seconds[1])
    other = _run("SmolLM2-135M", 10**8, 1, 1.0)
    fitted = fitted_costs([other, large, {**small, "method": "rtn"}, small])
    assert fitted.keys() == {"awq"}  # a point alone is no line
    assert dataclasses.astuple(fitted["awq"]) == pytest.approx(dataclasses.astuple(cost))


def test_costs_are_those_of_the_committed_runs() -> None:
    """Of all of them, the newest last: a method that was measured again counts as it was then."""
    runs: list[Mapping[str, Any]] = []
    for path in sorted(RESULTS.glob("quantization-*.json")):
        runs += json.loads(path.read_text())
    newest = {(run["model"], run["method"]): run for run in runs if run["setting"].keys() == {"method"}}
    fitted = fitted_costs(list(newest.values()))
    assert fitted.keys() == COSTS.keys()
    for method, cost in fitted.items():
        assert dataclasses.astuple(COSTS[method]) == pytest.approx(dataclasses.astuple(cost), rel=0.01), (
            method
        )


def test_model_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.quantization_cost.available_memory", lambda: 16 * 1024**3)
    require_memory(_lock(10**8), RECIPE)
    require_memory(_lock(None), RECIPE)
    with pytest.raises(HostError, match=r"quantizing m needs about .* GiB of memory .*16\.0 GiB are free"):
        require_memory(_lock(7 * 10**10), RECIPE)


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  2000 kB\nMemAvailable:    1000 kB\n"}
V2 = {"sys/fs/cgroup/memory.current": "500000", "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 200000\n"}


@pytest.mark.parametrize(
    ("files", "bytes_"),
    [
        ({}, None),
        (MEMINFO, 1_024_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/memory.max": "max"}, 1_024_000),
        (MEMINFO | V2 | {"sys/fs/cgroup/memory.max": "900000"}, 600_000),
        (
            MEMINFO
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "900000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100000\n",
            },
            500_000,
        ),
    ],
)
def test_available_memory_is_the_least_of_machine_and_container(
    tmp_path: Path, files: dict[str, str], bytes_: int | None
) -> None:
    assert available_memory(_machine(tmp_path, files)) == bytes_


def _plan(
    folder: Path, *flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """`coldstart plan` without a Docker Engine: exit code, stdout and stderr."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/no-engine.sock")
    monkeypatch.setenv("COLDSTART_CACHE", str(folder / "cache"))
    monkeypatch.setattr("sys.argv", ["coldstart", "plan", str(folder), *flags])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:  # the command's own would end the test run
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, " ".join(said.err.split())


def test_plan_shows_recipe_memory_and_time_and_refuses_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "tiny")
    arguments = ("--quantize", "awq", "--base", CPU_BASE)
    code, out, _ = _plan(folder, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "AWQ int4, groups of 128, asymmetric; lm_head left as is" in out
    assert "GiB of memory" in out
    _, out, _ = _plan(folder, *arguments, "--", "-tp", "4", monkeypatch=monkeypatch, capsys=capsys)
    assert "groups of 32" in out
    code, _, err = _plan(
        folder, "--quantize", "fp8", "--base", CPU_BASE, monkeypatch=monkeypatch, capsys=capsys
    )
    assert (code, "fp8 does not run on CPUs" in err) == (3, True)
    monkeypatch.setattr("builder.quantization_cost.available_memory", lambda: 1024**2)
    code, _, err = _plan(folder, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, "of memory" in err) == (4, True)
