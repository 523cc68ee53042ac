"""What vLLM 0.32's kernels take of quantized linear layers on each device, and the layers of a model.

Read in vLLM's source: CPUWNA16LinearKernel (CPU); Marlin, Machete and the fused-expert backends (CUDA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.methods.method import WeightFormat


@dataclass(frozen=True)
class Kernels:
    """Multiples that the features of a layer must be, on one tensor-parallel rank.

    group_sizes: accepted, the largest (fewest scales) first; experts_hidden: a multiple that the hidden size
    must be for experts to run quantized, None where they do not.
    """

    inputs: int
    outputs: int
    group_sizes: tuple[int, ...] = ()
    zero_points: bool = False
    experts_hidden: int | None = None


KERNELS: Mapping[str, Mapping[WeightFormat, Kernels]] = {
    "cpu": {
        "int4": Kernels(inputs=32, outputs=32, group_sizes=(128, 64, 32), zero_points=True),
    },
    "cuda": {
        # Marlin pads what does not fill its tiles; eight zero points share a 32-bit word.
        "int4": Kernels(inputs=8, outputs=8, group_sizes=(128, 64, 32), zero_points=True, experts_hidden=128),
        "fp8": Kernels(inputs=16, outputs=16),
    },
}


@dataclass(frozen=True)
class Linear:
    """A linear layer as vLLM runs it: `outputs` are the features of the projections fused into one.

    A row-parallel layer is split along its inputs, any other along its outputs.
    """

    name: str
    inputs: int
    outputs: tuple[int, ...]
    row_parallel: bool = False


class UnevenError(Exception):
    """What of a model tensor-parallel ranks cannot share equally."""


def rank_layers(config: Mapping[str, Any], ranks: int) -> tuple[Linear, ...]:
    """The linear layers of a decoder layer as one of `ranks` tensor-parallel ranks has them.

    Raises KeyError for a configuration without a shape, UnevenError for one that cannot be split so.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    key_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    keys = max(1, key_heads // ranks) * head  # vLLM repeats heads that there are too few of
    if key_heads % ranks and ranks % key_heads:
        raise UnevenError(f"{key_heads} key-value heads")
    queries = _split(heads, ranks, "attention heads") * head
    layers = [
        Linear("q/k/v_proj", hidden, (queries, keys, keys)),
        Linear("o_proj", queries, (hidden,), row_parallel=True),
    ]
    widths = {"": config["intermediate_size"]}
    if config.get("moe_intermediate_size"):
        dense = config.get("mlp_only_layers") or (config.get("decoder_sparse_step") or 1) > 1
        widths = {"experts ": config["moe_intermediate_size"]} | (widths if dense else {})
    for prefix, width in widths.items():
        part = _split(int(width), ranks, f"{prefix}intermediate features")
        layers.append(Linear(f"{prefix}gate/up_proj", hidden, (part, part)))
        layers.append(Linear(f"{prefix}down_proj", part, (hidden,), row_parallel=True))
    return tuple(layers)


def _split(count: int, ranks: int, what: str) -> int:
    if count % ranks:
        raise UnevenError(f"{count} {what}")
    return count // ranks


def misfit(layers: Sequence[Linear], kernels: Kernels) -> str | None:
    """Why the kernels do not take one of the layers, whatever the group size; None if they do."""
    for layer in layers:
        if layer.inputs % kernels.inputs:
            return f"Its {layer.name} has {layer.inputs} input features, not a multiple of {kernels.inputs}"
        # Zero points are packed by projection, tiles span the fused layer.
        if sum(layer.outputs) % kernels.outputs or (
            kernels.zero_points and any(outputs % 8 for outputs in layer.outputs)
        ):
            shown = " + ".join(map(str, layer.outputs))
            return f"Its {layer.name} has {shown} output features, not a multiple of {kernels.outputs}"
    return None


def group_size(layers: Sequence[Linear], kernels: Kernels) -> int | None:
    """The largest group that no layer's inputs leave incomplete on a rank; None where none fits."""
    fitting = (size for size in kernels.group_sizes if all(layer.inputs % size == 0 for layer in layers))
    return next(fitting, None)


def tensor_parallel_size(engine_args: Sequence[str]) -> int:
    """N of `--tensor-parallel-size N` or `-tp N`; 1 without it. vLLM's parser has accepted the arguments."""
    size = "1"
    for flag, value in zip(engine_args, (*engine_args[1:], ""), strict=False):
        name, equals, inline = flag.partition("=")
        if name.replace("_", "-") in ("--tensor-parallel-size", "-tp"):
            size = inline if equals else value
    return int(size) if size.isdigit() and int(size) > 0 else 1
