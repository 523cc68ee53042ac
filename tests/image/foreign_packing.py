"""Checkpoints as AutoAWQ and GPTQ's tools write them, from one of llm-compressor's in int4.

The integers, zero points and scales stay; their order, their types and what config.json says are the others'.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

from builder.report import SilentReporter
from builder.shards import tensors_of, write_shards

Array = np.ndarray[Any, np.dtype[Any]]

_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)
# Which of eight columns is in the lowest four bits of AutoAWQ's words, which one in the next.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PACKED = "weight_packed"
_PARTS = (_PACKED, "weight_scale", "weight_shape", "weight_zero_point")


@dataclass(frozen=True)
class Layer:
    """Of a linear layer: (value - zero) * scale is its weight.

    values: 0 to 15, [inputs, outputs]; zeros: 0 to 15, [groups, outputs]; scales: float32, [groups, outputs].
    """

    values: Array
    zeros: Array
    scales: Array


def words_of(nibbles: Array) -> Array:
    """Eight neighbours of the last axis in an int32, the first in the lowest bits."""
    eights = nibbles.astype(np.uint32).reshape(*nibbles.shape[:-1], -1, 8)
    words: Array = np.bitwise_or.reduce(eights << _SHIFTS, axis=-1)
    return words.view(np.int32)


def nibbles_of(words: Array) -> Array:
    """The inverse of `words_of`."""
    return (words.view(np.uint32)[..., None] >> _SHIFTS & 15).reshape(*words.shape[:-1], -1)


def layers_of(folder: Path) -> dict[str, Layer]:
    """The linear layers that a pack-quantized model has in int4, by module."""
    there: dict[str, dict[str, Any]] = {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    }
    suffix = f".{_PACKED}"
    return {
        name.removesuffix(suffix): _layer(there, name.removesuffix(suffix))
        for name in there
        if name.endswith(suffix)
    }


def _layer(there: dict[str, dict[str, Any]], module: str) -> Layer:
    values = nibbles_of(_array(there[f"{module}.{_PACKED}"]))
    assert list(values.shape) == _array(there[f"{module}.weight_shape"]).tolist()
    scales = _array(there[f"{module}.weight_scale"])
    # Without them the middle is meant. With them eight outputs share a word, not eight groups.
    zeros = np.full(scales.shape, 8, np.uint32)
    if packed := there.get(f"{module}.weight_zero_point"):
        zeros = nibbles_of(_array(packed).T).T
    assert zeros.shape == scales.shape
    return Layer(values.T, zeros.T, scales.T)


def _array(tensor: dict[str, Any]) -> Array:
    """numpy lacks bfloat16, which is the upper half of a float32."""
    if tensor["dtype"] == "BF16":
        wide = np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor["shape"])
    types = {"I32": np.int32, "I64": np.int64}
    return np.frombuffer(tensor["data"], types[tensor["dtype"]]).reshape(tensor["shape"])


def write_awq(quantized: Path, folder: Path) -> Path:
    """AutoAWQ's "gemm": eight outputs to a word, in an order of its own."""

    def packed(layer: Layer) -> dict[str, Array]:
        return {
            "qweight": words_of(_in_awq_order(layer.values)),
            "qzeros": words_of(_in_awq_order(layer.zeros)),
            "scales": _half(layer.scales),
        }

    said = {"quant_method": "awq", "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    return _write(quantized, folder, packed, said)


def _in_awq_order(nibbles: Array) -> Array:
    return nibbles.reshape(len(nibbles), -1, 8)[:, :, _AWQ_ORDER].reshape(nibbles.shape)


def write_gptq(quantized: Path, folder: Path) -> Path:
    """Eight inputs to a word, and zero points less one. vLLM takes symmetric ones alone (TYPE_MAP)."""

    def packed(layer: Layer) -> dict[str, Array]:
        assert np.all(layer.zeros == 8)
        inputs, groups = len(layer.values), len(layer.scales)
        return {
            "qweight": words_of(layer.values.T).T,
            "qzeros": words_of(layer.zeros - 1),
            "scales": _half(layer.scales),
            "g_idx": np.arange(inputs, dtype=np.int32) // (inputs // groups),
        }

    said = {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True, "desc_act": False}
    return _write(quantized, folder, packed, said)


def _half(scales: Array) -> Array:
    """As both have them. The eight digits of a bfloat16 fit, where they are not too small."""
    half = scales.astype(np.float16)
    assert np.array_equal(half.astype(np.float32), scales)
    return half


def _write(
    quantized: Path, folder: Path, packed: Callable[[Layer], dict[str, Array]], said: dict[str, Any]
) -> Path:
    folder.mkdir(parents=True)
    for path in (*quantized.glob("tokenizer*"), *quantized.glob("*.jinja")):
        shutil.copy(path, folder)
    config = json.loads((quantized / "config.json").read_bytes())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert (config["quantization_config"]["format"], group["weights"]["num_bits"]) == ("pack-quantized", 4)
    config["quantization_config"] = said | {"bits": 4, "group_size": group["weights"]["group_size"]}
    (folder / "config.json").write_text(json.dumps(config))
    new = {
        f"{module}.{part}": np.ascontiguousarray(array)
        for module, layer in layers_of(quantized).items()
        for part, array in packed(layer).items()
    }
    extra = folder / "new.safetensors"
    save_file(new, extra)
    tensors = [tensor for path in quantized.glob("*.safetensors") for tensor in tensors_of(path)]
    kept = [tensor for tensor in tensors if not tensor.name.endswith(_PARTS)]
    write_shards(folder, [*kept, *tensors_of(extra)], 1 << 30, SilentReporter())
    extra.unlink()
    return folder
