"""Quantization methods: one small file each, one line each here. Data only, so that `--help` stays quick."""

from __future__ import annotations

from collections.abc import Mapping

from builder.methods.awq import AWQ
from builder.methods.awq_gptq import AWQ_GPTQ
from builder.methods.fp8 import FP8
from builder.methods.gptq import GPTQ
from builder.methods.method import Method
from builder.methods.rtn import RTN

METHODS: Mapping[str, Method] = {
    "awq": AWQ,
    "awq-gptq": AWQ_GPTQ,
    "gptq": GPTQ,
    "rtn": RTN,
    "fp8": FP8,
}
