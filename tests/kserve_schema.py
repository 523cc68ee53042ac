"""KServe's schema as its own Python package states it, read without importing the package or what it needs.

Each class of kserve.models tells the fields of one object: their names, types, and which must be there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RELEASE = "0.21.0"
_SIMPLE: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


class Schema:
    """folder: of the installed package `kserve`."""

    def __init__(self, folder: Path) -> None:
        self._types: dict[str, dict[str, str]] = {}
        self._required: dict[str, set[str]] = {}
        for path in (folder / "models").glob("v1*.py"):
            text = path.read_text()
            [node] = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
            values = {
                statement.targets[0].id: ast.literal_eval(statement.value)
                for statement in node.body
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
            }
            names = values["attribute_map"]
            self._types[node.name] = {names[name]: kind for name, kind in values["openapi_types"].items()}
            required = re.findall(r"Invalid value for `(\w+)`, must not be `None`", text)
            self._required[node.name] = {names[name] for name in required}

    def problems(self, value: Any, kind: str, where: str = "") -> Iterator[str]:
        """What is wrong with `value` as a `kind`. Kubernetes' own types are not looked into."""
        where = where or kind
        parts: Iterable[tuple[Any, str, str]] = ()
        if listed := re.fullmatch(r"list\[(.+)\]", kind):
            wanted: Any = list
            if isinstance(value, list):
                parts = [(item, listed[1], f"{where}[{index}]") for index, item in enumerate(value)]
        elif mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
            wanted = dict
            if isinstance(value, dict):
                parts = [(item, mapped[1], f"{where}.{key}") for key, item in value.items()]
        elif kind in self._types:
            wanted, fields = dict, self._types[kind]
            if isinstance(value, dict):
                yield from (f"{where}.{name} is missing" for name in self._required[kind] - set(value))
                yield from (f"{where}.{name} is unknown" for name in set(value) - set(fields))
                known = [name for name in value if name in fields]
                parts = [(value[name], fields[name], f"{where}.{name}") for name in known]
        else:
            wanted = _SIMPLE.get(kind, object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind in ("int", "float")):
            yield f"{where} is no {kind}"
        for item, its_kind, its_place in parts:
            yield from self.problems(item, its_kind, its_place)
