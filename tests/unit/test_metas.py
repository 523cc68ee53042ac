"""torch's kernels for tensors without data, imported when one is called: with a torch made up here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import deferred, metas
from runtime.metas import Known
from tests.unit.conftest import Put

_TORCH = {
    "torch/__init__.py": """
from torch import _C, library, ops
_lazy_modules = {"onnx"}
def __getattr__(name):
    if name in _lazy_modules:
        import importlib
        return importlib.import_module("torch." + name)
    raise AttributeError(name)
from torch import _meta_registrations
""",
    "torch/library.py": "_impls = {'aten/earlier/CPU'}\n",
    "torch/_C.py": """
kernels = {}
class Library:
    def impl(self, name, key, kernel):
        assert key == "Meta"
        kernels[name] = kernel
def _dispatch_library(kind, space, key, file, line):
    return Library()
""",
    "torch/ops.py": """
from torch import _C
class Packet:
    def __init__(self, name):
        self.name = name
    def __getattr__(self, overload):
        name = self.name + ("" if overload == "default" else "." + overload)
        return lambda *args, **kwargs: _C.kernels["aten::" + name](*args, **kwargs)
class aten:
    relu, add, gone = Packet("relu"), Packet("add"), Packet("gone")
""",
    # Each needs the other, and comes first in its turn.
    "torch/_meta_registrations.py": """
from torch import _C, library
from torch._decomp import order
order.append("metas")
for name in ("relu", "add.Tensor"):
    library._impls.add(f"aten/{name}/Meta")
    _C.kernels["aten::" + name] = lambda x, name=name: (name, x)
library._impls |= {"prims/all/Autograd", "aten/relu/MPS"}
""",
    "torch/_decomp.py": "order = []\nimport torch._refs\norder.append('decomp')\n",
    "torch/_refs.py": "from torch._decomp import order\norder.append('refs')\n",
    "torch/compiler.py": "from torch._refs import order\norder.append('compiler')\n",
}
KNOWN = Known(("aten::add.Tensor", "aten::gone", "aten::relu"), frozenset({"torch._decomp", "torch._refs"}))


@pytest.fixture
def torch(put: Put) -> Callable[[], Any]:
    for path, source in _TORCH.items():
        put(path, source)
    return lambda: importlib.import_module("torch")


@pytest.fixture
def later(torch: Callable[[], Any]) -> Any:
    names = {metas.MODULE: (), "torch.compiler": ()}
    sys.meta_path.insert(0, deferred.Deferred(names, known=KNOWN))
    found = torch()
    metas.find_as_attributes(KNOWN)
    assert "torch._decomp" not in sys.modules
    return found


def _order() -> list[str]:
    order: list[str] = sys.modules["torch._decomp"].order
    return order


def test_what_is_noted_of_a_start(torch: Callable[[], Any], tmp_path: Path) -> None:
    file = tmp_path / metas.FILE
    assert metas.read(file, b"here") == Known()
    sys.meta_path.insert(0, metas.Noting(file, b"here"))
    torch()
    assert metas.read(file, b"here") == Known(["aten::add.Tensor", "aten::relu"], KNOWN.modules)
    assert metas.read(file, b"there") == Known()
    file.write_text("{")
    assert metas.read(file, b"here") == Known()
    file.write_text(json.dumps({"installation": b"here".hex()}))
    assert metas.read(file, b"here") == Known()


def test_nothing_is_noted_where_the_module_does_more(
    torch: Callable[[], Any], put: Put, tmp_path: Path
) -> None:
    more = _TORCH["torch/_meta_registrations.py"] + "library._impls.add('aten/relu/CPU')\n"
    put("torch/_meta_registrations.py", more)
    sys.meta_path.insert(0, metas.Noting(tmp_path / metas.FILE, b"here"))
    torch()
    assert not (tmp_path / metas.FILE).exists()


def test_the_first_call_imports_them(later: Any) -> None:
    assert later.ops.aten.add.Tensor(1) == ("add.Tensor", 1)
    assert _order() == ["refs", "decomp", "metas"]
    assert later.ops.aten.relu.default(x=2) == ("relu", 2)
    with pytest.raises(NotImplementedError, match="aten::gone"):
        later.ops.aten.gone.default()
    assert _order() == ["refs", "decomp", "metas"]


def test_who_imports_one_of_their_modules_imports_all(later: Any) -> None:
    from_another_place = importlib.import_module("torch._refs")
    assert from_another_place.order == ["refs", "decomp", "metas"]
    assert later.ops.aten.relu.default(x=2) == ("relu", 2)


def test_they_are_found_as_attributes(later: Any) -> None:
    assert later._decomp.order == ["refs", "decomp", "metas"]
    with pytest.raises(AttributeError):
        _ = later.another


def test_a_deferred_module_of_torch_comes_after_them(later: Any) -> None:
    importlib.import_module("torch.compiler")
    assert later.compiler.order == ["refs", "decomp", "metas", "compiler"]


def test_without_a_note_they_are_imported_as_ever(torch: Callable[[], Any]) -> None:
    sys.meta_path.insert(0, deferred.Deferred({metas.MODULE: ()}))
    assert torch().ops.aten.relu.default(1) == ("relu", 1)
    assert _order() == ["refs", "decomp", "metas"]
