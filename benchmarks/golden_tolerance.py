"""How much do right implementations differ? The limits of runtime/golden.py come from this.

    python -m benchmarks.golden_tolerance IMAGE RESULT.json

IMAGE is a CPU image of ours. Its golden prompts are answered by six starts: in bf16 and in float32 each
eager; eager with one request at a time, so that only the batches differ; compiled. Every pair is compared,
and what the same engine does to itself is what rounding alone does.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import describe_machine
from builder.docker_engine import DockerEngine
from runtime.golden import Answer, compare

_READY_SECONDS = 900
_COMPILED = ("--no-enforce-eager",)
_STARTS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("eager", ("--dtype", "auto"), 8),
    ("eager, one at a time", ("--dtype", "auto"), 1),
    ("eager-float32", ("--dtype", "float32"), 8),
    ("eager-float32, one at a time", ("--dtype", "float32"), 1),
    ("compiled", (*_COMPILED, "--dtype", "auto"), 8),
    ("compiled-float32", (*_COMPILED, "--dtype", "float32"), 8),
)
# Inside the image, with the image's own runtime.
_ASK = """
import json, sys
from dataclasses import asdict
from runtime import golden
golden._AT_ONCE = int(sys.argv[1])
url = "http://127.0.0.1:8000"
model = golden.get(f"{url}/v1/models")["data"][0]["id"]
answers = golden.ask(url, model, chat=golden.has_chat(url, model))
print(json.dumps([asdict(answer) for answer in answers]))
"""


def answers(engine: DockerEngine, image: str, arguments: Sequence[str], at_once: int) -> list[Answer]:
    environment = {"TORCH_COMPILE_DISABLE": "0"} if _COMPILED[0] in arguments else {}
    container = engine.start(
        image,
        arguments=["--off", "recording", *arguments],
        network="none",
        publish=False,
        environment=environment,
    )
    try:
        if not container.wait_for(["python3", "-m", "runtime", "health"], _READY_SECONDS):
            raise SystemExit(container.logs()[-2000:])
        code, output = container.run(["python3", "-c", _ASK, str(at_once)])
        if code:
            raise SystemExit(output)
        said = json.loads(output.strip().splitlines()[-1])
        return [Answer(tuple(answer["tokens"]), tuple(answer["top"])) for answer in said]
    finally:
        container.remove()


def describe(left: Sequence[Answer], right: Sequence[Answer]) -> dict[str, Any]:
    """What runtime.golden.compare finds, with every tie kept: natural logarithms, largest first."""
    found = compare(left, right)
    return {
        "prompts": found.prompts,
        "same": found.same,
        "begun_differently": len(found.begun_differently),
        "tokens_compared": found.tokens,
        "mean": round(found.mean, 5),
        "ties": sorted((round(tie, 4) for tie in found.ties.values()), reverse=True),
    }


def main(image: str, result: Path) -> None:
    engine = DockerEngine()
    made = {name: answers(engine, image, arguments, at_once) for name, arguments, at_once in _STARTS}
    pairs = [
        {"left": left, "right": right, **describe(made[left], made[right])}
        for left, right in itertools.combinations(made, 2)
    ]
    time = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine(engine.version).model_dump()
    data = {"schema": 1, "image": image, "machine": machine, "time": time, "pairs": pairs}
    result.write_text(json.dumps(data, indent=1) + "\n")
    for pair in pairs:
        print(
            f"{pair['left']:28} {pair['right']:28} same {pair['same']:2} "
            f"begun differently {pair['begun_differently']} mean {pair['mean']:.4f} ties {pair['ties'][:3]}"
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
