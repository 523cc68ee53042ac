from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from builder import build
from builder.errors import ModelError
from builder.models import Choice, ModelSnapshot, describe_quantization, parse_ref, resolve
from builder.report import SilentReporter
from builder.spec import ImageSpec
from tests.models import write_model


def _resolve(folder: Path) -> ModelSnapshot:
    return resolve(parse_ref(str(folder)), SilentReporter())


def test_lock_of_a_folder_is_complete_and_repeatable(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", shards=3)
    first, second = _resolve(folder).lock, _resolve(folder).lock
    assert first.canonical() == second.canonical()
    assert (first.name, first.source, first.revision) == ("tiny", "folder", None)
    assert (first.license, first.dtype, first.architectures) == (
        "apache-2.0",
        "bfloat16",
        ("LlamaForCausalLM",),
    )
    assert [file.path for file in first.files] == sorted(file.path for file in first.files)


def test_only_what_serving_needs_is_taken(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for name in ("checkpoint-500", "last-checkpoint", "global_step7", "2_Dense", "adapter"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "adapter" / "model.safetensors").rename(folder / "adapter" / "adapter_model.safetensors")
    assert [file.path for file in _resolve(folder).lock.files] == [
        "2_Dense/model.safetensors",  # a layer of its own, of an embedding model
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_shards_that_the_index_does_not_name_stay_out(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", shards=2)
    whole = (folder / "model-00001-of-00002.safetensors").read_bytes()
    doubles = ("model.safetensors", "model-fp16.safetensors", "model-00001-of-00001.safetensors")
    (folder / "2_Dense").mkdir()
    for name in (*doubles, "2_Dense/model.safetensors"):
        (folder / name).write_bytes(whole)
    names = {file.path for file in _resolve(folder).lock.files}
    assert not names.intersection(doubles)
    assert {"model-00001-of-00002.safetensors", "2_Dense/model.safetensors"} <= names
    every = ("*.json", "model-0*", *doubles)
    asked = resolve(parse_ref(str(folder)), SilentReporter(), Choice(include=every)).lock
    assert set(doubles) <= {file.path for file in asked.files}


def test_shards_may_have_any_name_that_the_index_gives(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", shards=2)
    index = folder / "model.safetensors.index.json"
    for number in (1, 2):
        old, new = (f"{stem}-0000{number}-of-00002" for stem in ("model", "model.safetensors"))
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")
        index.write_text(index.read_text().replace(old, new))
    assert "model.safetensors-00002-of-00002.safetensors" in {f.path for f in _resolve(folder).lock.files}


def test_whole_weights_in_another_type_stay_out(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    for name in ("model-fp16.safetensors", "model_bf16.safetensors", "model-mtp.safetensors"):
        (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
    names = [file.path for file in _resolve(folder).lock.files if file.is_shard]
    assert names == ["model-mtp.safetensors", "model.safetensors"]


def test_index_that_names_nothing_here_is_told(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"t0": "model-00001-of-00009.safetensors"}}')
    with pytest.raises(ModelError, match="model-00001-of-00009.safetensors is missing"):
        _resolve(folder)


def test_other_formats_and_training_state_stay_out(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    before = _resolve(folder).lock
    (folder / "onnx").mkdir()
    for name in ("model.onnx", "onnx/model.onnx", "onnx/config.json", "model.onnx_data", "m-Q4_K_M.gguf"):
        (folder / name).write_bytes(b"{}")
    for name in ("trainer_state.json", "training_args.bin", "scheduler.json", "rng_state_0.json"):
        (folder / name).write_bytes(b"{}")
    assert _resolve(folder).lock == before


def test_include_and_exclude_narrow_the_choice(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", shards=2)
    (folder / "extra.json").write_text("{}")
    ref = parse_ref(str(folder))
    some = resolve(ref, SilentReporter(), Choice(exclude=("extra*",))).lock
    assert "extra.json" not in {file.path for file in some.files}
    fewer = resolve(ref, SilentReporter(), Choice(include=("model*", "config.json"))).lock
    assert {file.path for file in fewer.files} == {
        *("config.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors is missing"):
        resolve(ref, SilentReporter(), Choice(exclude=("model-00002*",)))


def test_code_of_the_repository_comes_only_when_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", config={"auto_map": {"AutoConfig": "mine.Config"}})
    (folder / "mine.py").write_text("")
    plain = _resolve(folder).lock
    trusted = resolve(parse_ref(str(folder)), SilentReporter(), Choice(remote_code=True)).lock
    assert {f.path for f in trusted.files} - {f.path for f in plain.files} == {"mine.py"}
    assert (plain.remote_code, trusted.remote_code) == (False, True)


def test_parameters_are_counted_where_weights_are_not_packed(tmp_path: Path) -> None:
    assert _resolve(write_model(tmp_path / "a", shards=3)).lock.parameters == 3 * 16
    packed = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert _resolve(write_model(tmp_path / "b", config=packed)).lock.parameters is None


def test_digest_changes_with_any_byte(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    before = _resolve(folder).lock.digest
    (folder / "tokenizer.json").write_text("{ }")
    assert _resolve(folder).lock.digest != before


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    folder = write_model(tmp_path / "tiny", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors is truncated or corrupt"):
        _resolve(folder)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors is missing"):
        _resolve(folder)


def test_tensor_that_the_index_promises_must_be_there(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", shards=2)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["t9"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="has no tensor 't9'"):
        _resolve(folder)


def test_pickles_alone_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"tiny has its weights as pickles only \(pytorch_model.bin\)"):
        _resolve(folder)


def test_patterns_that_leave_no_weights_are_told(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="--include and --exclude leave tiny without weights"):
        resolve(parse_ref(str(folder)), SilentReporter(), Choice(exclude=("*.safetensors",)))


def test_folder_without_config_or_weights(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        _resolve(tmp_path / "empty")
    folder = write_model(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.pt").unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        _resolve(folder)


@pytest.mark.parametrize(
    "text",
    [
        "./nowhere",
        "/nowhere",
        "just-a-name",
        "a/b/c",
        "org/na me",
        "~nobody/x",
        "org/" + "x" * 300,
        "Qwen/Qwen3--8B",
        "org/name.git",
    ],
)
def test_what_is_neither_folder_nor_hub_name(text: str) -> None:
    with pytest.raises(ModelError, match="cannot find the model"):
        parse_ref(text)


def test_hub_names() -> None:
    assert parse_ref("org/name").repo == "org/name"
    assert parse_ref("hf://org/name@v1").revision == "v1"
    assert parse_ref("org/name", "main").revision == "main"
    with pytest.raises(ModelError, match="two revisions"):
        parse_ref("org/name@v1", "v2")


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not go with a folder"):
        parse_ref(str(write_model(tmp_path / "tiny")), "main")


def test_quantization_is_read_from_the_configuration() -> None:
    assert describe_quantization({}) is None
    assert (
        describe_quantization({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})
        == "awq int4 g128"
    )
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 64}}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert describe_quantization({"quantization_config": quantization}) == "compressed-tensors int4 g64"


@pytest.mark.parametrize(
    ("name", "content", "described"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "gptq int4 g128"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True}, "awq int4 g64"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt FP8"),
        ("params.json", {"quantization": {"qformat_weight": "fp8_e4m3"}}, "fp8"),
    ],
)
def test_quantization_is_read_from_the_files_that_vllm_reads(
    tmp_path: Path, name: str, content: dict[str, Any], described: str
) -> None:
    folder = write_model(tmp_path / "tiny")
    (folder / name).write_text(json.dumps(content))
    snapshot = _resolve(folder)
    assert name in {file.path for file in snapshot.lock.files}
    assert (snapshot.lock.quantization, snapshot.lock.parameters) == (described, None)
    _refused_to_quantize(snapshot)
    # config.json has the first word, and a file that stays out has none.
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert _resolve(folder).lock.quantization == "awq"
    (folder / "config.json").write_text("{}")
    without = resolve(parse_ref(str(folder)), SilentReporter(), Choice(exclude=(name,)))
    assert without.lock.quantization is None


def test_quantization_is_seen_in_the_tensors(tmp_path: Path) -> None:
    for name in ("a.qweight", "a.weight_packed"):
        folder = write_model(tmp_path / name)
        save_file({name: np.zeros((2, 2), dtype=np.int32)}, folder / "model.safetensors")
        assert (_resolve(folder).lock.quantization, _resolve(folder).lock.parameters) == ("packed", None)
        _refused_to_quantize(_resolve(folder))
    folder = write_model(tmp_path / "fp8")
    header = b'{"a.weight":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert _resolve(folder).lock.quantization == "fp8"
    _refused_to_quantize(_resolve(folder))


def _refused_to_quantize(snapshot: ModelSnapshot) -> None:
    spec = ImageSpec(model="m", quantize="awq")
    with pytest.raises(ModelError, match="the model is quantized already"):
        build.choose_quantization(spec, snapshot, build.guess_base(spec), SilentReporter())
