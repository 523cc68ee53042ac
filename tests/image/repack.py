"""Runs in the base image: vLLM's kernel for 4-bit weights on CPUs, with the runtime's shortcut and without.

Prints one JSON object: layer -> whether both gave the same; which function is left in the end; and whether
weights that are unpacked, where there is no kernel, are what they should be.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import vllm.model_executor.kernels.linear.mixed_precision.cpu as kernels
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

sys.path.insert(0, "/packages")
from runtime import shortcuts

KERNEL = kernels.CPUWNA16LinearKernel
NAME = "_process_gptq_weights_w4a16"
OWN = vars(KERNEL)[NAME]
SELF = SimpleNamespace(
    w_q_name="weight", w_s_name="scales", config=SimpleNamespace(weight_type=scalar_types.uint4)
)


def layer(inputs: int, outputs: int, transposed: bool) -> SimpleNamespace:
    """transposed: as compressed-tensors has it; else as GPTQ does."""
    numbers = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), generator=GENERATOR, dtype=torch.int64)
    packed = numbers.to(torch.int32).t()
    packed = packed if transposed else packed.contiguous()
    weight = torch.nn.Parameter(packed.clone(memory_format=torch.preserve_format), requires_grad=False)
    return SimpleNamespace(weight=weight, scales=torch.zeros(1, dtype=torch.bfloat16))


def look(processed: Any) -> Any:
    weight = processed.weight
    return weight.shape, weight.dtype, weight.is_contiguous(), processed.isa_hint, weight.tolist()


same = {}
assert shortcuts.repack_bytewise()
for inputs, outputs in ((64, 32), (576, 960), (1536, 576)):
    for transposed in (True, False):
        seen = []
        for process in (OWN, None):
            GENERATOR = torch.Generator().manual_seed(inputs)
            one = layer(inputs, outputs, transposed)
            (process or vars(KERNEL)[NAME])(SELF, one)
            seen.append(look(one))
        same[f"{inputs} x {outputs}, {'rows' if transposed else 'columns'}"] = seen[0] == seen[1]
left = vars(KERNEL)[NAME].__name__

# Another vLLM, whose order is another one.
setattr(KERNEL, NAME, other := lambda _, layer: layer.weight.data.zero_())
assert shortcuts.repack_bytewise()
GENERATOR = torch.Generator().manual_seed(0)
KERNEL._process_gptq_weights_w4a16(SELF, layer(64, 32, transposed=True))
other_stays = vars(KERNEL)[NAME] is other

unpacked = []
for zero_points in (True, False):
    inputs, outputs, groups = 192, 64, 3
    numbers = torch.randint(16, (inputs, outputs), dtype=torch.int32)
    zeros = torch.randint(16, (groups, outputs), dtype=torch.int32) if zero_points else torch.tensor(8)
    scales = torch.rand(groups, outputs).to(torch.bfloat16)
    wanted = (
        numbers.view(groups, -1, outputs) - (zeros.unsqueeze(1) if zero_points else 8)
    ) * scales.unsqueeze(1)
    packed = pack_quantized_values_into_int32(numbers, scalar_types.uint4, 0)
    given: Any = 8
    if zero_points:
        given = shortcuts.nibbles(pack_quantized_values_into_int32(zeros, scalar_types.uint4, 1))
    made = shortcuts.unpacked(shortcuts.nibbles(packed.t()), scales, given)
    unpacked.append(torch.equal(made, wanted.view(inputs, outputs).t()))
print("RESULT " + json.dumps({"same": same, "left": left, "other_stays": other_stays, "unpacked": unpacked}))
