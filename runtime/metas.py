"""torch's Python kernels for tensors without data ("meta"), imported when one of them is first called.

They are a quarter of torch's import, for compilers and for models that are declared before they are loaded. A
start without a record notes which operators they are of. A later one registers for each of these a kernel
that imports them all, and calls the operator again. Who imports one of the modules that come with them, or
asks torch for it as an attribute, has all of them imported first, in torch's own order, since they import
each other. Standard library only.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

MODULE = "torch._meta_registrations"
FILE = "metas.json"
VARIABLE = "_COLDSTART_METAS"

# Namespaces that come with them: nobody knows their operators before.
_THEIR_OWN = ("prims", "rngprims", "debugprims")
# Kernels of a device that no image is for.
_NO_MATTER = "MPS"


class Known(NamedTuple):
    """operators: such as "aten::add.Tensor"; modules: that torch imports for their sake alone."""

    operators: Sequence[str] = ()
    modules: frozenset[str] = frozenset()


def read(path: Path, installation: bytes) -> Known:
    """Nothing where nothing was noted, or of another installation."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if found["installation"] == installation.hex():
            return Known(found["operators"], frozenset(found["modules"]))
    return Known()


class Noting(MetaPathFinder):
    """Notes in `path` what the module has kernels of; nothing, where it does more than that."""

    def __init__(self, path: Path, installation: bytes) -> None:
        self._path, self._installation = path, installation

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == MODULE else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self._note(run, module)  # type: ignore[method-assign]
        return spec

    def _note(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        before, modules = set(_registered()), set(sys.modules)
        run(module)
        found = []
        for key in _registered() - before:
            space, operator, kind = key.split("/")
            if space not in _THEIR_OWN and kind != _NO_MATTER:
                if kind != "Meta":
                    return
                found.append(f"{space}::{operator}")
        what = {
            "installation": self._installation.hex(),
            "operators": sorted(found),
            "modules": sorted(set(sys.modules) - modules),
        }
        self._path.write_text(json.dumps(what))


def _registered() -> set[str]:
    """What Python registered with torch, such as "aten/add.Tensor/Meta"; torch keeps it itself."""
    library: Any = sys.modules["torch.library"]
    found: set[str] = library._impls
    return found


def stand_in(operators: Sequence[str], run: Callable[[], None]) -> None:
    """Register a kernel of each operator that calls `run`, which registers the real one, and asks again.

    run: returns once that is done, by whatever thread, or at once where it is the caller who does it.
    """
    torch: Any = sys.modules["torch"]

    def call(operator: str, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():  # torch's, that there was a kernel already
            warnings.simplefilter("ignore")
            run()
        space, _, name = operator.partition("::")
        if f"{space}/{name}/Meta" not in _registered():
            raise NotImplementedError(f"{operator} has no kernel for tensors without data (meta)")
        packet, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, space), packet), overload or "default")(*args, **kwargs)

    for operator in operators:
        space = operator.partition("::")[0]
        if space not in _libraries:
            _libraries[space] = torch._C._dispatch_library("IMPL", space, "Meta", __file__, 0)
        _libraries[space].impl(operator, "Meta", functools.partial(call, operator))


# A kernel is there as long as the library that registered it.
_libraries: dict[str, Any] = {}


def find_as_attributes(known: Known) -> None:
    """Have torch import these modules when they are asked for as its attributes, which they would be."""
    lazy = vars(sys.modules["torch"]).get("_lazy_modules")
    if isinstance(lazy, set):
        lazy.update(name.removeprefix("torch.") for name in known.modules if name.count(".") == 1)
