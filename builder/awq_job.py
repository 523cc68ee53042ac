"""Quantizes one model folder with AWQ. Run by the quantizer's Python, never imported by the builder.

    python -I awq_job.py JOB.json

The job file names `model` and `output` (folders), `recipe` (the fields of AwqRecipe) and, where the user
gave one, `calibration` (texts and chats) or `calibration_parquet` (a file of them). CUDA is used where there
is a GPU. Progress goes to stdout as JSON lines like {"progress": 0.5, "detail": "layer 3 of 30"}, and
everything that a library prints goes to stderr.
Exit code 0 means that `output` is complete.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Report = Callable[[float, str], None]

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
GENERATE_BATCH = 24
MAX_ROUNDS = 8
# Several layers of an image are pulled at once, and a shard is the smallest piece that can be one.
SHARD_SIZE = "2GB"


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
    """Text is generated on the GPU only where the whole model fits; AWQ itself goes layer by layer."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if weights * 1.3 < free else "cpu"


def _prompts(tokenizer: Any, first: int, count: int) -> Any:
    """A left-padded batch of `count` prompts: input_ids and attention_mask, int64 [count, width]."""
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": PROMPTS[(first + i) % len(PROMPTS)]}] for i in range(count)]
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


def calibration_blocks(
    model: Any, tokenizer: Any, *, samples: int, tokens: int, seed: int, report: Report
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
        prompts = {name: ids.to(model.device) for name, ids in _prompts(tokenizer, first, count).items()}
        width = prompts["input_ids"].shape[1]
        before = len(stream) + int(prompts["attention_mask"].sum())

        def enough(rows: Any, *_: Any, before: int = before, width: int = width, **__: Any) -> Any:
            done = before + int(_written(rows[:, width:], eos).sum())
            report(
                min(1.0, done / wanted),
                f"generating calibration text, {min(done, wanted)} of {wanted} tokens",
            )
            return torch.full((len(rows),), done >= wanted, device=rows.device)

        rows = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[enough],
        )
        kept = torch.cat([prompts["attention_mask"].bool(), _written(rows[:, width:], eos)], dim=1)
        stream.extend(rows[kept].tolist())
        if len(stream) >= wanted:
            break
    if not stream:
        raise SystemExit("The model generated no calibration text.")
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


def apply_awq(
    model: Any, tokenizer: Any, blocks: list[list[int]], recipe: dict[str, Any], report: Report
) -> None:
    """Scales and quantizes `model` in place: W4A16, groups of `group_size` weights along the input."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    if not torch.accelerator.is_available():
        # llm-compressor 0.14 pins the inputs of every layer, which torch refuses without an accelerator.
        IntermediatesCache.pin_memory = lambda *_: None

    layers = model.config.num_hidden_layers
    finished = 0
    smooth = AWQModifier.on_sequential_epoch_end

    def smooth_and_report(*args: Any, **kwargs: Any) -> None:
        nonlocal finished
        smooth(*args, **kwargs)
        finished += 1
        report(min(1.0, finished / layers), f"layer {min(finished, layers)} of {layers}")

    AWQModifier.on_sequential_epoch_end = smooth_and_report
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": recipe["group_size"],
        "symmetric": recipe["symmetric"],
        "dynamic": False,
    }
    rows = [{"input_ids": torch.tensor(block)} for block in blocks]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=8),  # type: ignore[arg-type, unused-ignore]
        recipe=[
            AWQModifier(duo_scaling="both"),  # as in llm-compressor's own AWQ recipes, at the same cost
            QuantizationModifier(
                config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
                ignore=list(recipe["ignore"]),
            ),
        ],
        num_calibration_samples=len(rows),
        max_seq_length=len(blocks[0]),
    )


def main(job_file: str) -> None:
    report = _claim_stdout()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    recipe, output = job["recipe"], Path(job["output"])

    report(0.0, "loading the model")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    def part(start: float, end: float) -> Report:
        return lambda progress, detail: report(start + (end - start) * progress, detail)

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    samples, tokens = recipe["calibration_samples"], recipe["calibration_tokens"]
    documents = job.get("calibration")
    if job.get("calibration_parquet"):
        documents = parquet_documents(job["calibration_parquet"])
    if documents:
        blocks = document_blocks(tokenizer, documents, samples=samples, tokens=tokens)
    else:
        model.to(_generation_device(model))
        blocks = calibration_blocks(
            model, tokenizer, samples=samples, tokens=tokens, seed=recipe["seed"], report=part(0.05, 0.25)
        )
        model.to("cpu")  # llm-compressor itself moves one layer at a time to the accelerator
    apply_awq(model, tokenizer, blocks, recipe, part(0.25, 0.97))

    report(0.97, "writing the weights")
    model.generation_config = GenerationConfig()  # transformers refuses to save one that contradicts itself
    model.save_pretrained(output, save_compressed=True, max_shard_size=SHARD_SIZE)
    # The builder copies the model's own tokenizer, chat template and generation config, byte for byte.
    (output / "generation_config.json").unlink(missing_ok=True)
    report(1.0, "done")


if __name__ == "__main__":
    main(sys.argv[1])
