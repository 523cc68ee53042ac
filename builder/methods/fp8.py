"""FP8 weights and activations, for GPUs: twice as small and nearly without loss. Not yet run on a GPU."""

from __future__ import annotations

from builder.architectures import DENSE, VISION
from builder.methods.method import Method, Modifier

FP8 = Method(
    title="FP8",
    format="fp8",
    architectures=DENSE | VISION,
    calibrated=False,
    quantizer=Modifier("llmcompressor.modifiers.quantization:QuantizationModifier"),
)
