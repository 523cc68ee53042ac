"""How a model is quantized: chosen from its config.json, the method, and what the target's kernels take."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from builder.architectures import EXPERTS, VISION_LANGUAGE, text_config
from builder.calibration import Calibration
from builder.errors import ModelError
from builder.kernels import KERNELS, Kernels, Linear, UnevenError, group_size, misfit, rank_layers
from builder.methods import METHODS
from builder.methods.method import Method, Modifier
from builder.models import quantization_of

# Blocks that a model is measured on, before and after.
HELD_OUT_BLOCKS = 8

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
# A router decides which experts see a token, with next to no weights: nothing is gained by rounding it.
_ROUTERS = (r"re:.*\.mlp\.gate$", r"re:.*\.shared_expert_gate$")
_WITHOUT = "Build without --quantize, or name a checkpoint that its authors quantized."
_DEVICES = {"cpu": "CPUs", "cuda": "GPUs"}


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a quantized model, besides the model and the library.

    group_size: weights along the input features that share one scale, None for one scale per output channel;
    symmetric: no zero points; ignore: names of modules left as they are (or "re:" patterns);
    calibration_samples blocks of calibration_tokens tokens each, no samples where the method does not look at
    activations; calibration: "self" (the model's own answers, sampled with `seed`) or "sha256:..." of the
    user's documents.
    """

    method: str
    group_size: int | None
    symmetric: bool
    ignore: tuple[str, ...]
    calibration_samples: int
    calibration_tokens: int
    seed: int
    calibration: str = "self"

    def canonical(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()

    def describe(self) -> str:
        """In a few words, e.g. "AWQ int4, groups of 64, asymmetric; lm_head stays as it is"."""
        method = METHODS[self.method]
        words = [f"{method.title} {method.format}" if method.title.lower() != method.format else method.title]
        if self.group_size:
            words.append(f"groups of {self.group_size}")
            words.append("symmetric" if self.symmetric else "asymmetric")
        else:
            words.append("a scale per channel")
        kept = ", ".join(name.removeprefix("re:").strip(".*$\\").replace("\\.", ".") for name in self.ignore)
        return f"{', '.join(words)}; {kept} left as is"

    def modifiers(self) -> list[dict[str, Any]]:
        """llm-compressor's modifiers for the job, in their order, as JSON has them."""
        method = METHODS[self.method]
        scheme = {
            "config_groups": {"group_0": {"targets": ["Linear"], **self._scheme(method)}},
            "ignore": list(self.ignore),
        }
        quantizer = Modifier(method.quantizer.name, {**method.quantizer.arguments, **scheme})
        return [
            {"name": modifier.name, "arguments": dict(modifier.arguments)}
            for modifier in (*method.transforms, quantizer)
        ]

    def _scheme(self, method: Method) -> dict[str, Any]:
        if method.format == "fp8":
            fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
            return {
                "weights": {**fp8, "strategy": "channel", "dynamic": False},
                "input_activations": {**fp8, "strategy": "token", "dynamic": True},
            }
        return {
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": self.group_size,
                "symmetric": self.symmetric,
                "dynamic": False,
            }
        }


def require_device(method: str, device: str) -> None:
    """Raises ModelError where the device has no kernels for what the method makes. Needs no model."""
    made = METHODS[method].format
    if made not in KERNELS[device]:
        others = sorted(name for name, known in METHODS.items() if known.format in KERNELS[device])
        raise ModelError(
            f"--quantize {method} does not run on {_DEVICES[device]}",
            why=f"vLLM's fast {made} kernels are for GPUs; on CPUs it has a fallback without gain.",
            fix=f"Use {' or '.join(others)}, or a GPU base image.",
        )


def choose_recipe(
    config: Mapping[str, Any],
    *,
    method: str = "awq",
    device: str = "cuda",
    ranks: int = 1,
    samples: int = 16,
    tokens: int = 256,
    calibration: Calibration | None = None,
) -> Recipe:
    """The recipe for a model, from its config.json alone.

    device: what will serve it; ranks: over how many tensor-parallel ranks; samples, tokens: calibration
    blocks and tokens in each. Raises ModelError for a model that is quantized already, that the method or the
    device's kernels do not support, or whose shapes no group size divides.
    """
    require_device(method, device)
    chosen, kernels = METHODS[method], KERNELS[device][METHODS[method].format]
    architecture, text = _supported_architecture(config, method, device, kernels)
    layers = _layers(text, architecture, ranks)
    experts = architecture in EXPERTS
    problem = misfit(layers, kernels)
    if experts and kernels.experts_hidden and layers[0].inputs % kernels.experts_hidden:
        problem = (
            f"Its experts need a hidden size that {kernels.experts_hidden} divides, not {layers[0].inputs}"
        )
    group = group_size(layers, kernels) if kernels.group_sizes else None
    if kernels.group_sizes and not group:
        shapes = ", ".join(f"{layer.name} {layer.inputs}" for layer in layers)
        sizes = ", ".join(map(str, kernels.group_sizes))
        problem = f"No group size of {sizes} divides all input features ({shapes})"
    if problem:
        per_rank = f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
        raise ModelError(
            f"cannot quantize {architecture} with {chosen.title} for {_DEVICES[device]}{per_rank}",
            why=f"{problem}.",
            fix="Build without --quantize" + (", or with fewer ranks." if ranks > 1 else "."),
        )
    if not chosen.calibrated:
        samples, calibration = 0, None
    return Recipe(
        method=method,
        group_size=group,
        # Zero points lose less: KL to SmolLM2 0.39 against 0.49 (rtn), 0.17 against 0.34 (gptq) and 0.14
        # against 0.37 (awq-gptq) in groups of 64, by benchmarks/results/quantization-2026-11-25.json.
        symmetric=not kernels.zero_points,
        ignore=_ignored(architecture),
        calibration_samples=samples,
        calibration_tokens=tokens,
        seed=0,
        calibration=f"sha256:{calibration.digest}" if calibration else "self",
    )


def _ignored(architecture: str) -> tuple[str, ...]:
    """Modules left as they are; of vision-language models as patterns, since vLLM names them otherwise."""
    if architecture in VISION_LANGUAGE:
        return ("re:.*lm_head$", *(f"re:.*{part}.*" for part in VISION_LANGUAGE[architecture].vision))
    return ("lm_head", *(_ROUTERS if architecture in EXPERTS else ()))


def _supported_architecture(
    config: Mapping[str, Any], method: str, device: str, kernels: Kernels
) -> tuple[str, Mapping[str, Any]]:
    """The architecture and the configuration of its text part."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "(no architecture)"
    if quantized := quantization_of(config):
        raise ModelError(
            f"the model is quantized already (quant_method {quantized['quant_method']})",
            why="Quantization starts from 16-bit or 32-bit weights.",
            fix="Build without --quantize: vLLM takes the method from the model's configuration.",
        )
    supported = METHODS[method].architectures
    experts = any((config.get(key) or 0) > 1 for key in _EXPERT_KEYS)
    if experts or re.search(r"moe|mixtral", architecture, re.IGNORECASE):
        shown = f"the mixture-of-experts model {architecture}"
        if architecture not in supported:
            why = f"Of these it supports {', '.join(sorted(supported & EXPERTS)) or 'none'}."
            raise ModelError(f"--quantize {method} does not support {shown}", why=why, fix=_WITHOUT)
        if kernels.experts_hidden is None:
            raise ModelError(
                f"--quantize {method} does not support {shown} on {_DEVICES[device]}",
                why="vLLM's int4 kernel for experts on CPUs needs AMX, which most CPUs lack.",
                fix="Build without --quantize, or on a GPU base image.",
            )
    elif architecture not in supported:
        raise ModelError(
            f"--quantize {method} does not support {architecture}",
            why=f"Supported: {', '.join(sorted(supported))}.",
            fix=_WITHOUT,
        )
    text = text_config(config, architecture)
    if text is None:
        raise ModelError(
            f"--quantize {method} does not support {architecture} with this text part",
            why=f"Its model_type is not {' or '.join(VISION_LANGUAGE[architecture].text)}.",
            fix=_WITHOUT,
        )
    if architecture in VISION_LANGUAGE and device == "cpu":
        raise ModelError(
            f"--quantize {method} does not support {architecture} on {_DEVICES[device]}",
            why="vLLM's vision-language models need torchvision, which CPU bases lack.",
            fix="Use a GPU base image.",
        )
    return architecture, text


def _layers(config: Mapping[str, Any], architecture: str, ranks: int) -> tuple[Linear, ...]:
    try:
        return rank_layers(config, ranks)
    except KeyError as missing:
        raise ModelError(
            f"config.json of this {architecture} has no {missing.args[0]}",
            why="The group size is chosen from the model's shapes.",
            fix="Check that the model is complete, or build without --quantize.",
        ) from None
    except UnevenError as uneven:
        raise ModelError(
            f"this {architecture} cannot be split over {ranks} tensor-parallel ranks",
            why=f"It has {uneven}.",
            fix="Give a --tensor-parallel-size that divides them.",
        ) from None
