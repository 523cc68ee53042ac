"""Tiny model folders that tests make: real safetensors, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "dtype": "bfloat16",
}


def write_model(folder: Path, *, shards: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A folder that looks like `save_pretrained` wrote it, and things beside it that no image needs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "optimizer.pt").write_bytes(b"not for serving")
    tensors = {f"t{i}": np.full((4, 4), i, dtype=np.float32) for i in range(shards)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for index, (name, tensor) in enumerate(tensors.items(), start=1):
        shard = f"model-{index:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensor}, folder / shard)
        weight_map[name] = shard
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
