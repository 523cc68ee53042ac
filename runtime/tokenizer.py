"""What vLLM and transformers do several times with a tokenizer, done once, or when it is first wanted.

Like runtime/shortcuts.py: functions of libraries are replaced, no answer changes, and a release that lacks a
function goes without.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import pickle
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

from runtime.shortcuts import AfterImport

_SPACE = re.compile(r"[ \t\n\r]*")
_VOCABULARY = "_coldstart_vocabulary"


def once() -> AfterImport:
    """A tokenizer's file is parsed once, and its copies share what is in it. To be put on sys.meta_path."""
    return AfterImport(
        {
            "tokenizers": _copy_quickly,
            "transformers.tokenization_utils_base": _read_added_tokens_alone,
            "vllm.tokenizers.hf": _share_vocabularies,
        }
    )


def _copy_quickly(module: Any) -> None:
    """A copy shares the model behind a tokenizer, vocabulary and merges, which nobody changes.

    tokenizers itself writes a copy as JSON and parses that. transformers and vLLM make three of each.
    """
    if hasattr(module, "Tokenizer"):
        module.Tokenizer.__deepcopy__ = lambda tokenizer, _memo: _copy_of_tokenizer(tokenizer)


def _copy_of_tokenizer(tokenizer: Any) -> Any:
    copied = type(tokenizer)(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (own := getattr(tokenizer, part)) is not None:
            setattr(copied, part, copy.deepcopy(own))
    if tokenizer.truncation:
        copied.enable_truncation(**tokenizer.truncation)
    if tokenizer.padding:
        copied.enable_padding(**tokenizer.padding)
    added = tokenizer.get_added_tokens_decoder()
    # In the order of their ids, which are given out in turn.
    in_turn = (added[number] for number in sorted(added))
    for special, tokens in itertools.groupby(in_turn, lambda token: bool(token.special)):
        (copied.add_special_tokens if special else copied.add_tokens)(list(tokens))
    copied.encode_special_tokens = tokenizer.encode_special_tokens
    if copied.get_added_tokens_decoder() != added:  # ids with gaps
        return pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - as tokenizers does it
    return copied


def _read_added_tokens_alone(module: Any) -> None:
    """transformers parses all of tokenizer.json for its few added tokens, before tokenizers parses it."""

    def load(file: Any, **how: Any) -> Any:
        if how or not str(getattr(file, "name", "")).endswith("/tokenizer.json"):
            return json.load(file, **how)
        text = file.read()
        added = member(text, "added_tokens")
        return json.loads(text) if added is None else {"added_tokens": added}

    module.json = SimpleNamespace(**{**vars(json), "load": load})


def member(text: str, name: str) -> Any:
    """The value of this name in a JSON object, of which no more is parsed than comes before it.

    None where there is none, or where the text is no JSON object as far as it was read.
    """

    def after(at: int, sign: str) -> int:
        at = space(at)
        if text[at : at + 1] != sign:
            raise ValueError(sign)
        return space(at + 1)

    def space(at: int) -> int:
        found = _SPACE.match(text, at)
        return found.end() if found else at

    decode = json.JSONDecoder().raw_decode
    try:
        at = after(0, "{")
        while True:
            key, at = decode(text, at)
            value, at = decode(text, after(at, ":"))
            if key == name:
                return value
            at = after(at, ",")
    except ValueError:
        return None


class _Vocabulary:
    """What get_vocab returns, kept by a tokenizer and all its copies until one is added to."""

    def __init__(self) -> None:
        self._found: dict[int, dict[str, int]] = {}

    def of(self, tokenizer: Any) -> dict[str, int]:
        size = tokenizer._tokenizer.get_vocab_size(True)
        if size not in self._found:
            self._found = {size: type(tokenizer).get_vocab(tokenizer)}
        return self._found[size]

    def __deepcopy__(self, _memo: Any) -> _Vocabulary:
        return self

    def __reduce__(self) -> Any:
        return _Vocabulary, ()  # another process finds its own


def _share_vocabularies(module: Any) -> None:
    """vLLM keeps a tokenizer's vocabulary as a dict, and asks for it anew for each copy."""
    make = getattr(module, "get_cached_tokenizer", None)
    backend = getattr(module, "TokenizersBackend", None)
    if make is None or backend is None:
        return

    def make_once(tokenizer: Any) -> Any:
        if not isinstance(tokenizer, backend):
            return make(tokenizer)
        vocabulary = vars(tokenizer).setdefault(_VOCABULARY, _Vocabulary())
        vars(tokenizer)["get_vocab"] = lambda: vocabulary.of(tokenizer)
        try:
            made = make(tokenizer)
        finally:
            del vars(tokenizer)["get_vocab"]
        vars(made).pop("get_vocab", None)  # it was copied with the rest; the class has its own
        return made

    module.get_cached_tokenizer = make_once


@contextmanager
def is_no_processor() -> Iterator[None]:
    """While the block runs, who asks transformers for a model's processor gets no tokenizer instead.

    vLLM asks for that of a text model too, for a chat template, and has no use for a second tokenizer.
    """
    module: Any = importlib.import_module("transformers.models.auto.processing_auto")
    tokenizer = module.AutoTokenizer

    class NoTokenizer:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> NoReturn:
            raise ValueError("a tokenizer is no processor")

    module.AutoTokenizer = NoTokenizer
    try:
        yield
    finally:
        module.AutoTokenizer = tokenizer


def make_structured_output_tokenizer_late() -> bool:
    """Let the engine core make its tokenizer for the first request that needs it, one of structured output.

    False where this vLLM lacks the function. To be called once vLLM is imported.
    """
    module: Any = importlib.import_module("vllm.v1.structured_output")
    manager = getattr(module, "StructuredOutputManager", None)
    make = vars(module).get("cached_tokenizer_from_config")
    if manager is None or make is None:
        return False
    lock = threading.Lock()

    def get(self: Any) -> Any:
        with lock:
            kept = vars(self)["_tokenizer"]
            if isinstance(kept, partial):
                kept = vars(self)["_tokenizer"] = kept()
            return kept

    def keep(self: Any, made: Any) -> None:
        vars(self)["_tokenizer"] = made

    module.cached_tokenizer_from_config = partial(partial, make)
    manager.tokenizer = property(get, keep)
    return True
