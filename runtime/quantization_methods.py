"""vLLM's quantization methods, of which a start needs one.

vLLM imports all of them when it is asked for one, and asks each whether it takes over a checkpoint that names
another; with models that one of them is for, that is a fiftieth of a start. What is remembered of earlier
starts of the same image: the class behind a name, and which methods left this checkpoint alone. Whatever was
not asked then is asked of vLLM. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.shortcuts import AfterImport, of_installation

FILE = "quantization-methods.jsonl"
# Set by `warm`, to a file of what its starts found.
VARIABLE = "_COLDSTART_QUANTIZATION_METHODS"
_PACKAGE = "vllm.model_executor.layers.quantization"
_ASKING = "vllm.config.model"


class Methods(AfterImport):
    """To be put on sys.meta_path before vLLM is imported.

    known: what is remembered; found: called with each new entry of that kind.
    """

    def __init__(
        self, known: Mapping[str, str], found: Callable[[str, str], None] = lambda _key, _value: None
    ) -> None:
        super().__init__({_PACKAGE: self._replace_lookup, _ASKING: self._replace_asking})
        self._known, self._found = dict(known), found
        self._import: Callable[[str], Any] = _unknown
        self._customized: Mapping[str, Any] = {}
        self._asked: tuple[list[Any], str] = [], ""
        # What this vLLM lacks, of those that were imported.
        self.missing: list[str] = []

    def _replace_lookup(self, module: Any) -> None:
        if not hasattr(module, "get_quantization_config"):
            self.missing.append(f"{_PACKAGE}.get_quantization_config")
            return
        self._import = module.get_quantization_config
        self._customized = getattr(module, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
        module.get_quantization_config = self.get

    def _replace_asking(self, module: Any) -> None:
        if "me_quant" in vars(module):
            module.me_quant = _Package(self)
        else:
            self.missing.append(f"{_ASKING}.me_quant")

    def get(self, name: str) -> Any:
        """The class of a method, as vLLM's get_quantization_config has it: ValueError where there is none."""
        if name not in self._customized and (where := self._known.get(name)):
            module, _, attribute = where.partition(":")
            with suppress(ImportError, AttributeError, TypeError, ValueError):  # else vLLM says what is wrong
                return getattr(importlib.import_module(module), attribute)
        method = self._import(name)
        self._remember(name, f"{method.__module__}:{method.__qualname__}")
        return method

    def override(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What the method's `override_quantization_method` gives; it is a function of its arguments."""
        question = f"{name} {self._digest(args, kwargs)}"
        if name not in self._customized and question in self._known:
            return None
        answer = self.get(name).override_quantization_method(*args, **kwargs)
        if answer is None:
            self._remember(question, "")
        return answer

    def _remember(self, key: str, value: str) -> None:
        if self._known.get(key) != value:
            self._known[key] = value
            self._found(key, value)

    def _digest(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Of the checkpoint, as vLLM describes it to one method after the other, and of the device."""
        objects = [*args, *kwargs.values()]
        last, digest = self._asked
        if len(last) != len(objects) or any(
            one is not other for one, other in zip(last, objects, strict=True)
        ):
            platform = importlib.import_module("vllm.platforms").current_platform
            device = [platform.device_type, str(platform.get_device_capability())]
            text = json.dumps([args, kwargs, device], sort_keys=True, default=_plain)
            digest = hashlib.sha256(text.encode()).hexdigest()
            self._asked = objects, digest
        return digest


class _Package(ModuleType):
    """The package of methods, as vLLM's model configuration knows it."""

    def __init__(self, methods: Methods) -> None:
        super().__init__(_PACKAGE)
        self._methods = methods

    def get_quantization_config(self, name: str) -> _Method:
        return _Method(self._methods, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(_PACKAGE), name)


class _Method:
    """A method that may be asked without having been imported."""

    def __init__(self, methods: Methods, name: str) -> None:
        self._methods, self._name = methods, name

    def override_quantization_method(self, *args: Any, **kwargs: Any) -> Any:
        return self._methods.override(self._name, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._methods.get(self._name), name)


def _unknown(name: str) -> Any:
    raise ValueError(f"Invalid quantization method: {name}")


def _plain(value: Any) -> Any:
    """A configuration of transformers as data. Anything else may say its address, and then equals nothing."""
    return value.to_dict() if hasattr(value, "to_dict") else repr(value)


def read(path: Path) -> dict[str, str]:
    """Empty where nothing was written, or that by another installation."""
    try:
        first, *lines = path.read_text().splitlines()
        if first != of_installation().hex():
            return {}
        return dict(json.loads(line) for line in lines)
    except (OSError, ValueError, TypeError):
        return {}


def writer(path: Path) -> Callable[[str, str], None]:
    """A function that adds an entry to a file, which `read` then reads. For this process and its forks."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if os.fstat(log).st_size == 0:
        os.write(log, f"{of_installation().hex()}\n".encode())

    def found(key: str, value: str) -> None:
        os.write(log, f"{json.dumps([key, value])}\n".encode())

    return found
