from __future__ import annotations

from pathlib import Path

import pytest

from builder.errors import InputError
from builder.spec import DEFAULT_BASE, load_spec


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "coldstart.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = _file(
        tmp_path, "model: org/a\ntag: from-file\nquantize: awq\nengine_args: [--max-model-len, 2048]\n"
    )
    spec = load_spec(path, {"model": None, "tag": "from-flag", "engine_args": ()})
    assert (spec.model, spec.tag, spec.quantize) == ("org/a", "from-flag", "awq")
    assert spec.engine_args == ("--max-model-len", "2048")
    assert spec.base == DEFAULT_BASE


def test_folder_in_the_file_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    assert load_spec(_file(tmp_path, "model: weights\n"), {}).model == str(tmp_path / "weights")


def test_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean `quantize`"):
        load_spec(_file(tmp_path, "model: org/a\nquantise: awq\n"), {})


@pytest.mark.parametrize("value", ["gptq4", "AWQ", 4])
def test_unknown_quantization(value: object) -> None:
    with pytest.raises(InputError, match="unknown quantization"):
        load_spec(None, {"model": "org/a", "quantize": value})


@pytest.mark.parametrize("change", [{"quantize": "awq"}, {"max_shard_size": "500MiB"}])
def test_weights_that_are_made_here_cannot_be_downloaded(change: dict[str, str]) -> None:
    with pytest.raises(InputError, match="Bake or mount them"):
        load_spec(None, {"model": "org/a", "weights": "download", **change})
    assert load_spec(None, {"model": "org/a", "weights": "mount", "quantize": "awq"}).weights == "mount"


def test_weights_that_come_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`weights`.*'bake', 'download' or 'mount'"):
        load_spec(_file(tmp_path, "model: org/a\nweights: baked\n"), {})


@pytest.mark.parametrize(
    "arguments",
    [
        ("--api-key", "x"),
        ("--api-key=x",),
        ("--api_key", "x"),
        ("--hf-token", "x"),
        ("--max-model-len", "8", "--hf-token=x"),
        ("--hf-overrides", "hf_" + "a" * 34),
    ],
)
def test_secret_among_engine_arguments_is_refused_and_not_repeated(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="secret") as caught:
        load_spec(None, {"model": "org/a", "engine_args": arguments})
    assert "a" * 34 not in str(caught.value)


@pytest.mark.parametrize("line", ["api_key: x", "hf_token: x", "HF-TOKEN: x", "password: x"])
def test_secret_in_the_file_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match="looks like a secret"):
        load_spec(_file(tmp_path, f"model: org/a\n{line}\n"), {})


def test_settings_that_only_sound_like_secrets(tmp_path: Path) -> None:
    path = _file(
        tmp_path, "model: acme/multitask-classification-finetuned\nquantize: awq\ncalibration_tokens: 512\n"
    )
    assert load_spec(path, {}).calibration_tokens == 512


@pytest.mark.parametrize("name", ["coldstart/_x_:1", "Foo/Bar:1", "a//b", "a:b:c", "a/b:-x"])
def test_tags_that_docker_would_refuse_later(name: str) -> None:
    with pytest.raises(InputError, match="is not a name"):
        load_spec(None, {"model": "org/a", "tag": name})


@pytest.mark.parametrize(
    "name", ["Registry.example.com:5000/a/b_c:V1.0", "a", "a/b-c__d.e", "127.0.0.1:5000/x/y:z"]
)
def test_tags_that_docker_takes(name: str) -> None:
    assert load_spec(None, {"model": "org/a", "tag": name}).tag == name


@pytest.mark.parametrize(
    "flag", ["--ssl-keyfile", "--model", "--port", "--host", "--served-model-name", "--uds"]
)
def test_flags_that_the_image_owns(flag: str) -> None:
    with pytest.raises(InputError, match="cannot be an engine argument"):
        load_spec(None, {"model": "org/a", "engine_args": (flag, "x")})


def test_argument_without_dashes_is_not_silently_baked() -> None:
    with pytest.raises(InputError, match="go after `--`"):
        load_spec(None, {"model": "org/a", "engine_args": ("extra",)})


@pytest.mark.parametrize("text", ["- a list\n", "a: [\n", "3\n", "1: x\n"])
def test_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        load_spec(_file(tmp_path, text), {})


@pytest.mark.parametrize("name", ["base", "tag", "platform"])
@pytest.mark.parametrize("value", ["a b", "x\nRUN evil", "-v", "", "$(id)"])
def test_image_names_cannot_carry_anything_else(name: str, value: str) -> None:
    with pytest.raises(InputError, match="is not a name"):
        load_spec(None, {"model": "org/a", name: value})


def test_missing_file_and_missing_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_spec(tmp_path / "none.yaml", {})
    with pytest.raises(InputError, match="no model given"):
        load_spec(None, {"model": None})


def test_sizes_have_units(tmp_path: Path) -> None:
    assert load_spec(None, {"model": "org/a", "max_shard_size": "500MiB"}).max_shard_size == 500 << 20
    for wrong in ("many", "1kB", "-5GB"):
        with pytest.raises(InputError, match="max_shard_size"):
            load_spec(None, {"model": "org/a", "max_shard_size": wrong})


def test_remote_code_is_not_run_to_quantize_it() -> None:
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_spec(None, {"model": "org/a", "quantize": "awq", "trust_remote_code": True})
    with pytest.raises(InputError, match="before the `--`"):
        load_spec(None, {"model": "org/a", "engine_args": ("--trust-remote-code",)})
