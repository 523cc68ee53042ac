"""AWQ: input channels that matter are scaled up before rounding, so that they lose less."""

from __future__ import annotations

from builder.architectures import DENSE, EXPERTS, VISION
from builder.methods.method import Method, Modifier

AWQ = Method(
    title="AWQ",
    format="int4",
    architectures=DENSE | EXPERTS | VISION,
    calibrated=True,
    transforms=(Modifier("llmcompressor.modifiers.transform.awq:AWQModifier", {"duo_scaling": "both"}),),
    quantizer=Modifier("llmcompressor.modifiers.quantization:QuantizationModifier"),
)
