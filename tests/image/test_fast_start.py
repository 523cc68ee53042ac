"""What one recorded start gives the next ones, and what makes every start fast."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.docker_engine import Container, DockerEngine
from runtime.switches import LABELS
from tests.image.conftest import PREFIX, QUANTIZE, ask, coldstart, get, wait_ready
from tests.models import write_llama

_LOOK = """
import json, os
from pathlib import Path
from runtime import prefetch, shortcuts, state

def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace(chr(0), " ")

pids = [int(p.name) for p in Path("/proc").glob("[0-9]*") if int(p.name) not in (1, os.getpid())]
lines = {pid: Path(f"/proc/{pid}/status").read_text().splitlines() for pid in pids}
status = {pid: dict(line.split(":", 1) for line in lines[pid]) for pid in pids}
templates = [pid for pid in pids if "forkserver" in command(pid) and int(status[pid]["PPid"]) == 1]
folder = state.folder()
print(json.dumps({
    "listed": (folder / prefetch.FILE_LIST).read_text().splitlines(),
    "structures": len(shortcuts.read_structures(folder / shortcuts.STRUCTURES)),
    "template_threads": [int(status[pid]["Threads"]) for pid in templates],
    "resident": sum(int(s.get("RssAnon", "0 kB").split()[0]) * 1024 for s in status.values()),
}))
"""


def _json(container: Container, command: list[str]) -> Any:
    code, output = container.run(command)
    assert code == 0, output
    return json.loads(output.strip().splitlines()[-1])


def test_a_recorded_start_helps_the_next(
    plain: Any, start: Callable[..., Container], engine: DockerEngine
) -> None:
    assert engine.require_image(plain["tag"]).labels["dev.coldstart.prewarmed"] == "yes"
    container = start(plain["tag"])
    wait_ready(container)
    assert b'coldstart_cache_hit{cache="imports"} 1.0' in get(container, "/metrics").body
    found = _json(container, ["python3", "-c", _LOOK])
    assert any(path.endswith("/libtorch_cpu.so") for path in found["listed"][:10])
    assert any(path.endswith(".pyc") for path in found["listed"])
    assert not any(path.startswith("/models/") for path in found["listed"])
    assert any("/torch/" in path and path.endswith(".pyc") for path in found["listed"])
    unused = [path for path in found["listed"] if "/torch/_dynamo/" in path or "/sympy/" in path]
    assert not any(path.endswith(".pyc") for path in unused)
    assert found["structures"] > 1  # of this very installation, or they would not be used
    assert found["template_threads"] == [1]
    assert found["resident"] < 2 << 30  # the KV cache alone is 2 GiB, and nobody has used it


def test_a_recorded_start_of_a_quantized_model_imports_its_own_method_alone(
    build: Callable[..., Any], start: Callable[..., Container]
) -> None:
    image = build("smollm2:awq-recorded", *QUANTIZE, "--prewarm", "--optimize", "startup")["tag"]
    container = start(image)
    wait_ready(container)
    assert "this vLLM lacks" not in container.logs()
    found = _json(container, ["python3", "-c", _LOOK])
    methods = {path.split("/quantization/")[1] for path in found["listed"] if "/layers/quantization/" in path}
    assert any(name.startswith("compressed_tensors/") for name in methods)
    assert not any(name.startswith(("quark/", "inc/", "__pycache__/humming")) for name in methods), methods
    # What 4 bits leave of the model depends on the machine that quantized it.
    plainly = start(image, environment={"COLDSTART_OFF": "quantization-methods"})
    wait_ready(plainly)
    assert ask(container)["chat"] == ask(plainly)["chat"]


_TOKENIZER = """
import copy, json, sys
if "once" in sys.argv:
    from runtime import tokenizer
    sys.meta_path.insert(0, tokenizer.once())
from vllm.tokenizers import hf

made = hf.CachedHfTokenizer.from_pretrained(sys.argv[1])
pool = hf.maybe_make_thread_pool(made)
text = "The capital of France is <|im_start|> Paris.<|im_end|>  ¿Qué?"
told = []
for one in (made, pool, copy.deepcopy(made)):
    ids = one.encode(text)
    told.append([
        *(ids, one.decode(ids), one.convert_ids_to_tokens(ids), sorted(one.get_vocab().items()), len(one)),
        *(one.all_special_ids, one.max_token_id, one.max_chars_per_token, one.vocab_size),
        str(one.init_kwargs),
        *(str(one.added_tokens_decoder), one.special_tokens_map, one.backend_tokenizer.to_str()),
        one.apply_chat_template([{"role": "user", "content": text}], tokenize=False),
    ])
print(json.dumps(told))
"""


def test_a_tokenizer_that_is_parsed_once_is_the_one_that_vllm_makes(
    plain: Any, start: Callable[..., Container]
) -> None:
    container = start(plain["tag"])
    wait_ready(container)
    command = ["python3", "-c", _TOKENIZER, "/models/SmolLM2-135M-Instruct"]
    theirs, ours = _json(container, command), _json(container, [*command, "once"])
    assert ours == theirs
    assert len(ours[0][3]) > 49_000
    # The engine core's own is made for the first request that needs it.
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": question, "max_tokens": 30, "temperature": 0, "structured_outputs": {"json": schema}}
    answer = _json(container, ["python3", "-c", _CHAT, json.dumps(body)])
    assert json.loads(answer)["city"] in ("Paris", "Rome")


_METAS = """
import json, sys
from runtime import deferred, metas, shortcuts, state

later = "later" in sys.argv
if later:
    known = metas.read(state.folder() / metas.FILE, shortcuts.of_installation())
    sys.meta_path.insert(0, deferred.Deferred({metas.MODULE: ()}, known=known))
import torch

if later:
    metas.find_as_attributes(known)
    assert len(known.operators) > 1000 and not known.modules & set(sys.modules)
first = sys.argv[1]
if first == "attribute":
    told = [len(torch._decomp.decomposition_table)]
elif first == "import":
    import torch._refs as refs
    told = [len(refs.__all__)]
elif first == "compiler":
    import torch._dynamo, torch._inductor.lowering
    told = [len(torch._inductor.lowering.lowerings)]
else:
    told = []
a = torch.empty(4, 4, device="meta")
b = a.to(torch.complex64)
told += [str(torch.nn.Linear(4, 3, device="meta")(a)), str(torch.linalg.cholesky(a)), str(torch.fft.fft(b))]
told += [str(torch.empty_like(a).copy_(a).add_(1).t().contiguous()), str(a.sort()), str(torch.sigmoid(b))]
for wrong in (lambda: a.nonzero(), lambda: torch.linalg.cholesky(a[:3]), lambda: a.item()):
    try:
        told.append(str(wrong()))
    except Exception as error:
        told.append(type(error).__name__)
import torch._decomp
told += [len(torch._decomp.meta_table), len(torch._decomp.decomposition_table)]
with torch._subclasses.FakeTensorMode() as mode:
    told.append(str(torch.nn.functional.softmax(torch.empty(2, 3), -1)))
print(json.dumps(told))
"""


@pytest.mark.parametrize("first", ["operator", "attribute", "import", "compiler"])
def test_tensors_without_data_compute_the_same(
    first: str, plain: Any, start: Callable[..., Container]
) -> None:
    container = start(plain["tag"])
    wait_ready(container)
    theirs, ours = (_json(container, ["python3", "-c", _METAS, first, *how]) for how in ((), ("later",)))
    assert ours == theirs


_CHAT = """
import json, sys
from runtime import golden
url = "http://127.0.0.1:8000"
body = {"model": golden.get(f"{url}/v1/models")["data"][0]["id"], **json.loads(sys.argv[1])}
print(json.dumps(golden.post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]))
"""

_TREE = """
import json, os
from pathlib import Path

lines = [p.read_text() for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.name != str(os.getpid())]
print(json.dumps([sum(word in line for line in lines) for word in ("forkserver", "spawn_main")]))
"""


# Those that do not need the template, alone; then what a start without any of ours is.
@pytest.mark.parametrize(
    "off", ["template", ",".join(name for name in LABELS if name != "template"), ",".join(LABELS)]
)
def test_a_start_without_an_optimisation_answers_the_same(
    off: str, plain: Any, start: Callable[..., Container]
) -> None:
    container = start(plain["tag"], environment={"COLDSTART_OFF": off})
    wait_ready(container)
    assert ask(container)["chat"] == "The capital of France is Paris."
    # Each does leave out what it names.
    log, phases = container.logs(), get(container, "/startup").json["phases"]
    imports = {phase["process"] for phase in phases if phase["phase"] == "engine_import"}
    tree = _json(container, ["python3", "-c", _TREE])
    if "template" in off:
        assert imports == {"api", "EngineCore"}
        assert tree[0] == 0 < tree[1]
    else:
        assert imports == {"template"}
        assert tree[1] == 0 < tree[0]
    remembered = b'coldstart_cache_hit{cache="imports"} 1.0' in get(container, "/metrics").body
    assert remembered == ("import-structures" not in off)
    by_name = {(phase["phase"], phase["process"]): phase for phase in phases}
    tokenizer, core = by_name["tokenizer_init", "api"], by_name["engine_init", "api"]
    assert (core["start"] < tokenizer["end"]) == ("core-beside-tokenizer" not in off)
    if "lazy-kv-cache" in off:
        found = _json(container, ["python3", "-c", _LOOK])
        assert found["resident"] > 2 << 30
    assert "this vLLM lacks" not in log


_READ_AHEAD = """
import json
from pathlib import Path
from runtime import prefetch, state
from runtime.settings import read_manifest

manifest = read_manifest()
budget = prefetch._budget()
shards = [f"{manifest.model_path}/{name}" for name in manifest.shards]
paths = [*prefetch._recorded(state.folder()), *shards]
print(json.dumps({"budget": budget, "read": prefetch.read_ahead(paths, budget),
                  "wanted": sum(Path(path).stat().st_size for path in paths)}))
"""


@pytest.mark.parametrize("limit", [256 << 20, 8 << 30])
def test_read_ahead_stays_within_half_of_the_memory_limit(limit: int, plain: Any) -> None:
    run = ["docker", "run", "--rm", "--network", "none", "--memory", str(limit), "--entrypoint", "python3"]
    done = subprocess.run(
        [*run, plain["tag"], "-c", _READ_AHEAD], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout)
    assert found["budget"] == limit // 2
    assert found["wanted"] > 256 << 20
    if limit == 8 << 30:
        assert found["read"] == found["wanted"]
    else:
        assert 0 < found["read"] <= found["budget"]


# Looks at the template at the very moment of each fork. Where that is asked for, gives it a thread, at once
# or with what only the engine core needs, or breaks the latter.
_PROBE = """
import json, os, sys, threading, time

def link(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # the one that listed them
        return ""

def look():
    import asyncio
    template = sys.modules.get("runtime.template")
    if template is None or template.__spec__._initializing:
        return  # it looks for itself whether it may be forked
    torch, zmq = sys.modules["torch"], sys.modules.get("zmq")
    links = [link(descriptor) for descriptor in os.listdir("/proc/self/fd") if int(descriptor) > 2]
    seen = {
        "pid": os.getpid(),
        "threads": len(os.listdir("/proc/self/task")),
        "open": [p for p in links if p.startswith(("/dev/", "anon_inode:")) and p != "/dev/null"],
        "event_loop": asyncio._get_running_loop() is not None,
        "zmq_context": zmq is not None and zmq.Context._instance is not None,
        "cuda": torch.cuda.is_initialized(),
    }
    with open("/tmp/at-fork.jsonl", "a") as file:
        file.write(json.dumps(seen) + chr(10))

if "forkserver" in " ".join(sys.orig_argv):
    os.register_at_fork(before=look)
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "vllm.v1.worker.cpu_worker":
                if probe == "broken":
                    raise ImportError("broken for a test")
                start_thread()
    start_thread = threading.Thread(target=time.sleep, args=(600,), daemon=True).start
    probe = os.environ.get("PROBE")
    if probe == "thread":
        start_thread()
    elif probe:
        sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def probed(plain: Any, engine: DockerEngine) -> Iterator[str]:
    """The plain image, with a look at the template whenever it is forked."""
    tag, code = f"{PREFIX}/probed:1", base64.b64encode(_PROBE.encode()).decode()
    dockerfile = (
        f"FROM {plain['tag']}\nUSER root\n"
        f"RUN echo {code} | base64 -d >/opt/coldstart/sitecustomize.py\nUSER 2000:0\n"
    )
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    command = ["docker", "build", "--quiet", "--tag", tag, "-"]
    subprocess.run(command, input=dockerfile, text=True, env=environment, check=True)
    yield tag
    engine.remove_image(tag)


def test_template_has_one_thread_and_nothing_open_when_it_is_forked(
    probed: str, start: Callable[..., Container]
) -> None:
    container = start(probed)
    wait_ready(container)
    code, output = container.run(["cat", "/tmp/at-fork.jsonl"])
    assert code == 0, output
    forks = [json.loads(line) for line in output.splitlines()]
    assert len(forks) >= 2  # the API process and the engine core at least
    assert len({fork.pop("pid") for fork in forks}) == 1
    for fork in forks:
        # The forkserver's own selector is the one thing open.
        assert fork.pop("open") in ([], ["anon_inode:[eventpoll]"])
        assert fork == {"threads": 1, "event_loop": False, "zmq_context": False, "cuda": False}


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("thread", "importing vLLM started 1 thread"),
        ("late-thread", "importing vLLM started 1 thread"),
        ("broken", "importing what the engine core needs failed"),
    ],
)
def test_where_forking_is_not_safe_processes_are_spawned(
    probed: str, start: Callable[..., Container], probe: str, reason: str
) -> None:
    container = start(probed, environment={"PROBE": probe})
    wait_ready(container)
    assert ask(container)["chat"] == "The capital of France is Paris."
    assert f"forking is not safe, since {reason};" in container.logs()
    forkservers, spawned = _json(container, ["python3", "-c", _TREE])
    assert forkservers == 0 < spawned


def test_every_module_has_bytecode(plain: Any, start: Callable[..., Container]) -> None:
    container = start(plain["tag"])
    missing = _json(container, ["python3", "-c", _BYTECODE])
    # Written for a newer Python: no interpreter of the image can compile it.
    assert [path for path in missing if "/py312_" not in path] == []


def test_a_base_without_bytecode_gets_it(
    build: Callable[..., Any],
    start: Callable[..., Container],
    base: str,
    engine: DockerEngine,
    tmp_path: Path,
) -> None:
    """As some installers leave it: `uv pip install` compiles nothing by default."""
    bare = f"{PREFIX}/base:without-bytecode"
    dockerfile = (
        f"FROM {base}\nRUN rm -r $(python3 -c 'import uvicorn; print(uvicorn.__path__[0])')/__pycache__\n"
    )
    done = subprocess.run(
        ["docker", "build", "-q", "-t", bare, "-"],
        input=dockerfile,
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    try:
        model = write_llama(tmp_path / "tiny-llama", Path(os.environ["COLDSTART_TEST_MODEL"]))
        container = start(build("tiny:bytecode", folder=model, base=bare)["tag"])
        missing = _json(container, ["python3", "-c", _BYTECODE])
        assert [path for path in missing if "/uvicorn/" in path] == []
    finally:
        engine.remove_image(bare)


_BYTECODE = """
import importlib.util, json, os, struct, sys, sysconfig
from pathlib import Path

def current(path):
    try:
        header = Path(importlib.util.cache_from_source(path)).read_bytes()[:16]
    except OSError:
        return False
    flags, time, size = struct.unpack("<4xIII", header)
    found = path.stat()
    return bool(flags) or (time, size) == (int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF)

tops = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {"/opt/coldstart"}
tested = ("/test/", "/tests/", "/idlelib/", "/lib2to3/")
files = [path for top in tops for path in Path(top).rglob("*.py") if not any(t in str(path) for t in tested)]
print(json.dumps([str(path) for path in files if not current(path)]))
"""


def test_image_that_does_not_start_is_told(model: str, base: str, engine: DockerEngine) -> None:
    tag = f"{PREFIX}/never:1"
    done = coldstart("build", model, "--base", base, "-t", tag, "--", "--max-model-len", "999999")
    engine.remove_image(tag)
    assert done.code == 5
    assert "its start could not be recorded" in done.err
    assert "max_model_len" in done.err  # vLLM's own words
    assert "Traceback" not in done.err.split("error:")[-1]
