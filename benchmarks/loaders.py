"""How fast vLLM's loaders bring large weights from a cold disk into memory, beside the disk's own rate.

    python -m benchmarks.loaders OUT.json --base IMAGE --tokenizer FOLDER [--gib 8] [--runs 2] [--ranks 1]
        [--only LOADER ...] [--folder DIR]

Makes a Llama of random weights in DIR, which is removed afterwards, mounts it into an image of ours, and
starts that once a loader and run, in turns, every page of the model out of the page cache first. A second
one holds the same bytes as vLLM's `sharded_state` wants them: a file per tensor-parallel rank with the
tensors that the rank has. A loader that the base lacks is told, not skipped silently. Root, on the engine's
own machine.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import page_cache
from benchmarks.harness import describe_machine
from builder.docker_engine import DockerEngine

# Few wide layers: what is measured is bytes, not the number of tensors.
_HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS = 4096, 14336, 32, 8
_SHARD_BYTES = 1 << 30
_START_SECONDS = 280
_BLOCK = 16 << 20

LOADERS: Mapping[str, tuple[str, ...]] = {
    "safetensors lazy": ("--safetensors-load-strategy", "lazy"),
    "safetensors lazy, no read-ahead": ("--safetensors-load-strategy", "lazy", "--off", "read-ahead"),
    "safetensors eager": ("--safetensors-load-strategy", "eager"),
    "safetensors prefetch": ("--safetensors-load-strategy", "prefetch"),
    "safetensors, 4 threads": (
        "--model-loader-extra-config",
        '{"enable_multithread_load": true, "num_threads": 4}',
    ),
    "runai_streamer": ("--load-format", "runai_streamer"),
    "fastsafetensors": ("--load-format", "fastsafetensors"),
    "sharded_state": ("--load-format", "sharded_state"),
}


def make_model(folder: Path, tokenizer: Path, gib: float, ranks: int | None = None) -> int:
    """A Llama of random bf16 weights, about `gib` GiB in shards of 1 GiB. Returns their bytes.

    ranks: as `sharded_state` wants it, for so many tensor-parallel ranks.
    """
    folder.mkdir(mode=0o755)
    for path in tokenizer.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copyfile(path, folder / path.name)
            (folder / path.name).chmod(0o644)
    config = json.loads((tokenizer / "config.json").read_text())
    shapes = _shapes(config["vocab_size"], gib)
    config |= {
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HIDDEN // _HEADS,
        "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in shapes),
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    total = sum(map(_bytes, shapes.values()))
    if ranks:
        mine = _on_rank(shapes, ranks)
        for rank in range(ranks):
            for part, names in enumerate(_shards(mine)):
                file = f"model-rank-{rank}-part-{part}.safetensors"
                _write_shard(folder / file, {name: mine[name] for name in names})
    else:
        shards = list(_shards(shapes))
        where: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / file, {name: shapes[name] for name in names})
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.iterdir():
        path.chmod(0o644)
    return total


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _shapes(vocabulary: int, gib: float) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (vocabulary, _HIDDEN),
    }
    key_value = _HIDDEN // _HEADS * _KV_HEADS
    layer = 0
    while sum(map(_bytes, shapes.values())) < gib * (1 << 30):
        inside: dict[str, tuple[int, ...]] = {
            "input_layernorm": (_HIDDEN,),
            "post_attention_layernorm": (_HIDDEN,),
            "self_attn.q_proj": (_HIDDEN, _HIDDEN),
            "self_attn.k_proj": (key_value, _HIDDEN),
            "self_attn.v_proj": (key_value, _HIDDEN),
            "self_attn.o_proj": (_HIDDEN, _HIDDEN),
            "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
            "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
            "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
        layer += 1
    return shapes


# What vLLM's Llama holds as one tensor, and what a rank has a part of the columns of, not of the rows.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_BY_COLUMN = ("o_proj", "down_proj")
_SCALES = ("_q_scale", "_k_scale", "_v_scale", "_prob_scale")


def _on_rank(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one of the ranks, which all have the same shapes."""
    mine: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.split(".")[-2]
        if module == "q_proj":
            mine |= dict.fromkeys((name.replace("q_proj.weight", f"attn.{scale}") for scale in _SCALES), ())
        fused = name.replace(f".{module}.", f".{_FUSED.get(module, module)}.")
        if len(shape) == 1:
            mine[fused] = shape
        elif module in _BY_COLUMN:
            mine[fused] = (shape[0], shape[1] // ranks)
        else:
            rows = mine.get(fused, (0,))[0] + shape[0] // ranks
            mine[fused] = (rows, shape[1])
    return mine


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _bytes(shape) > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape)
    yield names


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _bytes(shape)]}
        end += _bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # The upper half of a float32 is a bf16.
    block = (
        np.random.default_rng(0).normal(0, 0.02, 8 << 20).astype(np.float32).view(np.uint32) >> 16
    ).astype(np.uint16)
    data = block.tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(data[:end])


def disk_rate(paths: list[Path]) -> float:
    """Bytes a second of one thread that reads the files in order, past the page cache."""
    buffer = mmap.mmap(-1, _BLOCK)
    start, total = time.monotonic(), 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            while read := os.readv(descriptor, [buffer]):
                total += read
        finally:
            os.close(descriptor)
    return total / (time.monotonic() - start)


def measure(folder: Path, tag: str, arguments: tuple[str, ...], ranks: int) -> dict[str, Any]:
    """One cold start: seconds of weight_load and until ready, or why there were none."""
    page_cache.bring([folder], "cold")
    name = f"coldstart-loaders-{os.getpid()}"
    # Ranks exchange tensors through /dev/shm.
    command = ["docker", "run", "--detach", "--name", name, "--network", "none", "--shm-size", "1g"]
    if ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        shares = (",".join(map(str, cores[rank::ranks])) for rank in range(ranks))
        command += ["--env", f"VLLM_CPU_OMP_THREADS_BIND={'|'.join(shares)}"]
    volume = f"{folder}:/models/{folder.name}:ro"
    subprocess.run([*command, "--volume", volume, tag, *arguments], check=True, stdout=subprocess.DEVNULL)
    try:
        return _wait(name)
    finally:
        subprocess.run(["docker", "rm", "--force", name], check=True, stdout=subprocess.DEVNULL)


_ASK = (
    "import urllib.request as u, urllib.error as e\n"
    "try: print(u.urlopen('http://127.0.0.1:8000/startup').read().decode())\n"
    "except e.HTTPError as x: print(x.read().decode())"
)


def _wait(name: str) -> dict[str, Any]:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["docker", "exec", name, "python3", "-c", _ASK], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            report = json.loads(done.stdout)
            if report["status"] == "ready":
                loads = [event for event in report["phases"] if event["phase"] == "weight_load"]
                first = min(event["start"] for event in loads)
                seconds = max(event["end"] for event in loads) - first
                return {"seconds": seconds, "ready": report["elapsed"]}
        running = subprocess.run(
            ["docker", "inspect", "--format", "{{.State.Running}}", name],
            capture_output=True,
            text=True,
            check=True,
        )
        if running.stdout.strip() != "true":
            logs = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True)
            return {"error": (logs.stdout + logs.stderr).strip().splitlines()[-1]}
        time.sleep(0.5)
    return {"error": f"not ready within {_START_SECONDS} s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "coldstart-loaders")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel")
    parser.add_argument("--only", action="append", choices=LOADERS, metavar="LOADER")
    given = parser.parse_args()
    engine = DockerEngine()
    given.folder.mkdir(parents=True)
    names = [name for name in LOADERS if name in (given.only or LOADERS)]
    result: dict[str, Any] = {
        "machine": describe_machine(engine.version).model_dump(),
        "ranks": given.ranks,
        "runs": [],
    }
    images = []
    try:
        plain = given.folder / "random-llama"
        result["bytes"] = make_model(plain, given.tokenizer, given.gib)
        folders = dict.fromkeys(names, plain)
        if "sharded_state" in names:
            folders["sharded_state"] = given.folder / "random-llama-sharded"
            make_model(folders["sharded_state"], given.tokenizer, given.gib, given.ranks)
        os.sync()
        for folder in dict.fromkeys(folders.values()):
            images.append(_tag(folder))
            _build(folder, given.base, given.ranks)
        for run in range(given.runs):
            page_cache.bring([plain], "cold")
            rate = disk_rate(sorted(plain.glob("*.safetensors")))
            result["runs"].append({"loader": "disk", "bytes_per_second": rate})
            print(f"run {run}: disk {rate / 1e6:.0f} MB/s", flush=True)
            for loader, folder in folders.items():
                arguments = LOADERS[loader]
                measured = measure(folder, _tag(folder), arguments, given.ranks)
                if "seconds" in measured:
                    measured["bytes_per_second"] = result["bytes"] / measured["seconds"]
                result["runs"].append({"loader": loader, "arguments": arguments, **measured})
                print(f"run {run}: {loader}: {measured}", flush=True)
                given.output.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(given.folder)
        for tag in images:
            if engine.image(tag):
                engine.remove_image(tag)


def _tag(folder: Path) -> str:
    return f"coldstart-bench/loaders:{folder.name}"


def _build(folder: Path, base: str, ranks: int) -> None:
    coldstart = Path(sys.executable).parent / "coldstart"
    options = ["--base", base, "--weights", "mount", "--no-prewarm", "-t", _tag(folder)]
    arguments = ["--max-model-len", "256", "--tensor-parallel-size", str(ranks)]
    subprocess.run([coldstart, "build", folder, *options, "--", *arguments], check=True)


if __name__ == "__main__":
    main()
