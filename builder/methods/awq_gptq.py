"""AWQ's scales, then GPTQ's rounding: least KL divergence of the int4 methods tried (docs/models.md)."""

from __future__ import annotations

from dataclasses import replace

from builder.methods.awq import AWQ
from builder.methods.gptq import GPTQ

AWQ_GPTQ = replace(GPTQ, title="AWQ and GPTQ", transforms=AWQ.transforms)
