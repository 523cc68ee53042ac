"""What does float32 cost on this CPU, and what does it give? A 16-bit model in its own dtype and in float32.

    python -m benchmarks.dtypes IMAGE RESULT.json [--rounds 6]

IMAGE is a CPU image of ours, of a model in 16 bits. It is started eager and without a recording, in both
dtypes in turn. Each start is asked for one token after a long prompt, for one stream, and for eight at once.
Prints the medians and their ratios, float32's over the other's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.harness import describe_machine
from benchmarks.stats import ratio_of_medians
from builder.docker_engine import DockerEngine

_READY_SECONDS = 900
_DTYPES = ("auto", "float32")
_UNITS = {"ready": "s", "long_prompt": "s", "one_stream": "tokens/s", "eight_streams": "tokens/s"}
# Inside the image, with the image's own runtime. The first request is no measurement: much happens once.
_MEASURE = """
import json, time
from runtime import golden
url = "http://127.0.0.1:8000"
model = golden.get(f"{url}/v1/models")["data"][0]["id"]
def seconds(prompt, tokens):
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    begun = time.monotonic()
    used = golden.post(f"{url}/v1/completions", body)["usage"]
    return time.monotonic() - begun, used["prompt_tokens"]
seconds("Hello", 1)
long, length = seconds("one two three four " * 300, 1)
print(json.dumps({
    "ready": golden.get(f"{url}/startup")["elapsed"],
    "long_prompt": long,
    "long_prompt_tokens": length,
    "one_stream": golden.TOKENS / seconds("Once upon a time", golden.TOKENS)[0],
    "eight_streams": golden.tokens_per_second(url, model),
}))
"""


def measure(engine: DockerEngine, image: str, dtype: str) -> dict[str, float]:
    """One start: seconds to ready and of the long prompt, tokens a second of one stream and of eight."""
    arguments = ["--off", "recording", "--dtype", dtype]
    container = engine.start(image, arguments=arguments, network="none", publish=False)
    try:
        if not container.wait_for(["python3", "-m", "runtime", "health"], _READY_SECONDS):
            raise SystemExit(container.logs()[-2000:])
        code, output = container.run(["python3", "-c", _MEASURE])
        if code:
            raise SystemExit(output)
        found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
        return found
    finally:
        container.remove()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("image")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args(argv)
    engine = DockerEngine()
    samples: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in _DTYPES}
    for number in range(asked.rounds):
        for dtype in _DTYPES[:: 1 if number % 2 == 0 else -1]:
            samples[dtype].append(measure(engine, asked.image, dtype))
            print(number, dtype, samples[dtype][-1], flush=True)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    machine = describe_machine(engine.version).model_dump()
    data = {"schema": 1, "image": asked.image, "machine": machine, "time": time, "samples": samples}
    asked.result.write_text(json.dumps(data, indent=1) + "\n")
    for name, unit in _UNITS.items():
        own, wide = ([start[name] for start in samples[dtype]] for dtype in _DTYPES)
        ratio = ratio_of_medians(wide, own)
        low, high = ratio.interval or (ratio.value, ratio.value)
        print(f"{name:14} {median(own):7.2f} {median(wide):7.2f} {unit:9}", end=" ")
        print(f"{ratio.value:.2f} ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
