from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builder import quantize as quantizing
from builder.errors import BuildError, HostError, ModelError
from builder.models import LockedFile, ModelSnapshot, parse_ref, resolve
from builder.plan import BaseImage, make_plan
from builder.quantize import (
    COMPLETE_MARKER,
    environment_folder,
    finished_result,
    job_environment,
    quantize,
    result_digest,
)
from builder.recipe import Recipe
from builder.report import SilentReporter, Task
from builder.spec import ImageSpec
from tests.models import write_model

RECIPE = Recipe("awq", 64, False, ("lm_head",), 16, 256, 0)
MEASUREMENTS: dict[str, Any] = {
    "quality": {
        "perplexity_before": 10.0,
        "perplexity_after": 10.5,
        "top1_agreement": 0.9,
        "mean_kl": 0.02,
        "tokens": 2040,
        "measured_on": "self",
    },
    "parameters": 1000,
    "seconds": 1.5,
    "peak_memory_bytes": 10**9,
    "peak_gpu_bytes": None,
    "versions": {"llmcompressor": "0.14.0.1"},
}

# Stands in for the job: leaves what a finished job leaves, and a line that is no progress.
WRITES_A_RESULT = f"""
import json, pathlib, sys
job = json.loads(pathlib.Path(sys.argv[-1]).read_text())
output = pathlib.Path(job["output"])
print(json.dumps({{"progress": 0.5, "detail": "layer 1 of 2"}}), flush=True)
print("a library says hello", flush=True)
(output / "config.json").write_text(json.dumps({{"quantization_config": job["recipe"]}}))
(output / "model.safetensors").write_bytes(b"int4")
(output / "model.safetensors").chmod(0o600)
pathlib.Path(job["measurements"]).write_text({json.dumps(MEASUREMENTS)!r})
print(json.dumps({{"progress": 1.0, "detail": "done"}}), flush=True)
"""


class RecordingReporter(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int | None, str]] = []
        self.details: list[str] = []
        self.amounts: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, amount: int) -> None:
        self.amounts.append(amount)

    def detail(self, text: str) -> None:
        self.details.append(text)

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "bytes") -> Iterator[Task]:
        self.tasks.append((title, total, unit))
        yield self


@pytest.fixture
def snapshot(tmp_path: Path) -> ModelSnapshot:
    return resolve(parse_ref(str(write_model(tmp_path / "tiny"))), SilentReporter())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _prepared_environment(cache: Path, script: str) -> None:
    """A complete environment whose "Python" runs `script` whatever it is asked to run."""
    environment = environment_folder(cache)
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{script}")
    python.chmod(0o755)
    (environment / COMPLETE_MARKER).write_text("[]")


def _left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "quantized").iterdir() if path.suffix != ".lock")


def test_recipe_has_stable_canonical_bytes() -> None:
    assert RECIPE.canonical() == (
        b'{"calibration":"self","calibration_samples":16,"calibration_tokens":256,"group_size":64,'
        b'"ignore":["lm_head"],"method":"awq","seed":0,"symmetric":false}'
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "gptq"},
        {"group_size": 32},
        {"symmetric": True},
        {"ignore": ()},
        {"calibration_samples": 8},
        {"calibration_tokens": 128},
        {"seed": 1},
    ],
)
def test_result_digest_depends_on_every_field_of_the_recipe(
    snapshot: ModelSnapshot, changed: dict[str, Any]
) -> None:
    other = dataclasses.replace(RECIPE, **changed)
    assert other.digest != RECIPE.digest
    assert result_digest(snapshot.lock, other) != result_digest(snapshot.lock, RECIPE)


def test_result_digest_depends_on_the_model_and_the_quantizer(
    snapshot: ModelSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = result_digest(snapshot.lock, RECIPE)
    assert result_digest(snapshot.lock, RECIPE) == digest
    assert result_digest(snapshot.lock.model_copy(update={"revision": "abc"}), RECIPE) != digest
    monkeypatch.setattr(quantizing, "SHARD_BYTES", 1 << 20)
    split = result_digest(snapshot.lock, RECIPE)
    assert split != digest
    monkeypatch.setattr(quantizing, "QUANTIZER_REQUIREMENTS", ("llmcompressor==9.9",))
    assert result_digest(snapshot.lock, RECIPE) not in (digest, split)


def test_cached_result_is_returned_and_nothing_runs(snapshot: ModelSnapshot, cache: Path) -> None:
    assert finished_result(snapshot, RECIPE, cache=cache) is None
    folder = cache / "quantized" / result_digest(snapshot.lock, RECIPE) / "tiny"
    folder.mkdir(parents=True)
    (folder.parent / "measurements.json").write_text(json.dumps(MEASUREMENTS))
    reporter = RecordingReporter()
    done = quantize(snapshot, RECIPE, cache=cache, reporter=reporter)
    assert done.folder == folder
    assert done == finished_result(snapshot, RECIPE, cache=cache)
    assert done.measurements.model_dump(mode="json") == MEASUREMENTS
    assert "in the cache" in reporter.notes[0]
    assert not (cache / "quantizer").exists()


def test_result_has_the_new_weights_and_the_models_own_small_files(
    snapshot: ModelSnapshot, cache: Path
) -> None:
    _prepared_environment(cache, WRITES_A_RESULT)
    reporter = RecordingReporter()
    done = quantize(snapshot, RECIPE, cache=cache, reporter=reporter)
    folder = done.folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "tokenizer.json").read_bytes() == (snapshot.root / "tokenizer.json").read_bytes()
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"] == 64
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert {path.name for path in folder.parent.iterdir()} == {"tiny", "measurements.json"}
    assert _left_behind(cache) == [result_digest(snapshot.lock, RECIPE)]
    assert reporter.tasks == [("Quantizing tiny with AWQ", 100, "percent")]
    assert (reporter.details, sum(reporter.amounts)) == (["layer 1 of 2", "done"], 100)


# As WRITES_A_RESULT, with a shard that has one tensor, t, of four bytes.
WRITES_A_SHARD = WRITES_A_RESULT.replace(
    'b"int4"',
    "(lambda h: len(h).to_bytes(8, 'little') + h + b'int4')"
    '(json.dumps({"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode())',
)


def test_vision_part_is_added_byte_for_byte(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepared_environment(cache, WRITES_A_SHARD)
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "llama"}}
    folder = write_model(tmp_path / "seeing", config=config)
    weights = {"vision_tower.a": np.arange(9.0), "model.multi_modal_projector.b": np.ones(3, np.float16)}
    save_file({**weights, "language_model.vision_tower_like": np.zeros(2)}, folder / "model.safetensors")
    snapshot = resolve(parse_ref(str(folder)), SilentReporter())
    done = quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    (shard,) = done.folder.glob("*.safetensors")
    found = load_file(shard)
    assert set(found) == {"t", *weights}
    assert found["t"].tobytes() == b"int4"
    for name, tensor in weights.items():
        assert (found[name].dtype, found[name].tobytes()) == (tensor.dtype, tensor.tobytes())
    index = json.loads((done.folder / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == dict.fromkeys(found, shard.name)
    monkeypatch.setattr(quantizing, "SHARD_BYTES", 16)
    done = quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    shards = [load_file(path) for path in done.folder.glob("*.safetensors")]
    assert len(shards) == 3  # the nine numbers, larger than one, between 4 and 6 bytes
    assert set().union(*shards) == set(found)


def test_model_without_what_it_sees_with_is_refused(cache: Path, tmp_path: Path) -> None:
    _prepared_environment(cache, WRITES_A_SHARD)
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "llama"}}
    folder = write_model(tmp_path / "blind", config=config)
    with pytest.raises(ModelError, match="blind has no tensor of its vision_tower or multi_modal_projector"):
        quantize(
            resolve(parse_ref(str(folder)), SilentReporter()),
            RECIPE,
            cache=cache,
            reporter=SilentReporter(),
        )
    assert _left_behind(cache) == []


def test_job_is_told_how_large_a_shard_may_be(
    snapshot: ModelSnapshot, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _prepared_environment(cache, WRITES_A_RESULT.replace('job["recipe"]', 'job["max_shard_bytes"]'))
    monkeypatch.setattr(quantizing, "SHARD_BYTES", 1234)
    done = quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    assert json.loads((done.folder / "config.json").read_text())["quantization_config"] == 1234


def test_manifest_says_recipe_quality_and_cost(snapshot: ModelSnapshot, cache: Path) -> None:
    _prepared_environment(cache, WRITES_A_RESULT)
    done = quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    said = json.loads(json.dumps(done.to_json()))
    assert (said["method"], said["format"], said["group_size"], said["ignore"]) == (
        "awq",
        "int4",
        64,
        ["lm_head"],
    )
    assert said["quality"]["perplexity_increase"] == pytest.approx(0.05)
    assert (said["seconds"], said["peak_memory_bytes"]) == (1.5, 10**9)
    plan = make_plan(ImageSpec(model="tiny"), snapshot.lock, BaseImage("base", None, "cpu"), said)
    assert plan.manifest["quantization"] == said
    labels = dict(plan.labels)
    assert labels["dev.coldstart.quantization.perplexity-increase"] == "0.0500"
    assert "dev.coldstart.quantization.same-next-token" in labels
    assert labels["dev.coldstart.quantization.method"] == "awq"
    assert "groups of 64, asymmetric" in labels["dev.coldstart.quantization.recipe"]


def test_too_great_a_loss_is_refused_and_the_result_kept(snapshot: ModelSnapshot, cache: Path) -> None:
    _prepared_environment(cache, WRITES_A_RESULT)
    done = quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    done.require_quality(None)
    done.require_quality(0.0501)
    with pytest.raises(ModelError, match=r"raised perplexity by 5\.00%.* 4\.00%.*--calibration-samples"):
        done.require_quality(0.04)
    assert finished_result(snapshot, RECIPE, cache=cache) == done
    uncalibrated = dataclasses.replace(done, recipe=dataclasses.replace(RECIPE, method="rtn"))
    with pytest.raises(ModelError, match=r"Try another method"):
        uncalibrated.require_quality(0)


def test_failing_job_shows_its_log_and_leaves_nothing(snapshot: ModelSnapshot, cache: Path) -> None:
    _prepared_environment(cache, WRITES_A_RESULT + "raise RuntimeError('scales are NaN')")
    with pytest.raises(BuildError, match=r"quantizing tiny with AWQ failed Exit code 1\.") as failed:
        quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    assert "a library says hello" in failed.value.log
    assert "RuntimeError: scales are NaN" in failed.value.log
    assert _left_behind(cache) == []


def test_killed_job_is_reported_as_out_of_memory(snapshot: ModelSnapshot, cache: Path) -> None:
    _prepared_environment(cache, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(BuildError, match="memory ran out"):
        quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())


def test_job_that_leaves_no_weights_is_a_failure(snapshot: ModelSnapshot, cache: Path) -> None:
    _prepared_environment(cache, "pass")
    with pytest.raises(BuildError, match="no weights"):
        quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    assert _left_behind(cache) == []


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as in a terminal; a shell has what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_job_and_its_children(snapshot: ModelSnapshot, cache: Path, tmp_path: Path) -> None:
    _prepared_environment(
        cache,
        f"""
import json, os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "60"])
pathlib.Path({str(tmp_path / "pids")!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
print(json.dumps({{"progress": 0.1, "detail": "layer 1 of 30"}}), flush=True)
time.sleep(60)
""",
    )

    class Interrupting(RecordingReporter):
        def detail(self, text: str) -> None:
            super().detail(text)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        quantize(snapshot, RECIPE, cache=cache, reporter=Interrupting())
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 5
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_running, pids))
    assert _left_behind(cache) == []


def test_rest_of_a_killed_build_is_replaced(snapshot: ModelSnapshot, cache: Path) -> None:
    _prepared_environment(cache, WRITES_A_RESULT)
    rest = cache / "quantized" / f".{result_digest(snapshot.lock, RECIPE)}.partial" / "result"
    rest.mkdir(parents=True)
    quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    assert not rest.exists()


def test_job_that_measured_nothing_is_a_failure(snapshot: ModelSnapshot, cache: Path) -> None:
    lines = [line for line in WRITES_A_RESULT.splitlines() if "measurements" not in line]
    _prepared_environment(cache, "\n".join(lines))
    with pytest.raises(BuildError, match="failed"):
        quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    assert _left_behind(cache) == []


def _write_limit(limit: int) -> str:
    """Python that makes every further write past `limit` bytes of a file fail, as a full disk does."""
    return (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    )


def test_disk_that_fills_in_the_job_leaves_nothing(snapshot: ModelSnapshot, cache: Path) -> None:
    bigger = WRITES_A_RESULT.replace('b"int4"', "bytes(100_000)")
    _prepared_environment(cache, _write_limit(50_000) + bigger)
    with pytest.raises(BuildError, match="failed") as failed:
        quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    assert "File too large" in failed.value.log
    assert _left_behind(cache) == []
    assert finished_result(snapshot, RECIPE, cache=cache) is None


def test_disk_that_fills_after_the_job_is_told_and_leaves_nothing(
    snapshot: ModelSnapshot, cache: Path
) -> None:
    _prepared_environment(cache, WRITES_A_RESULT)
    (snapshot.root / "tokenizer.json").write_bytes(bytes(100_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(HostError, match=r"cannot finish .*File too large"):
            quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert _left_behind(cache) == []


def test_killed_build_is_not_taken_for_whole(snapshot: ModelSnapshot, cache: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    waits = f"import time; pathlib.Path({str(written)!r}).touch(); time.sleep(60)\n"
    _prepared_environment(cache, WRITES_A_RESULT + waits)
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_quantize import *; "
        "quantize(resolve(parse_ref(sys.argv[1]), SilentReporter()), RECIPE, "
        "cache=Path(sys.argv[2]), reporter=SilentReporter())"
    )
    root = Path(__file__).parents[2]
    build = subprocess.Popen(
        [sys.executable, "-c", code, str(snapshot.root), str(cache)],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
    )
    deadline = time.monotonic() + 60
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    build.kill()
    build.wait()
    assert any(path.name.endswith(".partial") for path in (cache / "quantized").iterdir())
    assert finished_result(snapshot, RECIPE, cache=cache) is None
    shutil.rmtree(environment_folder(cache))
    _prepared_environment(cache, WRITES_A_RESULT)
    done = quantize(snapshot, RECIPE, cache=cache, reporter=SilentReporter())
    assert _left_behind(cache) == [done.folder.parent.name]


def test_two_builds_at_once_quantize_once(snapshot: ModelSnapshot, cache: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    _prepared_environment(
        cache, f"import time; open({str(ran)!r}, 'a').write('x'); time.sleep(0.5)\n{WRITES_A_RESULT}"
    )
    reporters = [RecordingReporter(), RecordingReporter()]
    threads = [
        threading.Thread(target=quantize, args=(snapshot, RECIPE), kwargs={"cache": cache, "reporter": r})
        for r in reporters
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran.read_text() == "x"
    assert [note for r in reporters for note in r.notes if note.startswith("Waiting")]


def test_job_sees_no_token_and_no_network(snapshot: ModelSnapshot, cache: Path, tmp_path: Path) -> None:
    seen = job_environment(
        {
            "PATH": "/usr/bin",
            "CUDA_VISIBLE_DEVICES": "1",
            "HF_TOKEN": "hf_secret",
            "HUGGING_FACE_HUB_TOKEN": "hf_secret",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "NVIDIA_API_KEY": "secret",
            "HF_HOME": "/home/user/hf",
            "PYTHONPATH": "/home/user/lib",
        },
        tmp_path,
    )
    assert not [name for name, value in seen.items() if "secret" in value or "/home/user" in value]
    assert (seen["PATH"], seen["CUDA_VISIBLE_DEVICES"], seen["HOME"]) == ("/usr/bin", "1", str(tmp_path))
    assert (seen["HF_HUB_OFFLINE"], seen["TRANSFORMERS_OFFLINE"]) == ("1", "1")


def test_too_little_disk_space_is_said_before_anything_starts(snapshot: ModelSnapshot, cache: Path) -> None:
    huge = LockedFile(path="model.safetensors", size=10**18, sha256="0" * 64)
    lock = snapshot.lock.model_copy(update={"files": (huge,)})
    with pytest.raises(HostError, match=r"quantizing tiny needs 100000000\d\.\d GB"):
        quantize(ModelSnapshot(lock, snapshot.root), RECIPE, cache=cache, reporter=SilentReporter())
    assert not environment_folder(cache).exists()


def _wheel(folder: Path) -> Path:
    """A distribution that pip can install without any index."""
    path = folder / "stand_in-1.0-py3-none-any.whl"
    info = "stand_in-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("stand_in.py", "VALUE = 41\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_environment_is_made_once_and_an_unfinished_one_is_replaced(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "QUANTIZER_REQUIREMENTS", (str(_wheel(tmp_path)),))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    unfinished = environment_folder(cache) / "lib" / "half"
    unfinished.mkdir(parents=True)
    first = RecordingReporter()
    python = quantizing.ensure_environment(cache, first)
    assert not unfinished.exists()
    assert not (tmp_path / "elsewhere").exists()
    assert "virtual environment" in first.details
    subprocess.run([python, "-I", "-c", "import stand_in; assert stand_in.VALUE == 41"], check=True)
    second = RecordingReporter()
    assert quantizing.ensure_environment(cache, second) == python
    assert second.tasks == []


def test_installing_sees_no_token_of_the_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def run(*_: Any, env: dict[str, str], log: Path, **__: Any) -> int:
        seen.append(env)
        log.touch()
        return 1

    monkeypatch.setattr(quantizing, "_run", run)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    with pytest.raises(HostError):
        quantizing.ensure_environment(cache, SilentReporter())
    [env] = seen
    assert "hf_secret" not in env.values()
    assert env["PIP_INDEX_URL"] == "https://index.example/simple"


def test_environment_that_cannot_be_installed_shows_pips_log_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        quantizing, "QUANTIZER_REQUIREMENTS", (str(tmp_path / "missing-1.0-py3-none-any.whl"),)
    )
    with pytest.raises(BuildError, match="cannot install the quantizer") as failed:
        quantizing.ensure_environment(cache, SilentReporter())
    assert "missing-1.0" in failed.value.log
    assert not environment_folder(cache).exists()


def test_environment_whose_python_is_gone_is_not_used(cache: Path) -> None:
    _prepared_environment(cache, "")
    python = environment_folder(cache) / "bin" / "python"
    assert quantizing._is_complete(environment_folder(cache))
    python.unlink()
    python.symlink_to(cache / "removed-python")
    assert not quantizing._is_complete(environment_folder(cache))
