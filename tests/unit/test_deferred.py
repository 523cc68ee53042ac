"""Deferred modules: nothing runs before the first touch, and after it everything is as if imported."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtime import deferred
from tests.unit.conftest import Put


def _defer(names: deferred.Names, **options: Any) -> list[str]:
    told: list[str] = []
    sys.meta_path.insert(0, deferred.Deferred(names, told.append, **options))
    return told


def test_module_runs_at_the_first_touch_and_once(put: Put) -> None:
    put("lazy.py", "import counter\ncounter.runs += 1\nanswer = 42\n")
    put("counter.py", "runs = 0\n")
    told = _defer({"lazy": ()})
    lazy, counter = importlib.import_module("lazy"), importlib.import_module("counter")
    assert (counter.runs, told) == (0, [])
    assert (lazy.answer, lazy.answer, counter.runs, told) == (42, 42, 1, ["lazy"])
    assert type(lazy) is ModuleType
    assert importlib.reload(lazy).answer == 42


def test_name_taken_of_it_becomes_the_real_one(put: Put) -> None:
    put("lazy.py", "class Base:\n    size = 3\ndef double(x):\n    return 2 * x\n")
    put("user.py", "from lazy import Base, double\ndef use():\n    return isinstance(1, Base), double(4)\n")
    told = _defer({"lazy": ("Base", "double")})
    user = importlib.import_module("user")
    assert told == []
    assert user.use() == (False, 8)
    lazy = sys.modules["lazy"]
    assert user.Base is lazy.Base
    assert user.double is lazy.double


def test_what_is_kept_elsewhere_still_forwards(put: Put) -> None:
    put("lazy.py", "class Base:\n    size = 3\n    def __init__(self, x=0): self.x = x\n")
    _defer({"lazy": ("Base",)})
    name: Any = importlib.import_module("lazy").Base
    assert type(name) is deferred.DeferredName
    namespace: dict[str, Any] = {"name": name}
    exec("class Derived(name): pass", namespace)
    derived = namespace["Derived"]
    real = sys.modules["lazy"].Base
    assert derived.__mro__[1] is real
    assert issubclass(derived, namespace["name"])
    assert isinstance(derived(), namespace["name"])
    assert name(5).x == 5
    assert name == real
    assert hash(name) == hash(real)
    assert (name | None) == (real | None)
    name.size = 4
    assert real.size == 4


def test_nothing_is_an_instance_of_what_has_not_run(put: Put) -> None:
    put("lazy.py", "class Base: pass\n")
    told = _defer({"lazy": ("Base",)})
    name = importlib.import_module("lazy").Base
    assert not isinstance(3, name)
    assert not issubclass(int, name)
    assert told == []
    assert isinstance(name(), name)


def test_forgotten_package_is_imported_again_before_its_module(put: Put) -> None:
    put("pack/__init__.py", "import counter\ncounter.ran.append('pack')\n")
    put("pack/child.py", "import counter\ncounter.ran.append('child')\ndef f(): return 3\n")
    put("counter.py", "ran = []\n")
    _defer({"pack": (), "pack.child": ("f",)})
    old, name = importlib.import_module("pack"), importlib.import_module("pack.child").f
    deferred.forget("pack")
    assert "pack" not in sys.modules
    assert name() == 3
    assert importlib.import_module("counter").ran == ["pack", "child"]
    assert old.counter is sys.modules["pack"].counter  # whoever kept the first sees the second
    assert importlib.import_module("counter").ran == ["pack", "child"]


def test_error_appears_at_each_touch(put: Put) -> None:
    put("lazy.py", "raise RuntimeError('no such library')\n")
    _defer({"lazy": ("f",)})
    lazy = importlib.import_module("lazy")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such library"):
            lazy.g  # noqa: B018
        with pytest.raises(RuntimeError, match="no such library"):
            lazy.f()


def test_missing_module_is_missing_at_once(put: Put) -> None:
    _defer({"not_there": ()})
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("not_there")


def test_submodule_finds_its_package_executed(put: Put) -> None:
    put("pack/__init__.py", "import counter\ncounter.runs += 1\nfrom . import child\n")
    put("pack/child.py", "import counter\ncounter.children += 1\nfrom pack import counter as same\n")
    put("counter.py", "runs = children = 0\n")
    _defer({"pack": ()})
    importlib.import_module("pack")
    child, counter = importlib.import_module("pack.child"), importlib.import_module("counter")
    assert (counter.runs, counter.children) == (1, 1)
    assert child is sys.modules["pack"].child
    assert child.__spec__.name == "pack.child"
    assert child.__spec__.loader is child.__loader__


_OPENAI = """
import sys
from runtime import deferred

told = []
names = {name: names for name, names in deferred.CANDIDATES.items() if name.startswith("openai")}
sys.meta_path.insert(0, deferred.Deferred(names, told.append, check=True))
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
import openai
assert set(names) == {"openai", "openai.types"} and told == [], told
assert not {"openai._client", "openai.types.batch", "openai.resources"} & set(sys.modules)
assert openai.OpenAI.__name__ == "OpenAI"
assert openai.types.Batch.__name__ == "Batch"
assert openai.types.chat.ChatCompletion is ChatCompletion
assert told == ["openai", "openai.types"], told
"""


def test_types_of_openai_need_nothing_of_their_package() -> None:
    subprocess.run([sys.executable, "-c", _OPENAI], check=True)


def test_two_threads_touch_it(put: Put) -> None:
    put("lazy.py", "import counter, time\ncounter.runs += 1\ntime.sleep(0.1)\nanswer = 42\n")
    put("counter.py", "runs = 0\n")
    _defer({"lazy": ()})
    lazy, counter = importlib.import_module("lazy"), importlib.import_module("counter")
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(lazy.answer)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [42] * 4
    assert counter.runs == 1


def test_forked_process_executes_its_own(put: Put) -> None:
    put("lazy.py", "answer = 42\n")
    told = _defer({"lazy": ()})
    lazy = importlib.import_module("lazy")
    child = os.fork()
    if child == 0:
        os._exit(lazy.answer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert told == []
    assert lazy.answer == 42


def test_patch_of_a_deferred_package_comes_later(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("pack/__init__.py", "")
    put("pack/deep.py", "patched = False\n")
    patch = "def patch():\n    try:\n        from pack import deep\n    except ImportError:\n        return\n"
    put("user.py", f"{patch}    deep.patched = True\npatch()\n")
    monkeypatch.setattr(deferred, "_POSTPONED", {("user", "patch"): ("pack", "pack.deep")})
    told = _defer({"pack": ()})
    importlib.import_module("user")
    assert told == []
    assert importlib.import_module("pack.deep").patched


def test_while_recording_the_source_must_be_as_listed(put: Put) -> None:
    put("good.py", "from os import path, sep\ndef f(): pass\nlimit = 3\n")
    put("renamed.py", "def g(): pass\n")
    put("own.py", "import sys\nsys.modules[__name__] = 3\n")
    told = _defer({"good": ("f", "limit", "path", "sep"), "renamed": ("f",), "own": ()}, check=True)
    for name in ("good", "renamed", "own"):
        importlib.import_module(name)
    assert told == ["renamed", "own"]


def _tell_from(process: str, told: Callable[[str], None], name: str) -> None:
    child = multiprocessing.get_context("fork").Process(target=told, args=(name,), name=process)
    child.start()
    child.join()


def test_record_decides(tmp_path: Path) -> None:
    path = tmp_path / deferred.TOUCHED
    assert deferred.unused(path) == {}
    assert deferred.of_api_process(path) == []
    told = deferred.recorder(path)
    assert deferred.unused(path) == deferred.CANDIDATES
    told("torch._dynamo")
    told("torch._dynamo")
    _tell_from("api", told, "cv2")
    _tell_from("api", told, "vllm.parser")
    _tell_from("EngineCore", told, "vllm.parser")
    without = ("torch._dynamo", "vllm.parser")
    assert deferred.unused(path) == {n: v for n, v in deferred.CANDIDATES.items() if n not in without}
    assert deferred.of_api_process(path) == ["cv2"]


def test_names_of_many_modules_are_replaced_at_the_end(put: Put) -> None:
    put("one.py", "def f(): return 1\n")
    put("two.py", "def g(): return 2\n")
    put("user.py", "from one import f\nfrom two import g\ndef use(): return f() + g()\n")
    _defer({"one": ("f",), "two": ("g",)})
    user = importlib.import_module("user")
    with deferred.replacing_at_the_end():
        deferred.execute(sys.modules["one"])
        deferred.execute(sys.modules["two"])
        assert type(user.f) is deferred.DeferredName
        assert user.use() == 3
    assert user.f is sys.modules["one"].f
    assert user.g is sys.modules["two"].g
