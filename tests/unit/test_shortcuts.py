"""What is done later, beforehand or not at all: the same outcome, of libraries that these tests make up."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pydantic

from runtime import shortcuts
from tests.unit.conftest import Put


def _installation(folder: Path) -> None:
    """A package that defines its import structure as transformers does, and counts how often."""
    (folder / "transformers" / "utils").mkdir(parents=True)
    (folder / "transformers" / "models").mkdir()
    (folder / "transformers" / "utils" / "__init__.py").write_text("")
    (folder / "transformers" / "utils" / "import_utils.py").write_text(
        "calls = []\n"
        "def define_import_structure(path, prefix=None):\n"
        "    calls.append(path)\n"
        "    return {frozenset({'torch'}): {f'{prefix}.llama': {'Llama'}}}\n"
    )
    (folder / "transformers" / "models" / "image_processing_llama.py").write_text("")
    (folder / "transformers" / "__init__.py").write_text(
        "import importlib.metadata\n"
        "from pathlib import Path\n"
        "from .utils.import_utils import calls, define_import_structure\n"
        "structure = [define_import_structure('models', 'models') for _ in range(2)]\n"
        "distributions = importlib.metadata.packages_distributions()\n"
        "files = sorted((Path(__file__).parent / 'models').rglob('image_processing_*.py'))\n"
        "others = list(Path(__file__).parent.rglob('image_processing_*.py'))\n"
    )
    (folder / "one-1.0.dist-info").mkdir()
    (folder / "one-1.0.dist-info" / "METADATA").write_text("Name: one\nVersion: 1.0\n")
    (folder / "one-1.0.dist-info" / "top_level.txt").write_text("first\n")


_IMPORT = """
import importlib.metadata, sys
from pathlib import Path
from runtime import shortcuts
state = Path(sys.argv[1])
calls = []
own = importlib.metadata.packages_distributions, Path.rglob

def counted(function):
    return lambda *arguments: calls.append(arguments) or function(*arguments)

importlib.metadata.packages_distributions, Path.rglob = map(counted, own)
patched = importlib.metadata.packages_distributions, Path.rglob
finder = shortcuts.ImportStructures(shortcuts.read_structures(state))
sys.meta_path.insert(0, finder)
with finder.in_place():
    import transformers
assert (importlib.metadata.packages_distributions, Path.rglob) == patched
assert transformers.structure[0] == {frozenset({'torch'}): {'models.llama': {'Llama'}}}
assert transformers.distributions["first"] == ["one"]
assert [path.name for path in transformers.files] == ["image_processing_llama.py"]
assert transformers.others == transformers.files
calls.remove((Path(transformers.__file__).parent, "image_processing_*.py"))  # not of the models alone
print(len(transformers.calls) + len(calls))
shortcuts.write_structures(state, finder.known)
"""


def test_import_structures_are_found_once_for_an_installation(tmp_path: Path) -> None:
    _installation(tmp_path)

    def calls() -> int:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT, str(tmp_path / shortcuts.STRUCTURES)],
            env={"PYTHONPATH": f"{tmp_path}:{Path(shortcuts.__file__).parent.parent}"},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert calls() == 3  # not 4: the second question of the same start
    assert calls() == 0
    (tmp_path / "transformers" / "models" / "new").mkdir()  # another installation
    assert calls() == 3
    (tmp_path / "one-1.0.dist-info").rename(tmp_path / "one-1.1.dist-info")
    assert calls() == 3
    file = tmp_path / shortcuts.STRUCTURES
    for damaged in (b"damaged", file.read_bytes()[:-1], file.read_bytes()[:-1] + b"\0"):
        file.write_bytes(damaged)
        assert calls() == 3


def test_operators_are_named_after_the_frame_that_registers_them(put: Put) -> None:
    put(
        "torch/_library/utils.py",
        "import inspect, sys\n"
        "def get_source(stacklevel):\n"
        "    frame = inspect.getframeinfo(sys._getframe(stacklevel))\n"
        "    return f'{frame.filename}:{frame.lineno}'\n",
    )
    put(
        "torch/library.py",
        "import inspect, sys\n"
        "import torch._library.utils\n"
        "def register():\n"
        "    module = inspect.getmodule(sys._getframe(1))\n"
        "    return torch._library.utils.get_source(2), module.__name__, inspect.isfunction(register)\n",
    )
    put("user.py", "import torch.library\ndef use():\n    return torch.library.register()\n")
    theirs = importlib.import_module("user").use()
    own = importlib.import_module("torch._library.utils").get_source
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "user")]:
        del sys.modules[name]
    sys.meta_path.insert(0, shortcuts.name_operators_quickly())
    ours = importlib.import_module("user").use()
    assert importlib.import_module("torch._library.utils").get_source is not own
    assert ours == theirs
    assert ours[0].endswith("user.py:3")
    assert ours[1:] == ("user", True)


_VALIDATE = """
import sys
from runtime import shortcuts
sys.meta_path.insert(0, shortcuts.validate_later())
import pydantic
class Request(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    prompts: "list[Prompt]"
class Prompt(pydantic.BaseModel):
    tokens: int = 3
print(Request.__pydantic_complete__, Prompt.__pydantic_complete__)
print(Request.model_validate({"prompts": [{"tokens": "4"}, {}]}))
try:
    Request(prompts=[], other=1)
except pydantic.ValidationError as error:
    print(error.errors()[0]["type"])
print(pydantic.TypeAdapter(list[Prompt]).validate_json('[{"tokens": 5}]'))
"""


def test_validators_are_made_when_they_are_first_used() -> None:
    done = subprocess.run([sys.executable, "-c", _VALIDATE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "False False",
        "prompts=[Prompt(tokens=4), Prompt(tokens=3)]",
        "extra_forbidden",
        "[Prompt(tokens=5)]",
    ]
    assert "defer_build" not in pydantic.BaseModel.model_config


_GENERATE = """
import dataclasses, json, sys
from pathlib import Path
from runtime import shortcuts
path, new = Path(sys.argv[1]), []
known = shortcuts.read_generated(path) if sys.argv[2] == "use" else {}
write = shortcuts.generated_writer(path) if sys.argv[2] == "record" else lambda digest, code: None

def found(digest, code):
    new.append(digest)
    write(digest, code)

shortcuts.GeneratedCode(known, found).install()

@dataclasses.dataclass(order=True)
class One:
    a: int
    b: list = dataclasses.field(default_factory=list)

@dataclasses.dataclass(order=True)
class Two:
    a: int
    b: list = dataclasses.field(default_factory=list)

assert One(1) == One(1) < One(2, [3]) and One(1) != Two(1)
assert repr(One(1)).endswith("One(a=1, b=[])") and One.__init__.__annotations__["a"] is int
assert One.__eq__.__code__ is not Two.__eq__.__code__
print(len(new))
"""


def test_generated_code_is_compiled_once_for_an_installation(tmp_path: Path) -> None:
    _installation(tmp_path)

    def compiled(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _GENERATE, str(tmp_path / shortcuts.GENERATED), how],
            env={"PYTHONPATH": f"{tmp_path}:{Path(shortcuts.__file__).parent.parent}"},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    alone = compiled("nothing")
    assert alone > 5
    assert compiled("record") == alone
    assert compiled("use") == 0
    assert compiled("record") == alone  # from anew
    file = tmp_path / shortcuts.GENERATED
    file.write_bytes(file.read_bytes()[:-10])  # its writer was killed
    assert 0 < compiled("use") < alone
    compiled("record")
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 12):  # damaged code is compiled anew, not run
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert 0 < compiled("use") <= alone
    file.write_bytes(whole)
    (tmp_path / "one-1.0.dist-info").rename(tmp_path / "one-1.1.dist-info")  # another installation
    assert compiled("use") == alone
    file.write_bytes(b"damaged")
    assert compiled("use") == alone
    file.unlink()
    assert compiled("use") == alone
