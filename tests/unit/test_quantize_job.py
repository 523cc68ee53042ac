"""The job's own arithmetic; what needs torch is tested with real models in tests/image."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.quantize_job import (
    HELD_OUT_PROMPTS,
    PROMPTS,
    _prompts,
    _report_layers,
    document_blocks,
    require_whole,
    split_blocks,
)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return self("".join(message["content"] for message in chat))


def test_text_to_measure_on_comes_from_other_prompts() -> None:
    assert not set(PROMPTS) & set(HELD_OUT_PROMPTS)


def test_documents_become_blocks_of_one_length() -> None:
    documents = ["abcd", [{"role": "user", "content": "efgh"}], "ij"]
    assert document_blocks(Bytes(), documents, samples=9, tokens=3) == [
        list(b"abc"),
        list(b"def"),
        list(b"ghi"),
    ]
    with pytest.raises(SystemExit, match="has 10 tokens; one block needs 16"):
        document_blocks(Bytes(), documents, samples=9, tokens=16)


class Chatty:
    """A tokenizer that keeps what it is asked for."""

    chat_template = "{{ messages }}"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def apply_chat_template(self, chats: Any, **how: Any) -> str:
        self.asked.append((chats, how))
        return "a batch"


def test_models_with_a_chat_template_are_asked_through_it() -> None:
    tokenizer = Chatty()
    assert _prompts(tokenizer, PROMPTS, len(PROMPTS) - 1, 2) == "a batch"
    [(chats, how)] = tokenizer.asked
    assert chats == [[{"role": "user", "content": prompt}] for prompt in (PROMPTS[-1], PROMPTS[0])]
    # Without the last words of the template the model would continue the question.
    assert (how["add_generation_prompt"], how["tokenize"], how["padding"]) == (True, True, True)


def test_model_whose_files_lack_tensors_is_not_quantized() -> None:
    layers = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(7)]
    with pytest.raises(SystemExit, match=r"files lack model\.layers\.0.*model\.layers\.4\S* and 2 more\."):
        require_whole(set(layers), ())
    with pytest.raises(SystemExit, match=r"lack lm_head\.weight\.$"):
        require_whole({"lm_head.weight", "model.vision_tower.head.weight"}, ("vision_tower",))
    require_whole({"model.vision_tower.head.weight"}, ("vision_tower",))
    require_whole((), ())


@given(count=st.integers(1, 60), samples=st.integers(0, 40))
def test_nothing_measured_on_was_calibrated_on(count: int, samples: int) -> None:
    blocks = [[i] for i in range(count)]
    kept, held_out = split_blocks(blocks, samples, 8)
    assert not {block[0] for block in kept} & {block[0] for block in held_out}
    assert len(kept) <= samples
    assert len(kept) >= min(samples, count - count // 5 - 8)
    if count >= 8 + max(samples, 8):
        assert held_out == [[i] for i in range(1, 16, 2)]
        assert len(kept) == samples
    else:
        assert len(held_out) == min(8, count // 5)


def test_every_pass_over_the_layers_is_reported() -> None:
    class First:
        def on_sequential_epoch_end(self) -> None: ...

    class Second(First):
        pass

    told: list[tuple[float, str]] = []
    first, second = First(), Second()
    _report_layers([first, second], 2, lambda done, detail: told.append((done, detail)))
    for modifier in (first, first, first, second, second):
        modifier.on_sequential_epoch_end()
    assert told == [
        (0.25, "layer 1 of 2, pass 1 of 2"),
        (0.5, "layer 2 of 2, pass 1 of 2"),
        (0.5, "layer 2 of 2, pass 1 of 2"),
        (0.75, "layer 1 of 2, pass 2 of 2"),
        (1.0, "layer 2 of 2, pass 2 of 2"),
    ]
