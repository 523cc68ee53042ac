"""AWQ by llm-compressor, in a Python environment of its own, cached by digest.

llm-compressor pins other releases of transformers and compressed-tensors than vLLM does, so it gets an
environment that nothing else uses. The model is quantized by `awq_job.py`, which runs on that environment's
Python without network, tokens or the user's home.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder.calibration import Calibration
from builder.errors import BuildError, HostError, ModelError
from builder.models import ModelLock, ModelSnapshot
from builder.report import Reporter

# What decides the bytes of a result; everything else may be any release that these accept.
QUANTIZER_REQUIREMENTS = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",
    "tokenizers==0.23.3",
    "torch==2.13.0",
)

# Dense decoder-only text models whose norms and projections llm-compressor's AWQ knows how to pair.
SUPPORTED_ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    }
)
# Every one of them fits vLLM's Marlin kernels (CUDA) and its CPU kernel.
GROUP_SIZES = (128, 64, 32)
# Zero points halve the error of 4-bit groups (KL to the original 0.18 against 0.36 on SmolLM2), are what AWQ
# checkpoints usually have, and vLLM 0.32 runs them on the same kernels: Machete, Marlin and CPUWNA16.
SYMMETRIC = False

GIB = 1024**3
ENVIRONMENT_BYTES = 3 * GIB  # 1.5 with the CPU build of torch
SLACK_BYTES = GIB // 2
LOG_TAIL_LINES = 40
# Written last into an environment: a folder without it is what a killed build left.
COMPLETE_MARKER = "complete.json"

_JOB = Path(__file__).with_name("awq_job.py")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
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


@dataclass(frozen=True)
class AwqRecipe:
    """How the linear layers become 4-bit integers with 16-bit activations (W4A16).

    group_size: weights along the input features that share one scale; symmetric: no zero points;
    ignore: names of modules left as they are; calibration_samples blocks of calibration_tokens tokens each;
    calibration: "self" (the model's own answers, sampled with `seed`) or "sha256:…" of the user's documents.
    """

    group_size: int
    symmetric: bool
    ignore: tuple[str, ...]
    calibration_samples: int
    calibration_tokens: int
    seed: int
    calibration: str = "self"

    def canonical(self) -> bytes:
        return _canonical(asdict(self))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


def choose_recipe(
    config: Mapping[str, Any],
    *,
    samples: int = 16,
    tokens: int = 256,
    calibration: Calibration | None = None,
) -> AwqRecipe:
    """The recipe for a model, from its config.json alone.

    samples, tokens: calibration blocks and tokens in each. Raises ModelError for a model that is quantized
    already, is not a dense decoder-only text model known to work, or has shapes that no group size divides.
    """
    architecture = _supported_architecture(config)
    features = _input_features(config, architecture)
    for size in GROUP_SIZES:
        if all(count % size == 0 for count in features.values()):
            return AwqRecipe(
                group_size=size,
                symmetric=SYMMETRIC,
                ignore=("lm_head",),
                calibration_samples=samples,
                calibration_tokens=tokens,
                seed=0,
                calibration=f"sha256:{calibration.digest}" if calibration else "self",
            )
    shapes = ", ".join(f"{name} {count}" for name, count in features.items())
    raise ModelError(
        f"cannot quantize {architecture} with AWQ: {shapes}",
        why=f"No group size of {', '.join(map(str, GROUP_SIZES))} divides all of these input features.",
        fix="Build without --quantize.",
    )


def _supported_architecture(config: Mapping[str, Any]) -> str:
    architecture = (config.get("architectures") or ["(no architecture)"])[0]
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
        raise ModelError(
            f"the model is quantized already (quant_method {method})",
            why="AWQ starts from 16-bit or 32-bit weights.",
            fix="Build without --quantize: vLLM takes the method from config.json.",
        )
    experts = any((config.get(key) or 0) > 1 for key in _EXPERT_KEYS)
    if experts or re.search(r"moe|mixtral", architecture, re.IGNORECASE):
        raise ModelError(
            f"--quantize awq does not support the mixture-of-experts model {architecture}",
            why="Its experts need calibration of their own, and int4 experts do not run on every device.",
            fix="Build without --quantize, or name a checkpoint that its authors quantized.",
        )
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelError(
            f"--quantize awq does not support {architecture}",
            why=f"Supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}.",
            fix="Build without --quantize, or name a checkpoint that its authors quantized.",
        )
    return str(architecture)


def _input_features(config: Mapping[str, Any], architecture: str) -> dict[str, int]:
    """Input features of every linear layer that is quantized: q/k/v/gate/up, down and o projections."""
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        attention = heads * int(config.get("head_dim") or hidden // heads)
        return {
            "hidden_size": hidden,
            "intermediate_size": int(config["intermediate_size"]),
            "attention": attention,
        }
    except KeyError as missing:
        raise ModelError(
            f"config.json of this {architecture} has no {missing.args[0]}",
            why="AWQ's group size is chosen from the model's shapes.",
            fix="Check that the model is complete, or build without --quantize.",
        ) from None


def result_digest(lock: ModelLock, recipe: AwqRecipe) -> str:
    """sha256 (hex) of what a result is made from: lock, recipe, the quantizer's releases, its job."""
    made_from = {
        "lock": lock.digest,
        "recipe": asdict(recipe),
        "requirements": QUANTIZER_REQUIREMENTS,
        "job": hashlib.sha256(_JOB.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(_canonical(made_from)).hexdigest()


def environment_folder(cache: Path) -> Path:
    """Where the quantizer's environment is, or will be."""
    made_from = {"python": platform.python_version(), "requirements": QUANTIZER_REQUIREMENTS}
    return cache / "quantizer" / hashlib.sha256(_canonical(made_from)).hexdigest()


def finished_result(snapshot: ModelSnapshot, recipe: AwqRecipe, *, cache: Path) -> Path | None:
    """The folder that `quantize_awq` made earlier, if it did. Runs nothing."""
    folder = _result_folder(snapshot.lock, result_digest(snapshot.lock, recipe), cache.absolute())
    return folder if folder.is_dir() else None


def _result_folder(lock: ModelLock, digest: str, cache: Path) -> Path:
    return cache / "quantized" / digest / lock.name.rsplit("/", 1)[-1]


def quantize_awq(
    snapshot: ModelSnapshot,
    recipe: AwqRecipe,
    *,
    cache: Path,
    reporter: Reporter,
    calibration: Calibration | None = None,
) -> Path:
    """Quantizes a snapshot, or finds the result of an earlier run.

    Returns the folder `cache/quantized/<digest>/<model>`: compressed-tensors (pack-quantized) safetensors and
    config.json, and every other file of the snapshot unchanged. Raises HostError when disk space or Python's
    venv is missing, BuildError with the end of the log when pip or the quantization fails. Nothing unfinished
    stays behind.
    """
    cache = cache.absolute()
    digest = result_digest(snapshot.lock, recipe)
    finished = _result_folder(snapshot.lock, digest, cache)
    if not finished.is_dir():
        with _exclusive(cache / "quantized" / f"{digest}.lock", "this model is being quantized", reporter):
            if not finished.is_dir():
                _require_disk_space(snapshot.lock, cache)
                python = ensure_environment(cache, reporter)
                _quantize_into(finished, snapshot, recipe, calibration, python, reporter)
                return finished
    reporter.note(f"AWQ weights of {snapshot.lock.name} are in the cache ({digest[:12]}).")
    return finished


def _quantize_into(
    finished: Path,
    snapshot: ModelSnapshot,
    recipe: AwqRecipe,
    calibration: Calibration | None,
    python: Path,
    reporter: Reporter,
) -> None:
    partial = finished.parent.with_name(f".{finished.parent.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed: the lock says that it is ours
    try:
        work, result = partial / "work", partial / "result" / finished.name
        work.mkdir(parents=True)
        result.mkdir(parents=True)
        _run_job(snapshot, recipe, calibration, python, work, result, reporter)
        _copy_unquantized_files(snapshot, result)
        _make_readable(result.parent)
        result.parent.rename(finished.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_job(
    snapshot: ModelSnapshot,
    recipe: AwqRecipe,
    calibration: Calibration | None,
    python: Path,
    work: Path,
    result: Path,
    reporter: Reporter,
) -> None:
    job, log = work / "job.json", work / "awq.log"
    fields = {
        "model": str(snapshot.root.absolute()),
        "output": str(result),
        "recipe": asdict(recipe),
        "calibration": calibration.documents if calibration else None,
        "calibration_parquet": str(calibration.parquet) if calibration and calibration.parquet else None,
    }
    job.write_text(json.dumps(fields), encoding="utf-8")
    with reporter.task(f"Quantizing {snapshot.lock.name} with AWQ", 100, "percent") as task:
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
    if code != 0 or not (result / "config.json").is_file() or not list(result.glob("*.safetensors")):
        raise BuildError(
            f"quantizing {snapshot.lock.name} with AWQ failed",
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


def _require_disk_space(lock: ModelLock, cache: Path) -> None:
    needed = lock.total_bytes + SLACK_BYTES
    if not _is_complete(environment_folder(cache)):
        needed += ENVIRONMENT_BYTES
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise HostError(
            f"quantizing {lock.name} needs {needed / GIB:.1f} GiB of disk space in {cache}",
            why=f"{free / GIB:.1f} GiB are free.",
            fix="Free some space, or use a cache folder on another disk.",
        )


def _is_complete(environment: Path) -> bool:
    # bin/python is a link: it dangles when the Python that made the environment was removed.
    return (environment / COMPLETE_MARKER).is_file() and (environment / "bin" / "python").exists()


def ensure_environment(cache: Path, reporter: Reporter) -> Path:
    """The Python of the quantizer's environment, which is made first where there is none."""
    environment = environment_folder(cache)
    python = environment / "bin" / "python"
    with _exclusive(environment.with_suffix(".lock"), "the quantizer's environment is being made", reporter):
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
    # pip's own configuration (index, certificates, proxies) is the user's, as it is.
    env = {k: v for k, v in os.environ.items() if k not in _PIP_ELSEWHERE} | {"PIP_USER": "0"}
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


@contextmanager
def _exclusive(lock: Path, busy: str, reporter: Reporter) -> Iterator[None]:
    """Holds a file lock, and says whom it waits for. The file stays: deleting it would let two hold it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.note(f"Waiting: {busy} by another build.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
