"""Quantization by llm-compressor, in a Python environment of its own, measured, and cached by digest.

llm-compressor pins other releases of transformers and compressed-tensors than vLLM does, so it gets an
environment that nothing else uses. The model is quantized by `quantize_job.py`, which runs on that
environment's Python without network, tokens or the user's home.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from builder.architectures import VISION_LANGUAGE, is_vision
from builder.calibration import Calibration
from builder.errors import BuildError, HostError, ModelError
from builder.files import exclusive, finished_folder, require_space
from builder.methods import METHODS
from builder.models import SHARD_INDEX, ModelLock, ModelSnapshot
from builder.quantization_cost import has_memory_to_widen, require_memory
from builder.recipe import HELD_OUT_BLOCKS, Recipe
from builder.report import Reporter
from builder.shards import tensors_of, write_shards

# What decides the bytes of a result; everything else may be any release that these accept.
QUANTIZER_REQUIREMENTS = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",
    "tokenizers==0.23.3",
    "torch==2.13.0",
)

GIB = 1024**3
ENVIRONMENT_BYTES = 3 * GIB  # 1.5 with the CPU build of torch
# Several layers of an image are pulled at once, and a shard is the smallest piece that can be one. A smaller
# --max-shard-size is applied afterwards, so that results are shared whatever it is.
SHARD_BYTES = GIB
SLACK_BYTES = GIB // 2
LOG_TAIL_LINES = 40
# Written last into an environment: a folder without it is what a killed build left.
COMPLETE_MARKER = "complete.json"

_JOB = Path(__file__).with_name("quantize_job.py")
_MEASUREMENTS = "measurements.json"
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})

# The job needs no more of the user's environment than this. A list of what may pass cannot forget a token.
_JOB_VARIABLES = frozenset(
    {
        "PATH",
        "USER",
        "LOGNAME",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "LD_LIBRARY_PATH",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "NVIDIA_VISIBLE_DEVICES",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
    }
)
# These would make pip install somewhere else than into the environment whose Python runs it.
_PIP_ELSEWHERE = frozenset(
    {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_USER", "PYTHONUSERBASE"}
)


class Quality(BaseModel):
    """The quantized model against the original, on text that it was not calibrated on.

    top1_agreement: how often both find the same next token likeliest; mean_kl: in nats per token; tokens: how
    many were compared; measured_on: blocks of the user's file, or the original's own answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    perplexity_before: float
    perplexity_after: float
    top1_agreement: float
    mean_kl: float
    tokens: int
    measured_on: Literal["self", "file"]

    @property
    def perplexity_increase(self) -> float:
        return self.perplexity_after / self.perplexity_before - 1

    def describe(self) -> str:
        return (
            f"perplexity {self.perplexity_before:.3f} -> {self.perplexity_after:.3f} "
            f"({self.perplexity_increase:+.2%}), same next token {self.top1_agreement:.1%}, "
            f"KL {self.mean_kl:.4f} over {self.tokens} held-out tokens"
        )


class Measurements(BaseModel):
    """What the job found out about its own run: quality, cost, and the releases that did it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quality: Quality
    parameters: int
    seconds: float
    peak_memory_bytes: int
    peak_gpu_bytes: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Quantized:
    """A finished quantization: its folder of weights, the recipe, and what was measured when it was made."""

    folder: Path
    recipe: Recipe
    measurements: Measurements

    def to_json(self) -> dict[str, Any]:
        """The manifest's "quantization" object."""
        quality = self.measurements.quality
        return {
            **asdict(self.recipe),
            "ignore": list(self.recipe.ignore),
            "description": self.recipe.describe(),
            "format": METHODS[self.recipe.method].format,
            **self.measurements.model_dump(mode="json"),
            "quality": {
                **quality.model_dump(mode="json"),
                "perplexity_increase": quality.perplexity_increase,
            },
        }

    def require_quality(self, limit: float | None) -> None:
        """Raises ModelError where the perplexity rose by more than `limit`: 0.05 is five per cent."""
        quality = self.measurements.quality
        if limit is None or quality.perplexity_increase <= limit:
            return
        calibrated = METHODS[self.recipe.method].calibrated
        better = (
            "Raise --calibration-samples, give --calibration text like the model's use, or try" * calibrated
        )
        raise ModelError(
            f"quantizing with {METHODS[self.recipe.method].title} raised perplexity by "
            f"{quality.perplexity_increase:.2%}, more than --max-perplexity-increase {limit:.2%}",
            why=f"{quality.describe()}.",
            fix=f"{better or 'Try'} another method, or allow more: the result is kept and not made again.",
        )


def result_digest(lock: ModelLock, recipe: Recipe) -> str:
    """sha256 (hex) of what a result is made from: lock, recipe, the quantizer's releases, its job, shards."""
    made_from = {
        "lock": lock.digest,
        "recipe": asdict(recipe),
        "modifiers": recipe.modifiers(),
        "requirements": QUANTIZER_REQUIREMENTS,
        "max_shard_bytes": SHARD_BYTES,
        "job": hashlib.sha256(_JOB.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(_canonical(made_from)).hexdigest()


def environment_folder(cache: Path) -> Path:
    """Where the quantizer's environment is, or will be."""
    made_from = {"python": platform.python_version(), "requirements": QUANTIZER_REQUIREMENTS}
    return cache / "quantizer" / hashlib.sha256(_canonical(made_from)).hexdigest()


def finished_result(snapshot: ModelSnapshot, recipe: Recipe, *, cache: Path) -> Quantized | None:
    """What `quantize` made earlier, if it did. Runs nothing."""
    folder = _result_folder(snapshot.lock, result_digest(snapshot.lock, recipe), cache.absolute())
    return _read(folder, recipe) if folder.is_dir() else None


def _result_folder(lock: ModelLock, digest: str, cache: Path) -> Path:
    return cache / "quantized" / digest / lock.name.rsplit("/", 1)[-1]


def _read(folder: Path, recipe: Recipe) -> Quantized:
    measurements = (folder.parent / _MEASUREMENTS).read_bytes()
    return Quantized(folder, recipe, Measurements.model_validate_json(measurements))


def quantize(
    snapshot: ModelSnapshot,
    recipe: Recipe,
    *,
    cache: Path,
    reporter: Reporter,
    calibration: Calibration | None = None,
) -> Quantized:
    """Quantizes a snapshot and measures the loss, or finds the result of an earlier run.

    The folder `cache/quantized/<digest>/<model>` holds compressed-tensors safetensors and config.json, and
    every other file of the snapshot unchanged; beside it lies what was measured. Raises HostError when
    memory, disk space or Python's venv is missing, BuildError with the end of the log when pip or the
    quantization fails. Nothing unfinished stays behind.
    """
    cache = cache.absolute()
    digest = result_digest(snapshot.lock, recipe)
    finished = _result_folder(snapshot.lock, digest, cache)
    if not finished.is_dir():
        with exclusive(cache / "quantized" / f"{digest}.lock", "this model is being quantized", reporter):
            if not finished.is_dir():
                require_memory(snapshot.lock, recipe)
                _require_disk_space(snapshot, cache)
                python = ensure_environment(cache, reporter)
                _quantize_into(finished, snapshot, recipe, calibration, python, reporter)
                return _read(finished, recipe)
    title = METHODS[recipe.method].title
    reporter.note(f"{title} weights of {snapshot.lock.name} are in the cache ({digest[:12]}).")
    return _read(finished, recipe)


def _quantize_into(
    finished: Path,
    snapshot: ModelSnapshot,
    recipe: Recipe,
    calibration: Calibration | None,
    python: Path,
    reporter: Reporter,
) -> None:
    with finished_folder(finished.parent) as partial:
        work, result = partial / ".work", partial / finished.name
        work.mkdir()
        result.mkdir()
        _run_job(snapshot, recipe, calibration, python, work, result, reporter)
        if _vision(snapshot):
            _add_vision(snapshot, result, work, reporter)
        _copy_unquantized_files(snapshot, result)
        (work / _MEASUREMENTS).rename(partial / _MEASUREMENTS)
        shutil.rmtree(work)
        _make_readable(partial)


def _run_job(
    snapshot: ModelSnapshot,
    recipe: Recipe,
    calibration: Calibration | None,
    python: Path,
    work: Path,
    result: Path,
    reporter: Reporter,
) -> None:
    title = METHODS[recipe.method].title
    job, log = work / "job.json", work / "job.log"
    fields = {
        "model": str(snapshot.root.absolute()),
        "output": str(result),
        "measurements": str(work / _MEASUREMENTS),
        "recipe": asdict(recipe),
        "modifiers": recipe.modifiers(),
        "vision": _vision(snapshot),
        "max_shard_bytes": SHARD_BYTES,
        "held_out_blocks": HELD_OUT_BLOCKS,
        "may_widen": has_memory_to_widen(snapshot.lock, recipe),
        "calibration": calibration.documents if calibration else None,
        "calibration_parquet": str(calibration.parquet) if calibration and calibration.parquet else None,
    }
    job.write_text(json.dumps(fields), encoding="utf-8")
    with reporter.task(f"Quantizing {snapshot.lock.name} with {title}", 100, "percent") as task:
        done = 0

        def on_line(line: str) -> bool:
            nonlocal done
            progress = _progress(line)
            if progress is None:
                return False
            fraction, detail = progress
            percent = max(done, min(100, int(fraction * 100)))
            task.advance(percent - done)
            task.detail(detail)
            done = percent
            return True

        # -I: neither this folder's modules nor the user's site-packages can be imported by the job.
        command = [str(python), "-I", str(_JOB), str(job)]
        code = _run(command, cwd=work, env=job_environment(os.environ, work), log=log, on_line=on_line)
    whole = (result / "config.json").is_file() and list(result.glob("*.safetensors"))
    if code != 0 or not whole or not (work / _MEASUREMENTS).is_file():
        raise BuildError(
            f"quantizing {snapshot.lock.name} with {title} failed",
            why=_ending(code),
            fix="Build without --quantize, or report this with the log.",
            log=_tail(log),
        )


def _progress(line: str) -> tuple[float, str] | None:
    try:
        message = json.loads(line)
        return float(message["progress"]), str(message["detail"])
    except (ValueError, TypeError, KeyError):
        return None


def job_environment(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """The job's variables: what computing needs of the user's, no token, no network, a home of its own."""
    folder = str(home)
    return {name: value for name, value in environ.items() if name in _JOB_VARIABLES} | {
        "HOME": folder,
        "TMPDIR": folder,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        # On a machine without a GPU llm-compressor warns about that many times per layer.
        "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    }


def _vision(snapshot: ModelSnapshot) -> tuple[str, ...]:
    """The modules that a vision-language model sees with; none of a text model."""
    model = VISION_LANGUAGE.get(next(iter(snapshot.lock.architectures), ""))
    return model.vision if model else ()


def _add_vision(snapshot: ModelSnapshot, result: Path, work: Path, reporter: Reporter) -> None:
    """The vision part's tensors as the model has them, beside those that the job wrote."""
    (result / SHARD_INDEX).unlink(missing_ok=True)
    written = [path.rename(work / path.name) for path in sorted(result.glob("*.safetensors"))]
    original = [snapshot.root / file.path for file in snapshot.lock.files if file.is_shard]
    vision = [
        tensor
        for path in original
        for tensor in tensors_of(path)
        if is_vision(tensor.name, snapshot.lock.architectures[0])
    ]
    if not vision:
        raise ModelError(
            f"{snapshot.lock.name} has no tensor of its {' or '.join(_vision(snapshot))}",
            why="Without these the quantized model could not see.",
            fix="Name the repository of its authors, or build without --quantize.",
        )
    text = [tensor for path in written for tensor in tensors_of(path)]
    write_shards(result, [*text, *vision], SHARD_BYTES, reporter)


def _copy_unquantized_files(snapshot: ModelSnapshot, result: Path) -> None:
    """Tokenizer, chat template, generation config: the model's own bytes, not rewritten by a library."""
    for file in snapshot.lock.files:
        is_weight = Path(file.path).suffix in _WEIGHT_SUFFIXES or file.path.endswith(".index.json")
        if is_weight or file.path == "config.json":
            continue
        target = result / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot.root / file.path, target)


def _make_readable(folder: Path) -> None:
    """safetensors writes files that only their owner may read; the image's user is another one."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _require_disk_space(snapshot: ModelSnapshot, cache: Path) -> None:
    needed = snapshot.lock.total_bytes + SLACK_BYTES
    if not _is_complete(environment_folder(cache)):
        needed += ENVIRONMENT_BYTES
    require_space(
        cache,
        needed,
        what=f"quantizing {snapshot.lock.name} needs",
        fix="Free some, or set COLDSTART_CACHE to a larger disk.",
    )


def _is_complete(environment: Path) -> bool:
    # bin/python is a link: it dangles when the Python that made the environment was removed.
    return (environment / COMPLETE_MARKER).is_file() and (environment / "bin" / "python").exists()


def ensure_environment(cache: Path, reporter: Reporter) -> Path:
    """The Python of the quantizer's environment, which is made first where there is none."""
    environment = environment_folder(cache)
    python = environment / "bin" / "python"
    with exclusive(environment.with_suffix(".lock"), "the quantizer's environment is being made", reporter):
        if _is_complete(environment):
            return python
        # A virtual environment holds its own path, so it cannot be made elsewhere and renamed into place.
        shutil.rmtree(environment, ignore_errors=True)
        try:
            _make_environment(environment, python, reporter)
        except BaseException:
            shutil.rmtree(environment, ignore_errors=True)
            raise
    return python


def _make_environment(environment: Path, python: Path, reporter: Reporter) -> None:
    environment.mkdir(parents=True)
    log = environment / "install.log"
    # pip's own configuration (index, certificates, proxies) is the user's, as it is. The hub's token is not
    # for it: a package's setup may run code.
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _PIP_ELSEWHERE and not name.startswith(("HF_", "HUGGING"))
    } | {"PIP_USER": "0"}
    with reporter.task("Installing the quantizer", None, "packages") as task:

        def on_line(line: str) -> bool:
            if line.startswith("Collecting "):
                task.advance(1)
                task.detail(line.split()[1])
            elif line.startswith("Installing collected packages"):
                task.detail("unpacking")
            return False

        task.detail("virtual environment")
        venv = [sys.executable, "-I", "-m", "venv", str(environment)]
        code = _run(venv, cwd=environment, env=env, log=log, on_line=on_line)
        if code != 0:
            raise HostError(
                f"{sys.executable} cannot make a virtual environment",
                why=_tail(log, lines=6),
                fix="Install Python's venv module (Debian and Ubuntu: apt install python3-venv).",
            )
        pip = [str(python), "-I", "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        code = _run([*pip, *QUANTIZER_REQUIREMENTS], cwd=environment, env=env, log=log, on_line=on_line)
    if code != 0:
        raise BuildError(
            "cannot install the quantizer",
            why=f"pip install {' '.join(QUANTIZER_REQUIREMENTS)}: {_ending(code)}",
            fix="Check pip's configuration (index, proxy, certificates) and the network, then build again.",
            log=_tail(log),
        )
    (environment / COMPLETE_MARKER).write_text(json.dumps(QUANTIZER_REQUIREMENTS), encoding="utf-8")


def _run(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], bool],
) -> int:
    """Runs a command and returns its exit code (negative: the signal that ended it).

    Each line of its stdout goes to `on_line`, and to the log like stderr unless that returns True. It has a
    process group of its own, which does not outlive this call: not on an error and not on Ctrl-C.
    """
    with log.open("a", encoding="utf-8") as sink:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=sink,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if not on_line(line):
                    sink.write(line)
                    sink.flush()
            return process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            process.stdout.close()


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "It was killed, most likely because memory ran out."
    if code < 0:
        return f"It was ended by {signal.Signals(-code).name}."
    return f"Exit code {code}." if code else "It left no weights behind."


def _tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
