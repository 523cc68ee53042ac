"""GPTQ: columns are rounded one after the other, and what is left of each error goes into the next ones."""

from __future__ import annotations

from builder.methods.method import DENSE, Method, Modifier

GPTQ = Method(
    title="GPTQ",
    format="int4",
    architectures=DENSE,
    calibrated=True,
    quantizer=Modifier("llmcompressor.modifiers.gptq:GPTQModifier"),
)
