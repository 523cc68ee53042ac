"""Quantizes one model folder and measures what it lost. Never imported by the builder.

    python -I quantize_job.py JOB.json

Runs on the quantizer's Python. The job file names `model` and `output` (folders), `measurements` (a file to
write), `modifiers` (llm-compressor's, by name and arguments), `recipe` (the fields of Recipe), `vision` (the
modules that a vision-language model sees with, which are not in the output; none of a text model),
`max_shard_bytes` (of the output's shards), `held_out_blocks` (how many to measure on), `may_widen` (whether
there is memory to compute in float32) and, where the user gave one, `calibration` (texts and chats) or
`calibration_parquet` (a file of them). CUDA is used where there is a GPU. Progress goes to stdout as JSON
lines like {"progress": 0.5, "detail": "layer 3 of 30"}, and everything that a library prints goes to stderr.
Exit code 0 means that `output` and `measurements` are complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Report = Callable[[float, str], None]
PR_SET_PDEATHSIG = 1

# Questions of many kinds, because the scales are calibrated on the answers: prose, code, numbers, lists,
# tables, other languages.
PROMPTS = (
    "Explain to a curious twelve-year-old why the sky turns red in the evening.",
    "Write a Python function that merges two sorted lists, and say what its running time is.",
    "A train leaves at 9:40 and arrives at 13:15. It covers 286 km. Work out its average speed step by step.",
    "Draft a polite e-mail that asks a supplier to move a delivery from Tuesday to Friday.",
    "Give a short account of how the printing press changed Europe.",
    "List the ingredients and the steps for a vegetable soup for four people.",
    "Décris en quelques phrases une promenade au bord de la mer en hiver.",
    "Return a JSON object that describes a book: title, author, year, genres and a one-line summary.",
    "What is the difference between a process and a thread? Use an example.",
    "Tell a small story about a lighthouse keeper who finds a letter in a bottle.",
    "Compare electric and petrol cars in a Markdown table with at least five rows.",
    "Erkläre in einfachen Worten, wie eine Impfung wirkt.",
    "Write a SQL query that finds the ten customers who ordered most last month, and explain it.",
    "My web server answers slowly at noon every day. What should I look at first, and why?",
    "Resume en español las ventajas de aprender a tocar un instrumento.",
    "Write a Bash script that renames every .jpeg file in a folder to .jpg without overwriting anything.",
    "Summarise the plot of Romeo and Juliet in five sentences.",
    "用简单的中文介绍一下月亮为什么会有圆缺变化。",
    "Name three ways to save water at home, and estimate how many litres each one saves in a week.",
    "Play the part of a museum guide and describe a painting of a stormy sea.",
    "Solve 3x + 7 = 2(x - 5), and show each step.",
    "What should a good bug report contain? Answer as a numbered list.",
    "Translate into Italian: 'The meeting was moved to Thursday because the room is being painted.'",
    "Discuss arguments for and against working from home four days a week.",
)
# The text that quality is measured on comes from other questions and another seed.
HELD_OUT_PROMPTS = (
    "Explain how a bicycle stays upright when it moves.",
    "Write a Python class for a bank account with deposit, withdraw and a history of transactions.",
    "A recipe for four needs 350 g of flour and 3 eggs. How much is that for ten people? Show the steps.",
    "Write a short message to a neighbour who plays loud music at night.",
    "What led to the fall of the Roman Empire? Answer in two paragraphs.",
    "Donne trois conseils pour bien dormir.",
    "Return a YAML document that describes a small web service: name, port, replicas and limits.",
    "Describe a market in the morning to somebody who has never been to one.",
    "What is a hash table, and when is it a bad choice?",
    "Nenne fünf Flüsse in Europa und je eine Stadt an ihnen.",
    "Plan a weekend in the mountains for a family with two small children.",
    "Translate into Spanish: 'The library closes at six, but the reading room stays open.'",
)
HELD_OUT_SEED = 1_000_003  # added to the calibration's
LOGITS_AT_ONCE = 128
GENERATE_BATCH = 24
MAX_ROUNDS = 8
MISSING_SHOWN = 5


def _claim_stdout() -> Report:
    """Keeps descriptor 1 for progress alone: what libraries print, from C too, goes to stderr instead."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def report(progress: float, detail: str) -> None:
        # A parent that is gone breaks the pipe, which ends this job as it should.
        print(json.dumps({"progress": round(progress, 4), "detail": detail}), file=channel, flush=True)

    return report


def _generation_device(model: Any) -> str:
    """The whole model runs on the GPU only where it fits; llm-compressor itself goes layer by layer."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if weights * 1.3 < free else "cpu"


def _widen(model: Any) -> set[str]:
    """Has a CPU that computes the model's 16-bit floats in software compute in float32, several times faster.

    Returns the names of the tensors that were narrower; empty where nothing was changed.
    """
    import torch

    in_hardware = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    supported = getattr(torch.ops.mkldnn, in_hardware.get(model.dtype, ""), None)
    if torch.cuda.is_available() or supported is None or supported():
        return set()
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    narrow = {name for name, tensor in tensors if tensor.dtype is model.dtype}
    model.float()
    return narrow


def _narrow(model: Any, dtype: Any, narrow: set[str], before: set[str]) -> None:
    """Gives tensors their `dtype` again: those named in `narrow`, and floats that were not there `before`."""
    import torch

    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.dtype is torch.float32 and (name in narrow or name not in before):
            tensor.data = tensor.data.to(dtype)


def _prompts(tokenizer: Any, prompts: Sequence[str], first: int, count: int) -> Any:
    """A left-padded batch of `count` prompts: input_ids and attention_mask, int64 [count, width]."""
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": prompts[(first + i) % len(prompts)]}] for i in range(count)]
        return tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
    import torch

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SystemExit("The tokenizer has neither a chat template nor a token to start a text with.")
    ids = torch.full((count, 1), start, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _written(answers: Any, eos: set[int]) -> Any:
    """Which generated tokens are text: all up to and with a row's first end token, not its padding.

    answers: int64 [rows, steps]; returns bool [rows, steps].
    """
    import torch

    ends = torch.isin(answers, torch.tensor(sorted(eos), device=answers.device)).int()
    return (ends.cumsum(1) - ends) == 0


def generated_blocks(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int,
    tokens: int,
    seed: int,
    report: Report,
) -> list[list[int]]:
    """`samples` blocks of exactly `tokens` token ids, of text that the model itself generated.

    A model's own answers are close to what it will see, and need no data set that somebody would have to
    download. Blocks are cut from one stream of conversations, so that nothing is padded.
    """
    import torch

    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    configured = model.generation_config.eos_token_id
    eos = set(configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]) - {None}

    wanted = samples * tokens
    count = min(samples, GENERATE_BATCH)
    stream: list[int] = []
    for first in range(0, MAX_ROUNDS * samples, count):
        batch = _prompts(tokenizer, prompts, first, count)
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        width = ids.shape[1]
        before = len(stream) + int(mask.sum())

        def enough(rows: Any, *_: Any, before: int = before, width: int = width, **__: Any) -> Any:
            done = before + int(_written(rows[:, width:], eos).sum())
            report(
                min(1.0, done / wanted),
                f"generating text, {min(done, wanted)} of {wanted} tokens",
            )
            return torch.full((len(rows),), done >= wanted, device=rows.device)

        rows = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[enough],
        )
        kept = torch.cat([mask.bool(), _written(rows[:, width:], eos)], dim=1)
        stream.extend(rows[kept].tolist())
        if len(stream) >= wanted:
            break
    if not stream:
        raise SystemExit("The model generated no text.")
    while len(stream) < wanted:  # a model that always stops at once: its prompts and first words again
        stream.extend(stream[: wanted - len(stream)])
    return [stream[i : i + tokens] for i in range(0, wanted, tokens)]


def parquet_documents(path: str) -> Iterator[Any]:
    """The texts and chats of a Parquet file, row by row; the columns are the fields of a calibration file."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    columns = set(file.schema_arrow.names) & {"text", "messages", "prompt", "completion"}
    if not columns & {"text", "messages"} and not {"prompt", "completion"} <= columns:
        raise SystemExit(f"{path} has no column text or messages, nor prompt and completion.")

    def document(value: Any) -> Any:
        return value if isinstance(value, str) else [{k: m[k] for k in ("role", "content")} for m in value]

    for batch in file.iter_batches(batch_size=64, columns=sorted(columns)):
        for row in batch.to_pylist():
            if row.get("text") or row.get("messages"):
                yield document(row.get("text") or row["messages"])
            elif row.get("prompt") and row.get("completion"):
                yield document(row["prompt"]) + document(row["completion"])


def document_blocks(
    tokenizer: Any, documents: Iterable[Any], *, samples: int, tokens: int
) -> list[list[int]]:
    """At most `samples` blocks of exactly `tokens` token ids, cut from the user's texts and chats in turn."""
    stream: list[int] = []
    for document in documents:
        if isinstance(document, str):
            stream.extend(tokenizer(document)["input_ids"])
        else:
            stream.extend(
                tokenizer.apply_chat_template(document, tokenize=True, return_dict=True)["input_ids"]
            )
        if len(stream) >= samples * tokens:
            break
    blocks = [stream[i : i + tokens] for i in range(0, len(stream) - tokens + 1, tokens)]
    if not blocks:
        raise SystemExit(f"The calibration file has {len(stream)} tokens; one block needs {tokens}.")
    return blocks[:samples]


def split_blocks(
    blocks: list[list[int]], samples: int, held_out: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Blocks to calibrate on, at most `samples`, and `held_out` others to measure on.

    These are the same ones whatever `samples` is: every second block at the start of the text. Of a text that
    is too short for that every fifth block is held out, which may be none.
    """
    whole = len(blocks) >= held_out + max(samples, held_out)
    chosen = range(1, 2 * held_out, 2) if whole else range(4, len(blocks), 5)
    kept = [block for i, block in enumerate(blocks) if i not in chosen]
    return kept[:samples], [blocks[i] for i in chosen][:held_out]


def final_states(model: Any, blocks: list[list[int]]) -> Any:
    """What the model's head reads at each token, on the CPU: [blocks, tokens, hidden size].

    The head itself is never quantized, so that logits follow from these, a few tokens at a time.
    """
    import torch

    with torch.inference_mode():
        rows = [
            model.base_model(torch.tensor([block], device=model.device)).last_hidden_state for block in blocks
        ]
    return torch.cat([row.to("cpu") for row in rows])


def compare(model: Any, before: Any, after: Any, blocks: list[list[int]]) -> dict[str, Any]:
    """Perplexities, how often the likeliest next token is the same one, and mean KL divergence in nats.

    before, after: final states of the original and the quantized model over `blocks`.
    """
    import torch

    head = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def log_probabilities(states: Any) -> Any:
        logits = head(states.to(head.weight.device)).float()
        return torch.log_softmax(torch.tanh(logits / cap) * cap if cap else logits, dim=-1)

    loss_before = loss_after = agreed = divergence = 0.0
    tokens = 0
    with torch.inference_mode():
        for was, now, block in zip(before, after, blocks, strict=True):
            for start in range(0, len(block) - 1, LOGITS_AT_ONCE):
                end = min(start + LOGITS_AT_ONCE, len(block) - 1)
                p, q = log_probabilities(was[start:end]), log_probabilities(now[start:end])
                following = torch.tensor(block[start + 1 : end + 1], device=p.device)[:, None]
                loss_before -= float(p.gather(1, following).sum())
                loss_after -= float(q.gather(1, following).sum())
                agreed += int((p.argmax(1) == q.argmax(1)).sum())
                divergence += float((p.exp() * (p - q)).sum())
                tokens += end - start
    if not (math.isfinite(loss_before) and math.isfinite(loss_after)):
        raise SystemExit("The model's probabilities are not numbers, before or after quantization.")
    return {
        "perplexity_before": math.exp(loss_before / tokens),
        "perplexity_after": math.exp(loss_after / tokens),
        "top1_agreement": agreed / tokens,
        "mean_kl": divergence / tokens,
        "tokens": tokens,
    }


def _modifiers(described: list[dict[str, Any]]) -> list[Any]:
    """Modifiers from {"name": "module:Class", "arguments": {...}}."""
    made = []
    for modifier in described:
        module, _, name = modifier["name"].partition(":")
        made.append(getattr(importlib.import_module(module), name)(**modifier["arguments"]))
    return made


def _report_layers(modifiers: Sequence[Any], layers: int, report: Report) -> None:
    """Has each modifier, which go through all layers one after the other, say when it is done with one."""
    kinds = [type(modifier) for modifier in modifiers]

    def reporting(layer_ends: Callable[..., None], before: int) -> Callable[..., None]:
        finished = 0

        def end_and_report(*args: Any, **kwargs: Any) -> None:
            nonlocal finished
            layer_ends(*args, **kwargs)
            finished = min(finished + 1, layers)  # what comes after the last layer may count as one
            which = f", pass {before + 1} of {len(kinds)}" if len(kinds) > 1 else ""
            done = before + finished / layers
            report(done / len(kinds), f"layer {finished} of {layers}{which}")

        return end_and_report

    own = [kind.on_sequential_epoch_end for kind in kinds]  # one may derive from another
    for before, kind in enumerate(kinds):
        kind.on_sequential_epoch_end = reporting(own[before], before)


def apply_recipe(
    model: Any, tokenizer: Any, blocks: list[list[int]], described: list[dict[str, Any]], report: Report
) -> None:
    """Quantizes `model` in place; without blocks, by its weights alone."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    if not torch.accelerator.is_available():
        # llm-compressor 0.14 pins the inputs of every layer, which torch refuses without an accelerator.
        IntermediatesCache.pin_memory = lambda *_: None

    modifiers = _modifiers(described)
    layers = model.config.get_text_config().num_hidden_layers
    _report_layers(modifiers, layers, report)
    data: dict[str, Any] = {}
    if blocks:
        rows = [{"input_ids": torch.tensor(block)} for block in blocks]
        data = {
            "dataset": DataLoader(rows, batch_size=8),  # type: ignore[arg-type, unused-ignore]
            "num_calibration_samples": len(rows),
            "max_seq_length": len(blocks[0]),
        }
    oneshot(model=model, tokenizer=tokenizer, recipe=modifiers, **data)


def require_whole(missing: Iterable[str], vision: Sequence[str]) -> None:
    """Ends the job where the model's files lack tensors: the library makes up random ones, which lose nothing
    when they are quantized, so that the quality would look fine.

    missing: names, without those that are tied to others. What belongs to `vision` is not used here.
    """
    lacking = sorted(name for name in missing if not set(name.split(".")) & set(vision))
    if lacking:
        more = f" and {len(lacking) - MISSING_SHOWN} more" if len(lacking) > MISSING_SHOWN else ""
        raise SystemExit(f"The model's files lack {', '.join(lacking[:MISSING_SHOWN])}{more}.")


def _load(folder: str, vision: Sequence[str]) -> tuple[Any, Any]:
    """Model and tokenizer; fused experts become linear layers of their own, which can be quantized.

    Of a vision-language model the text part alone: text never reaches the rest, whose layers have names like
    the text's and would be taken for them. The builder adds its tensors to the result.
    """
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    # Shapes that differ from the configuration's are an error of the library's own.
    model, loaded = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    require_whole(loaded["missing_keys"], vision)
    for part in vision:
        delattr(model.base_model, part)
    return linearize_moe(model), tokenizer


def _keep_patterns(config: Path, ignore: Sequence[str]) -> None:
    """The recipe's patterns, beside the names that the library found for them: vLLM has other names."""
    described = json.loads(config.read_text(encoding="utf-8"))
    ignored = described["quantization_config"]["ignore"]
    ignored.extend(pattern for pattern in ignore if pattern not in ignored)
    config.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _end_with_parent() -> None:
    """A build that is killed cannot end this process; the kernel can (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(job_file: str) -> None:
    _end_with_parent()
    started = time.monotonic()
    report = _claim_stdout()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    recipe, output = job["recipe"], Path(job["output"])
    samples, tokens, seed = recipe["calibration_samples"], recipe["calibration_tokens"], recipe["seed"]

    report(0.0, "loading the model")
    import torch
    from transformers import GenerationConfig

    def part(start: float, end: float) -> Report:
        return lambda progress, detail: report(start + (end - start) * progress, detail)

    model, tokenizer = _load(job["model"], job["vision"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype, narrow = model.dtype, _widen(model) if job["may_widen"] else set()
    names = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
    model.to(_generation_device(model))

    def generate(prompts: Sequence[str], count: int, seed: int, report: Report) -> list[list[int]]:
        return generated_blocks(
            model, tokenizer, prompts, samples=count, tokens=tokens, seed=seed, report=report
        )

    blocks: list[list[int]] = []
    held_out: list[list[int]] = []
    documents = job.get("calibration")
    if job.get("calibration_parquet"):
        documents = parquet_documents(job["calibration_parquet"])
    if documents:
        count = job["held_out_blocks"]
        wanted = count + max(samples, count)
        cut = document_blocks(tokenizer, documents, samples=wanted, tokens=tokens)
        blocks, held_out = split_blocks(cut, samples, count)
    elif samples:
        blocks = generate(PROMPTS, samples, seed, part(0.02, 0.2))
    measured_on = "file" if held_out else "self"
    if not held_out:
        held_out = generate(HELD_OUT_PROMPTS, job["held_out_blocks"], seed + HELD_OUT_SEED, part(0.2, 0.3))
    report(0.3, "measuring the original")
    before = final_states(model, held_out)
    model.to("cpu")  # llm-compressor itself moves one layer at a time to the accelerator

    apply_recipe(model, tokenizer, blocks, job["modifiers"], part(0.32, 0.9))

    report(0.9, "measuring what was lost")
    if narrow:  # measured is what will be written
        _narrow(model, dtype, narrow, names)
        model.float()
    if torch.cuda.is_available():
        from compressed_tensors.offload import dispatch_model

        dispatch_model(model)
    quality = compare(model, before, final_states(model, held_out), held_out)

    report(0.97, "writing the weights")
    if narrow:
        _narrow(model, dtype, narrow, names)
    model.generation_config = GenerationConfig()  # transformers refuses to save one that contradicts itself
    model.save_pretrained(output, save_compressed=True, max_shard_size=job["max_shard_bytes"])
    _keep_patterns(output / "config.json", recipe["ignore"])
    # The builder copies the model's own tokenizer, chat template and generation config, byte for byte.
    (output / "generation_config.json").unlink(missing_ok=True)
    measurements = {
        "quality": {**quality, "measured_on": measured_on},
        "parameters": parameters,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "versions": {
            name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")
        },
    }
    Path(job["measurements"]).write_text(json.dumps(measurements), encoding="utf-8")
    report(1.0, "done")


if __name__ == "__main__":
    main(sys.argv[1])
