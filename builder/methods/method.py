"""A quantization method: data that the quantizer's job turns into llm-compressor modifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# "int4": groups along the input features, 16-bit activations (W4A16).
# "fp8": a scale per output channel, activations in FP8 with a scale per token (W8A8).
WeightFormat = Literal["int4", "fp8"]


@dataclass(frozen=True)
class Modifier:
    """One of llm-compressor's: "module:Class" and its arguments, as JSON has them."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """transforms run before `quantizer`, which is also given the weights' scheme.

    calibrated: it looks at activations, so that the calibration settings matter.
    """

    title: str
    format: WeightFormat
    architectures: frozenset[str]
    calibrated: bool
    quantizer: Modifier
    transforms: tuple[Modifier, ...] = ()
