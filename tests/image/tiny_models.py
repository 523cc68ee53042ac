"""Runs on the quantizer's Python: `make FOLDER [NAME...]` writes tiny models, `logprobs OUT FOLDER...` scores
a text, `shapes TYPE...` prints the defaults of configurations.

Weights are random, but larger than an initialisation's, so that each model has opinions to agree with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXT = list(range(3, 67))  # token ids
SHAPE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"head_dim": 32}),  # its own is hidden size over heads
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    ),
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Text parts as above; each vision part has layers whose names are like the text's.
VISION_LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_vl": (
        "Gemma3Config",
        {
            "text_config": SHAPE | ARCHITECTURES["gemma3"][1],
            "vision_config": VISION | {"vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 262,
        },
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": SHAPE | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 64},
            "image_token_index": 262,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": SHAPE
            | {
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 6, 6],
                },
            },
            "vision_config": {
                "hidden_size": 64,
                "out_hidden_size": 128,
                "intermediate_size": 128,
                "depth": 2,
                "num_heads": 2,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 262,
            "video_token_id": 263,
            "tie_word_embeddings": False,
        },
    ),
}
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}assistant: "


def make(folder: Path, names: Sequence[str]) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    described = {
        name: getattr(transformers, config)(**SHAPE | own) for name, (config, own) in ARCHITECTURES.items()
    }
    described |= {
        name: getattr(transformers, config)(**own) for name, (config, own) in VISION_LANGUAGE.items()
    }
    for name in names or described:
        config = described[name]
        torch.manual_seed(0)
        model = _auto(config).from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _auto(config: Any) -> Any:
    import transformers

    sees = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def logprobs(out: Path, folders: list[str]) -> None:
    """For each folder: the likeliest token after each of TEXT, and the log-probability of the next one."""
    import torch
    from transformers import AutoConfig

    found = {}
    for folder in folders:
        config = AutoConfig.from_pretrained(folder)
        model = _auto(config).from_pretrained(folder, dtype=torch.bfloat16)
        if _rounds_activations(config):
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                    module.register_forward_pre_hook(_rounded)
        with torch.inference_mode():
            scores = torch.log_softmax(model(torch.tensor([TEXT])).logits[0].float(), dim=-1)[:-1]
        following = scores.gather(1, torch.tensor(TEXT[1:])[:, None])[:, 0]
        found[folder] = {"top": scores.argmax(1).tolist(), "following": following.tolist()}
    out.write_text(json.dumps(found))


def _rounds_activations(config: Any) -> bool:
    groups = getattr(config, "quantization_config", {}).get("config_groups", {})
    return any(group.get("input_activations") for group in groups.values())


def _rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an FP8 kernel sees of a layer's inputs, [..., tokens, features]: a scale per token."""
    import torch

    values = inputs[0].float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return ((values / scale).to(torch.float8_e4m3fn).float().mul(scale).to(inputs[0].dtype), *inputs[1:])


def shapes(model_type: str) -> dict[str, Any]:
    """What a configuration of this type says that says nothing."""
    from transformers import CONFIG_MAPPING

    described: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    return described


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1] == "shapes":
        print(json.dumps({name: shapes(name) for name in sys.argv[2:]}))
    else:
        logprobs(Path(sys.argv[2]), sys.argv[3:])
