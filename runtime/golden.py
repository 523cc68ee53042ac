"""Golden answers: does a way of running the engine answer like the plain one?

A compiled kernel can be wrong without an error. So before a mode is recorded, its greedy answers are compared
with those of a reference: the same weights and dtype, eager, without any cache. Two right implementations
still differ by rounding, and greedy decoding then takes the other of two tokens that are about equally
likely; after that the texts have nothing to do with each other. Answers are therefore compared up to the
first token that differs, and there it must have been a near tie.

The first token of an answer must be the same: unlike later ones it does not depend on what else is in the
batch, so rounding noise is no excuse, and an answer that begins differently is another answer (compiled bf16
on CPUs begins some with the other of two tokens that bf16 cannot tell apart).
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "golden.json"
TOKENS = 64
_TOP = 5
_REQUEST_SECONDS = 600
_AT_ONCE = 8  # requests; batches are a part of what is compared

# Natural logarithms, twice what the same eager engine differs by from itself with other batches: 0.25, two
# steps of a bf16 logit, and 0.019 (benchmarks/results/golden-tolerance-*.json).
MAX_TIE = 0.5
MAX_MEAN = 0.04

_CHATS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain to a child why the sky is blue.",
    "List three fruits that are red.",
    "Translate to Spanish: good morning, my friend.",
    "What is 17 plus 25?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Name the planets of the solar system.",
    "How do I reverse a list in Python?",
)
_TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the river,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three laws of motion are",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\n",
    "In 1969, the first human",
    "The quick brown fox",
    "Q: What do bees make?\nA:",
    "SELECT name FROM users WHERE",
    "The opposite of hot is",
    "1, 2, 3, 4, 5,",
    "A triangle has three",
    "To be, or not to be,",
    "Photosynthesis is the process by which",
    "<html>\n<head>\n",
    "The stock market fell today because",
    "My favourite season is autumn, since",
    "The largest ocean on Earth is the",
    "Le chat est",
    "Der Hund läuft",
    "Breaking news:",
    "According to the second law of thermodynamics,",
)


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of one prompt; for each the most likely ones with their natural log-probabilities."""

    tokens: tuple[str, ...]
    top: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Comparison:
    """Log-probabilities are natural logarithms.

    same: answers equal to the last token; begun_differently: prompts whose answers differ in the first token;
    ties: by prompt, the difference between the two tokens where its answers part (infinite where one side did
    not have the other's token among its likeliest); tokens: how many were the same before that; mean: of
    |difference| over those.
    """

    prompts: int
    same: int
    begun_differently: tuple[int, ...]
    ties: Mapping[int, float]
    tokens: int
    mean: float

    @property
    def worst_tie(self) -> float:
        return max(self.ties.values(), default=0.0)

    @property
    def ok(self) -> bool:
        return not self.begun_differently and self.worst_tie <= MAX_TIE and self.mean <= MAX_MEAN

    def describe(self) -> str:
        """One sentence: what is wrong, or how near the answers are."""
        if self.worst_tie > MAX_TIE:
            worst = max(self.ties, key=lambda prompt: self.ties[prompt])
            what = f"takes a token that the reference finds far less likely, at {_prompt(worst)}"
        elif self.begun_differently:
            what = (
                f"{len(self.begun_differently)} of {self.prompts} answers begin with another token than the "
                f"reference's, the one to {_prompt(self.begun_differently[0])} for one; the two were about "
                "equally likely, which this dtype cannot tell apart"
            )
        elif self.mean > MAX_MEAN:
            what = f"log-probabilities differ by {self.mean:.3f} on average, and {MAX_MEAN} is allowed"
        else:
            return (
                f"{self.same} of {self.prompts} answers the same to the last token, the others part at near "
                f"ties; log-probabilities differ by {self.mean:.4f} on average"
            )
        return f"answers differently: {what}"

    def to_json(self) -> dict[str, Any]:
        finite = self.worst_tie if math.isfinite(self.worst_tie) else None
        return {
            "ok": self.ok,
            "prompts": self.prompts,
            "same": self.same,
            "begun_differently": [_prompt(index) for index in self.begun_differently],
            "worst_tie": finite,
            "mean": self.mean,
            "says": self.describe(),
        }


def ask(url: str, model: str, *, chat: bool) -> list[Answer]:
    """The server's answer to every prompt. chat: whether the model has a chat template."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = [pool.submit(_chat if chat else _complete, url, model, text) for text in _CHATS]
        answers += [pool.submit(_complete, url, model, text) for text in _TEXTS]
        return [answer.result() for answer in answers]


def compare(reference: Sequence[Answer], candidate: Sequence[Answer]) -> Comparison:
    """Raises ValueError where there are not as many answers."""
    same = 0
    begun: list[int] = []
    ties: dict[int, float] = {}
    differences: list[float] = []
    for index, (left, right) in enumerate(zip(reference, candidate, strict=True)):
        steps = zip(left.tokens, right.tokens, left.top, right.top, strict=False)
        for position, (a, b, likely, likely_there) in enumerate(steps):
            if a != b:
                if position == 0:
                    begun.append(index)
                ties[index] = max(_gap(likely, a, b), _gap(likely_there, b, a))
                break
            if a in likely and a in likely_there:
                differences.append(abs(likely[a] - likely_there[a]))
        else:
            same += len(left.tokens) == len(right.tokens)
    mean = sum(differences) / len(differences) if differences else math.inf
    return Comparison(len(reference), same, tuple(begun), ties, len(differences), mean)


def write(path: Path, answers: Sequence[Answer]) -> None:
    path.write_text(json.dumps([asdict(answer) for answer in answers]))


def read(path: Path) -> list[Answer]:
    """Raises OSError, ValueError, KeyError or TypeError."""
    return [
        Answer(tuple(answer["tokens"]), tuple(dict(top) for top in answer["top"]))
        for answer in json.loads(path.read_bytes())
    ]


def tokens_per_second(url: str, model: str, rounds: int = 3) -> float:
    """Of _AT_ONCE streams at once, the best of `rounds`: whatever else the machine does only slows them."""
    rates = []
    for _ in range(rounds):
        begin = time.monotonic()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            bodies = [
                {"model": model, "prompt": text, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
                for text in _TEXTS[:_AT_ONCE]
            ]
            list(pool.map(lambda body: post(f"{url}/v1/completions", body), bodies))
        rates.append(_AT_ONCE * TOKENS / (time.monotonic() - begin))
    return max(rates)


def generates(url: str, model: str) -> bool:
    """Whether the server continues texts; one of embeddings, say, has no such route."""
    try:
        post(f"{url}/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1})
    except urllib.error.HTTPError as error:
        if error.code in (404, 405):
            return False
        raise
    return True


def has_chat(url: str, model: str) -> bool:
    """Whether the model has a chat template."""
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
    try:
        post(f"{url}/v1/chat/completions", body)
    except urllib.error.HTTPError:
        return False
    return True


def _prompt(index: int) -> str:
    return repr((*_CHATS, *_TEXTS)[index])


def _gap(likely: dict[str, float], chosen: str, other: str) -> float:
    """How much likelier the chosen token was than the other one; infinite where that is not known."""
    return likely[chosen] - likely[other] if {chosen, other} <= likely.keys() else math.inf


def _complete(url: str, model: str, prompt: str) -> Answer:
    body = {
        **{"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True},
        **{"logprobs": _TOP, "return_tokens_as_token_ids": True},
    }
    said = post(f"{url}/v1/completions", body)["choices"][0]["logprobs"]
    return Answer(tuple(said["tokens"]), tuple(said["top_logprobs"]))


def _chat(url: str, model: str, question: str) -> Answer:
    body = {
        **{"model": model, "messages": [{"role": "user", "content": question}]},
        **{"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True},
        **{"logprobs": True, "top_logprobs": _TOP, "return_tokens_as_token_ids": True},
    }
    said = post(f"{url}/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    return Answer(
        tuple(token["token"] for token in said),
        tuple({entry["token"]: entry["logprob"] for entry in token["top_logprobs"]} for token in said),
    )


def get(url: str) -> Any:
    """Raises as `post` does."""
    with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS) as answer:  # noqa: S310 - of ours
        return json.load(answer)


def post(url: str, body: dict[str, Any]) -> Any:
    """Raises urllib.error.HTTPError where the server refuses, OSError where none answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - of ours
    with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:  # noqa: S310
        return json.load(answer)
