"""Round to nearest: no calibration. Quick, and what every other method has to beat."""

from __future__ import annotations

from builder.architectures import DENSE, VISION
from builder.methods.method import Method, Modifier

RTN = Method(
    title="round-to-nearest",
    format="int4",
    architectures=DENSE | VISION,
    calibrated=False,
    quantizer=Modifier("llmcompressor.modifiers.quantization:QuantizationModifier"),
)
