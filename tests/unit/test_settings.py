from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.preflight import PreflightError, check
from runtime.settings import Manifest, SettingsError, load, read_api_key

MANIFEST = Manifest("/models/tiny", "tiny", "cpu", ("--enforce-eager",))


def test_flags_over_environment_over_manifest() -> None:
    assert load([], {}, MANIFEST).served_model_name == "tiny"
    environ = {"COLDSTART_SERVED_MODEL_NAME": "env", "COLDSTART_PORT": "9000"}
    assert load([], environ, MANIFEST).served_model_name == "env"
    settings = load(["--served-model-name", "flag"], environ, MANIFEST)
    assert (settings.served_model_name, settings.port) == ("flag", 9000)


def test_variable_that_kubernetes_sets_for_a_service_is_ignored() -> None:
    assert load([], {"COLDSTART_PORT": "tcp://10.0.0.1:8000"}, MANIFEST).port == 8000


def test_unknown_flags_go_to_vllm_after_the_baked_ones() -> None:
    settings = load(["--max-model-len", "8", "--drain-delay", "0"], {}, MANIFEST)
    assert settings.vllm_args() == [
        *("--model", "/models/tiny", "--served-model-name", "tiny"),
        *("--enforce-eager", "--max-model-len", "8"),
    ]
    assert settings.drain_delay == 0.0


@pytest.mark.parametrize("flag", ["--model=x", "--uds=x", "--api_server_count=2", "--headless"])
def test_flags_that_contradict_the_image_are_refused(flag: str) -> None:
    with pytest.raises(SettingsError, match="cannot be set here"):
        load([flag], {}, MANIFEST)


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--port", "70000"], {}),
        (["--drain-timeout", "-1"], {}),
        ([], {"COLDSTART_PORT": "http"}),
        ([], {"COLDSTART_PORT": "inf"}),
        ([], {"COLDSTART_DRAIN_TIMEOUT": "nan"}),
        (["--drain-delay", "inf"], {}),
        ([], {"COLDSTART_DRAIN_DELAY": "soon"}),
    ],
)
def test_values_out_of_range(argv: list[str], environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        load(argv, environ, MANIFEST)


def test_manifest_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not made by"):
        Manifest.read(tmp_path / "manifest.json")
    for text in ("{", "[]", json.dumps({"model": {}})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(SettingsError, match="damaged"):
            Manifest.read(tmp_path / "manifest.json")


def test_gpu_image_without_a_gpu_is_refused_with_the_way_out() -> None:
    gpu = Manifest("/models/tiny", "tiny", "cuda", ())
    with pytest.raises(PreflightError, match="--gpus all"):
        check(gpu, exists=lambda path: "dev" not in path.parts)
    check(gpu, exists=lambda _: True)


def test_hidden_model_is_told() -> None:
    with pytest.raises(PreflightError, match="mounted over it"):
        check(MANIFEST, exists=lambda _: False)


def test_api_key_is_the_content_of_the_file(tmp_path: Path) -> None:
    assert read_api_key({}) is None
    path = tmp_path / "api-key"
    path.write_text("secret\n")
    assert read_api_key({"COLDSTART_API_KEY_FILE": str(path)}) == "secret"


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_api_key_file_without_a_key_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "api-key"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match="COLDSTART_API_KEY_FILE"):
        read_api_key({"COLDSTART_API_KEY_FILE": str(path)})
