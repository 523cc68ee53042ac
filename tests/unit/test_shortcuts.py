"""What is done later, beforehand or not at all: the same outcome, of libraries that these tests make up."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pydantic
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

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


_MANAGER = """
import threading
made = threading.Event()
def cached_tokenizer_from_config(model_config):
    made.wait(10)
    if model_config is None:
        raise ValueError("no tokenizer")
    return "tokenizer of " + model_config
class StructuredOutputManager:
    def __init__(self, model_config):
        self.tokenizer = cached_tokenizer_from_config(model_config=model_config)
    def backend(self):
        return self.tokenizer
"""


def test_tokenizer_of_structured_output_is_waited_for_when_wanted(put: Put) -> None:
    put("vllm/v1/structured_output.py", _MANAGER)
    assert shortcuts.make_structured_output_tokenizer_beside()
    module: Any = importlib.import_module("vllm.v1.structured_output")
    good, bad = module.StructuredOutputManager("a model"), module.StructuredOutputManager(None)
    threading.Timer(0.05, module.made.set).start()
    assert good.backend() == good.backend() == "tokenizer of a model"
    with pytest.raises(ValueError, match="no tokenizer"):
        bad.backend()
    good.tokenizer = "another"
    assert good.backend() == "another"


def test_another_vllm_makes_that_tokenizer_itself(put: Put) -> None:
    put("vllm/v1/structured_output.py", "class StructuredOutputManager: pass\n")
    assert not shortcuts.make_structured_output_tokenizer_beside()


def test_who_asks_for_a_processor_gets_no_tokenizer(put: Put) -> None:
    put("transformers/models/auto/processing_auto.py", "class AutoTokenizer: pass\n")
    module: Any = importlib.import_module("transformers.models.auto.processing_auto")
    own = module.AutoTokenizer
    with shortcuts.tokenizer_is_no_processor(), pytest.raises(ValueError, match="no processor"):
        module.AutoTokenizer.from_pretrained("a model", trust_remote_code=False)
    assert module.AutoTokenizer is own


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


def _tokenizer() -> Tokenizer:
    words = {"<unk>": 0, "the": 1, "capital": 2, "of": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    tokenizer.enable_truncation(9)
    tokenizer.enable_padding(pad_id=5, pad_token="<pad>", length=8)
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<pad>")])
    tokenizer.add_tokens(["zebra", AddedToken("Paris", normalized=False, lstrip=True)])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_a_copy_of_a_tokenizer_is_the_same_and_changes_alone() -> None:
    tokenizer = _tokenizer()
    copied = shortcuts._copy_of_tokenizer(tokenizer)
    assert copied.to_str() == tokenizer.to_str()
    text = "The capital of Paris <end> zebra"
    assert copied.encode(text).ids == tokenizer.encode(text).ids
    assert copied.encode_special_tokens

    before = tokenizer.to_str()
    copied.add_tokens(["another"])
    copied.no_padding()
    copied.no_truncation()
    copied.pre_tokenizer = WhitespaceSplit()
    assert tokenizer.to_str() == before
    assert tokenizer.token_to_id("another") is None


def test_a_tokenizer_whose_added_ids_have_gaps_is_copied_whole() -> None:
    described = json.loads(_tokenizer().to_str())
    described["added_tokens"][-1]["id"] = 20
    tokenizer = Tokenizer.from_str(json.dumps(described))
    copied = shortcuts._copy_of_tokenizer(tokenizer)
    assert copied.to_str() == tokenizer.to_str()
    assert copied.token_to_id("<end>") == tokenizer.token_to_id("<end>")
