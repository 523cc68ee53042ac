"""Done once of a tokenizer what libraries do again: with the real `tokenizers`, and modules made up here."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from runtime import tokenizer
from tests.unit.conftest import Put

_MANAGER = """
made = []
def cached_tokenizer_from_config(model_config):
    made.append(model_config)
    if model_config is None:
        raise ValueError("no tokenizer")
    return "tokenizer of " + model_config
class StructuredOutputManager:
    def __init__(self, model_config):
        self.tokenizer = cached_tokenizer_from_config(model_config=model_config)
    def backend(self):
        return self.tokenizer
"""


def test_tokenizer_of_structured_output_is_made_when_wanted(put: Put) -> None:
    put("vllm/v1/structured_output.py", _MANAGER)
    assert tokenizer.make_structured_output_tokenizer_late()
    module: Any = importlib.import_module("vllm.v1.structured_output")
    good, bad = module.StructuredOutputManager("a model"), module.StructuredOutputManager(None)
    assert module.made == []
    assert good.backend() == good.backend() == "tokenizer of a model"
    assert module.made == ["a model"]
    for _ in range(2):
        with pytest.raises(ValueError, match="no tokenizer"):
            bad.backend()
    good.tokenizer = "another"
    assert good.backend() == "another"


def test_another_vllm_makes_that_tokenizer_itself(put: Put) -> None:
    put("vllm/v1/structured_output.py", "class StructuredOutputManager: pass\n")
    assert not tokenizer.make_structured_output_tokenizer_late()


def test_who_asks_for_a_processor_gets_no_tokenizer(put: Put) -> None:
    put("transformers/models/auto/processing_auto.py", "class AutoTokenizer: pass\n")
    module: Any = importlib.import_module("transformers.models.auto.processing_auto")
    own = module.AutoTokenizer
    with tokenizer.is_no_processor(), pytest.raises(ValueError, match="no processor"):
        module.AutoTokenizer.from_pretrained("a model", trust_remote_code=False)
    assert module.AutoTokenizer is own


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
    made = _tokenizer()
    copied = tokenizer._copy_of_tokenizer(made)
    assert copied.to_str() == made.to_str()
    text = "The capital of Paris <end> zebra"
    assert copied.encode(text).ids == made.encode(text).ids
    assert copied.encode_special_tokens

    before = made.to_str()
    copied.add_tokens(["another"])
    copied.no_padding()
    copied.no_truncation()
    copied.pre_tokenizer = WhitespaceSplit()
    assert made.to_str() == before
    assert made.token_to_id("another") is None


def test_a_tokenizer_whose_added_ids_have_gaps_is_copied_whole() -> None:
    described = json.loads(_tokenizer().to_str())
    described["added_tokens"][-1]["id"] = 20
    made = Tokenizer.from_str(json.dumps(described))
    copied = tokenizer._copy_of_tokenizer(made)
    assert copied.to_str() == made.to_str()
    assert copied.token_to_id("<end>") == made.token_to_id("<end>")


_PARSES = """
import json
def added(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)
dumps = json.dumps
"""


@pytest.fixture
def once() -> Iterator[None]:
    """Modules that are imported meanwhile are changed as in the template process."""
    finder = tokenizer.once()
    sys.meta_path.insert(0, finder)
    yield
    sys.meta_path.remove(finder)


@pytest.mark.usefixtures("once")
def test_of_tokenizer_json_no_more_is_parsed_than_is_used(put: Put, tmp_path: Path) -> None:
    put("transformers/tokenization_utils_base.py", _PARSES)
    module: Any = importlib.import_module("transformers.tokenization_utils_base")
    file, other = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    told = {"version": "1.0", "added_tokens": [{"id": 1, "content": "é"}], "model": {"added_tokens": []}}
    file.write_text(json.dumps(told))
    assert module.added(str(file)) == {"added_tokens": told["added_tokens"]}
    other.write_text(json.dumps(told))
    assert module.added(str(other)) == told
    file.write_text('{"model": {}}')
    assert module.added(str(file)) == {"model": {}}
    file.write_text('{"added_tokens": [')
    with pytest.raises(json.JSONDecodeError):
        module.added(str(file))
    assert module.dumps([1]) == "[1]"
    assert module.json is not json


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values), st.text(), st.sampled_from([None, 1]))
def test_a_member_is_what_json_finds(data: dict[str, Any], name: str, indent: int | None) -> None:
    text = json.dumps(data, indent=indent)
    for key in (*data, name):
        assert tokenizer.member(text, key) == data.get(key)
    assert tokenizer.member(text[:-1], "not in \ud800 there") is None


@given(st.text())
def test_no_text_is_taken_for_json_that_is_none(text: str) -> None:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        assert tokenizer.member(text, "") is None


_HF = """
import copy
calls = []
class TokenizersBackend:
    def __init__(self, backend):
        self._tokenizer = backend
    def get_vocab(self):
        calls.append(1)
        return self._tokenizer.get_vocab(with_added_tokens=True)
class PythonBackend:
    def get_vocab(self):
        calls.append(1)
        return {}
def get_cached_tokenizer(tokenizer):
    cached = copy.copy(tokenizer)
    vocab = tokenizer.get_vocab()
    class Cached(type(tokenizer)):
        def get_vocab(self):
            return vocab
        def __reduce__(self):
            return get_cached_tokenizer, (tokenizer,)
    cached.__class__ = Cached
    return cached
"""


@pytest.mark.usefixtures("once")
def test_copies_share_a_vocabulary_until_one_is_added_to(put: Put) -> None:
    put("vllm/tokenizers/hf.py", _HF)
    module: Any = importlib.import_module("vllm.tokenizers.hf")
    backend = module.TokenizersBackend(_tokenizer())
    vocabulary = backend._tokenizer.get_vocab()
    made = module.get_cached_tokenizer(backend)
    deep = copy.deepcopy(copy.copy(made))
    assert made.get_vocab() == deep.get_vocab() == vocabulary
    assert len(module.calls) == 1
    assert deep._tokenizer is not made._tokenizer
    assert "get_vocab" not in vars(made)
    assert backend.get_vocab() == vocabulary  # asked itself, it looks again
    assert len(module.calls) == 2

    backend._tokenizer.add_tokens(["another"])
    assert "another" in module.get_cached_tokenizer(backend).get_vocab()
    assert "another" not in made.get_vocab()
    assert pickle.loads(pickle.dumps(backend)).get_vocab() == backend._tokenizer.get_vocab()
    assert module.get_cached_tokenizer(module.PythonBackend()).get_vocab() == {}
