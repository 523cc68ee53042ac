"""Models for benchmarks/quantization.py, made on the quantizer's Python and never imported.

    python -I small_models.py train FOLDER STEPS     a byte-level Llama, trained on Python's own library
    python -I small_models.py random FOLDER HIDDEN LAYERS     a Llama of random weights, for time and memory

The trained one is small (5 million parameters) but real: its weights lie on no earlier quantization's grid.
The same steps on the same Python and torch make the same model.
"""

from __future__ import annotations

import math
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

START, END = "<s>", "</s>"
VOCABULARY = 8192  # of the random ones, whose embeddings should not be all of them
BATCH, LENGTH = 4, 128
# A model that learnt less loses next to nothing by quantization. The frequencies of bytes alone give 23.
MOST_PERPLEXITY = 12.0
HELD_OUT_EVERY = 10  # modules
HEADING, PIECE = 2048, 512  # characters: what is left out of a held-out module, and what of it is a text
MEASURED_PIECES = 96
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def corpus() -> list[str]:
    """Python's library, one text a module; some are left for calibration and measuring."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        p for folder in ("", "asyncio", "email", "json", "http") for p in (library / folder).glob("*.py")
    )
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def held_out() -> list[str]:
    """Pieces of the modules that are not trained on, from one after the other: a few are of many modules."""
    texts = corpus()[::HELD_OUT_EVERY]
    starts = range(HEADING, max(map(len, texts)), PIECE)
    return [text[start : start + PIECE] for start in starts for text in texts if start < len(text)]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token=START, eos_token=END, chat_template=CHAT
    )


def _llama(hidden: int, layers: int, vocabulary: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config)


def _perplexity(model: Any, tokenizer: Any) -> float:
    """Per byte, on what was held out."""
    import torch

    stream = [id for text in held_out()[:MEASURED_PIECES] for id in tokenizer(text)["input_ids"]]
    blocks = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
    with torch.inference_mode():
        losses = [float(model(block[None], labels=block[None]).loss) for block in blocks]
    return math.exp(sum(losses) / len(losses))


def train(folder: Path, steps: int) -> None:
    """Writes nothing, and exits with 1, where the model has not learnt enough."""
    import torch

    torch.manual_seed(0)
    tokenizer, model = _tokenizer(), _llama(256, 6, 258)
    texts = [text for i, text in enumerate(corpus()) if i % HELD_OUT_EVERY]
    stream = torch.tensor([id for text in texts for id in tokenizer(text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    started = time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 50) * max(0.05, 1 - step / steps)
        starts = torch.randint(len(stream) - LENGTH, (BATCH,))
        batch = torch.stack([stream[start : start + LENGTH] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps:
            spent = time.monotonic() - started
            print(f"step {step} of {steps}, {spent:.0f} s, loss {loss:.3f} nats a byte", file=sys.stderr)
    perplexity = _perplexity(model.to(torch.bfloat16).eval(), tokenizer)
    print(f"held-out perplexity {perplexity:.2f} a byte", file=sys.stderr)
    if not perplexity <= MOST_PERPLEXITY:
        raise SystemExit(f"That is more than {MOST_PERPLEXITY}: train for more steps than {steps}.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random(folder: Path, hidden: int, layers: int) -> None:
    import torch

    torch.manual_seed(0)
    _llama(hidden, layers, VOCABULARY).to(torch.bfloat16).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        random(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
