"""Imports run one way: cli -> benchmarks -> builder -> what is shared; one client library, one module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What the two sides agree on: phases, and seconds that manifests allow for. Neither imports anything of ours.
_SHARED = ("runtime.phases", "runtime.defaults")
# cli.py is the top: it alone in builder/ may use benchmarks/.
_MAY_IMPORT = {
    "runtime": {"runtime"},
    "builder": {"builder", *_SHARED, "runtime"},
    "benchmarks": {"benchmarks", "builder", "runtime.phases", "runtime.golden"},
}
_ONLY_IN = {
    "docker": {"builder/docker_engine.py"},
    "huggingface_hub": {"builder/hub.py", "runtime/fetch.py"},
    "jinja2": {"builder/render.py"},
    "resvg_py": {"benchmarks/svg.py"},
    "vllm": {"runtime/engine.py", "runtime/shortcuts.py", "runtime/template.py"},
    "llmcompressor": {"builder/quantize_job.py"},
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _sources() -> Iterator[tuple[str, Path]]:
    for package in _MAY_IMPORT:
        for path in sorted((ROOT / package).glob("*.py")):
            yield package, path


def test_imports_run_one_way() -> None:
    wrong = []
    for package, path in _sources():
        allowed = set(_MAY_IMPORT[package])
        if path.name == "cli.py":
            allowed.add("benchmarks")
        for name in _imports(path):
            if name.split(".")[0] not in _MAY_IMPORT:
                continue
            if not any(name == a or name.startswith(f"{a}.") for a in allowed):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if package == "builder" and name.startswith("runtime.") and not name.startswith(_SHARED):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_each_outside_system_has_one_module() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for _, path in _sources()
        for name in _imports(path)
        if name.split(".")[0] in _ONLY_IN
        and path.relative_to(ROOT).as_posix() not in _ONLY_IN[name.split(".")[0]]
    ]
    assert wrong == []


def test_help_imports_no_client_library() -> None:
    code = (
        "import sys\nfrom builder.cli import app\n"
        "try:\n    app(['build', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'docker', 'huggingface_hub', 'jinja2', 'safetensors', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
