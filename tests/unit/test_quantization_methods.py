"""Which quantization methods a start imports and asks, in a package made up as vLLM has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime import quantization_methods
from tests.unit.conftest import Put

_CLASS = """
import calls
calls.imported.append("{0}")
class {0}Config:
    @classmethod
    def override_quantization_method(cls, config, user, hf_config=None):
        calls.asked.append("{0}")
        if user == "broken":
            raise ValueError("{0} cannot take it over")
        return "{0}" if config["quant_method"] == "takes-{0}" else None
    @staticmethod
    def get_name():
        return "{0}"
"""
_PACKAGE = """
QUANTIZATION_METHODS = ["one", "two"]
_CUSTOMIZED_METHOD_TO_QUANT_CONFIG = {}
def get_quantization_config(name):
    if name not in QUANTIZATION_METHODS:
        raise ValueError(f"Invalid quantization method: {name}")
    from .one import oneConfig
    from .two import twoConfig
    return _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(name) or {"one": oneConfig, "two": twoConfig}[name]
"""
# As ModelConfig._verify_quantization goes about it, and what comes after it.
_MODEL = """
import vllm.model_executor.layers.quantization as me_quant
def verify(config, user=None, hf_config=None):
    for name in me_quant.QUANTIZATION_METHODS:
        method = me_quant.get_quantization_config(name)
        if found := method.override_quantization_method(config, user, hf_config=hf_config):
            return found, method.get_name()
    return config["quant_method"], None
"""
_PLATFORMS = """
class current_platform:
    device_type = "cuda"
    capability = (9, 0)
    @classmethod
    def get_device_capability(cls):
        return cls.capability
"""
# Prints what was imported and asked, and the result, as JSON.
_START = """
import importlib, json, pathlib, sys
import calls
from runtime import quantization_methods
path = pathlib.Path(sys.argv[1])
methods = quantization_methods.Methods(quantization_methods.read(path), quantization_methods.writer(path))
sys.meta_path.insert(0, methods)
import vllm.config.model as model
import vllm.model_executor.layers.quantization as package
class Config:
    def __init__(self, **values):
        self.values = values
    def to_dict(self):
        return self.values
result = []
try:
    exec(sys.argv[2])
except ValueError as error:
    result = str(error)
print(json.dumps([calls.imported, calls.asked, result, methods.missing]))
"""
VERIFY = "result = model.verify({'quant_method': 'one'}, hf_config=Config(model_type='llama'))"


@pytest.fixture
def vllm(put: Put, tmp_path: Path) -> Path:
    put("calls.py", "imported, asked = [], []\n")
    put("vllm/__init__.py", "")
    put("vllm/platforms.py", _PLATFORMS)
    put("vllm/config/__init__.py", "")
    put("vllm/config/model.py", _MODEL)
    put("vllm/model_executor/__init__.py", "")
    put("vllm/model_executor/layers/__init__.py", "")
    put("vllm/model_executor/layers/quantization/__init__.py", _PACKAGE)
    for name in ("one", "two"):
        put(f"vllm/model_executor/layers/quantization/{name}.py", _CLASS.format(name))
    return tmp_path


def start(folder: Path, code: str) -> Any:
    command = [sys.executable, "-c", _START, str(folder / quantization_methods.FILE), code]
    root = Path(quantization_methods.__file__).parents[1]
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{folder}:{root}"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_a_start_found_is_not_asked_again(vllm: Path) -> None:
    assert start(vllm, VERIFY) == [["one", "two"], ["one", "two"], ["one", None], []]
    assert start(vllm, VERIFY) == [[], [], ["one", None], []]
    # The method that the model has is imported, and no other.
    get = "result = package.get_quantization_config('two').get_name()"
    assert start(vllm, get) == [["two"], [], "two", []]


@pytest.mark.parametrize(
    "other",
    [
        "model.verify({'quant_method': 'one', 'bits': 4}, hf_config=Config(model_type='llama'))",
        "model.verify({'quant_method': 'one'}, 'one', hf_config=Config(model_type='llama'))",
        "model.verify({'quant_method': 'one'}, hf_config=Config(model_type='gemma'))",
        "model.verify({'quant_method': 'one'}, hf_config=object())",
    ],
)
def test_another_checkpoint_is_asked_about(other: str, vllm: Path) -> None:
    start(vllm, VERIFY)
    assert start(vllm, f"result = {other}")[1] == ["one", "two"]
    start(vllm, f"result = {other}")
    asked = start(vllm, f"result = {other}")[1]
    # Of something that only its address tells apart, nothing can be known.
    assert asked == (["one", "two"] if "object()" in other else [])


def test_another_device_is_asked_about(vllm: Path) -> None:
    start(vllm, VERIFY)
    (vllm / "vllm" / "platforms.py").write_text(_PLATFORMS.replace("(9, 0)", "(10, 0)"))
    assert start(vllm, VERIFY)[1] == ["one", "two"]


def test_a_method_that_takes_a_checkpoint_over_is_asked_each_time(vllm: Path) -> None:
    code = "result = model.verify({'quant_method': 'takes-two'})"
    assert start(vllm, code) == [["one", "two"], ["one", "two"], ["two", "two"], []]
    assert start(vllm, code) == [["two"], ["two"], ["two", "two"], []]


def test_errors_are_vllms_own(vllm: Path) -> None:
    code = "model.verify({'quant_method': 'one'}, 'broken')"
    assert start(vllm, code)[2] == "one cannot take it over"
    assert start(vllm, code)[2] == "one cannot take it over"
    get = "package.get_quantization_config('three')"
    assert start(vllm, get)[2] == "Invalid quantization method: three"


def test_a_method_that_a_plugin_brought_is_never_remembered_for_vllms(vllm: Path) -> None:
    start(vllm, VERIFY)
    plugin = (
        "package._CUSTOMIZED_METHOD_TO_QUANT_CONFIG['one'] = importlib.import_module("
        "'vllm.model_executor.layers.quantization.two').twoConfig\n"
    )
    assert start(vllm, plugin + VERIFY)[1] == ["two"]


def test_another_installation_knows_nothing(vllm: Path) -> None:
    start(vllm, VERIFY)
    (vllm / "vllm-2.0.dist-info").mkdir()
    (vllm / "transformers").mkdir()
    (vllm / "transformers" / "models").mkdir()
    (vllm / "transformers" / "__init__.py").write_text("")
    assert start(vllm, VERIFY)[1] == ["one", "two"]


@pytest.mark.parametrize("text", ["", "damaged", "{}\n[1]\n", None])
def test_a_damaged_file_counts_as_none(text: str | None, vllm: Path) -> None:
    start(vllm, VERIFY)
    path = vllm / quantization_methods.FILE
    path.write_text(path.read_text()[:-5] if text is None else text)
    assert start(vllm, VERIFY)[2] == ["one", None]


def test_a_class_that_is_not_there_is_asked_of_vllm(vllm: Path) -> None:
    start(vllm, VERIFY)
    path = vllm / quantization_methods.FILE
    for right, wrong in ((".one:", ".eno:"), (":oneConfig", ":oneFongic"), ('"vllm.model', '".vllm.model')):
        path.write_text(path.read_text().replace(right, wrong))
        assert start(vllm, "result = package.get_quantization_config('one').get_name()")[2] == "one"


def test_a_vllm_without_these_functions_is_named(vllm: Path) -> None:
    (vllm / "vllm/config/model.py").write_text("")
    (vllm / "vllm/model_executor/layers/quantization/__init__.py").write_text("")
    assert start(vllm, "")[3] == [
        "vllm.config.model.me_quant",
        "vllm.model_executor.layers.quantization.get_quantization_config",
    ]
