"""Which architectures can be quantized, and what of each: data, read by recipe and methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

# Dense decoder-only text models whose projections have the names that vLLM fuses and the job expects.
DENSE = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    }
)
# Mixtures of experts whose routers and expert names survive quantization; others are not tried.
EXPERTS = frozenset({"Qwen3MoeForCausalLM"})


@dataclass(frozen=True)
class VisionLanguage:
    """A text model that sees images: its text part is quantized, the modules named in `vision` are not.

    text: the model types that its text part may be of, each with the shapes that a config.json may leave
    out, which are those of transformers' configuration class.
    """

    vision: tuple[str, ...]
    text: Mapping[str, Mapping[str, int]]


def _shapes(hidden: int, intermediate: int, heads: int, key_heads: int, head: int) -> Mapping[str, int]:
    return MappingProxyType(
        {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": head,
        }
    )


VISION_LANGUAGE: Mapping[str, VisionLanguage] = {
    "Gemma3ForConditionalGeneration": VisionLanguage(
        ("vision_tower", "multi_modal_projector"), {"gemma3_text": _shapes(2304, 9216, 8, 4, 256)}
    ),
    "LlavaForConditionalGeneration": VisionLanguage(
        ("vision_tower", "multi_modal_projector"),
        {"llama": _shapes(4096, 11008, 32, 32, 128)},
    ),
    # Older files have the text part's shapes at the top.
    "Qwen2_5_VLForConditionalGeneration": VisionLanguage(
        ("visual",), {"qwen2_5_vl_text": {}, "qwen2_5_vl": {}}
    ),
}
VISION = frozenset(VISION_LANGUAGE)


def text_config(config: Mapping[str, Any], architecture: str) -> Mapping[str, Any] | None:
    """The configuration of what is quantized; None where a vision-language model's text part is unknown."""
    model = VISION_LANGUAGE.get(architecture)
    if model is None:
        return config
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    shapes = model.text.get(str(text.get("model_type")))
    return None if shapes is None else {**shapes, **text}


def is_vision(tensor: str, architecture: str) -> bool:
    """Whether a tensor belongs to what a vision-language model sees with, by its name in a checkpoint."""
    model = VISION_LANGUAGE.get(architecture)
    return model is not None and any(part in model.vision for part in tensor.split(".")[:2])
