"""Runs inside the base image: `TOKENS FOLDER...` scores a text (a JSON list) with each model."""

from __future__ import annotations

import gc
import json
import sys

import vllm.model_executor.kernels.linear.mixed_precision.cpu  # noqa: F401 - which the mend is for
from vllm import LLM, SamplingParams

sys.path.insert(0, "/coldstart")
from runtime import shortcuts

if __name__ == "__main__":
    shortcuts.multiply_unpacked()  # on a CPU without vLLM's kernel, as an image does it
    text = json.loads(sys.argv[1])
    found = {}
    for folder in sys.argv[2:]:
        llm = LLM(
            folder,
            enforce_eager=True,
            max_model_len=128,
            kv_cache_memory_bytes=1 << 26,
            dtype="bfloat16",
            limit_mm_per_prompt={"image": 0, "video": 0},  # text alone; nothing that processes images is here
        )
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        scored = llm.generate({"prompt_token_ids": text}, wanted)[0].prompt_logprobs
        rows = [row for row in scored if row]
        found[folder] = {
            "top": [next(token for token, entry in row.items() if entry.rank == 1) for row in rows],
            "following": [row[token].logprob for row, token in zip(rows, text[1:], strict=True)],
        }
        del llm
        gc.collect()
    print("\nRESULT " + json.dumps(found))
