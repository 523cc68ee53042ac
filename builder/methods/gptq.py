"""GPTQ: columns are rounded one after the other, and what is left of each error goes into the next ones."""

from __future__ import annotations

from builder.architectures import DENSE, VISION
from builder.methods.method import Method, Modifier

GPTQ = Method(
    title="GPTQ",
    format="int4",
    architectures=DENSE | VISION,
    calibrated=True,
    quantizer=Modifier("llmcompressor.modifiers.gptq:GPTQModifier"),
)
