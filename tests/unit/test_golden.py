"""Golden answers: rounding passes, another answer and a numeric defect do not."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from runtime import golden
from runtime.golden import Answer, compare


def answer(*tokens: str, noise: float = 0.0, other: str = "z", tie: float = 3.0) -> Answer:
    """Each token is likelier than `other` by `tie`."""
    return Answer(tokens, tuple({token: -1.0 - noise, other: -1.0 - tie} for token in tokens))


def test_the_same_answers_pass() -> None:
    said = compare([answer("a", "b")], [answer("a", "b")])
    assert said.ok
    assert (said.same, said.mean, said.worst_tie) == (1, 0.0, 0.0)
    assert "1 of 1 answers the same" in said.describe()


def test_answers_that_part_at_a_near_tie_pass_and_what_follows_is_not_compared() -> None:
    reference = Answer(("a", "b", "c"), ({"a": -0.1}, {"b": -1.0, "x": -1.2}, {"c": -0.1}))
    candidate = Answer(("a", "x", "q"), ({"a": -0.1}, {"x": -1.1, "b": -1.15}, {"q": -9.0}))
    said = compare([reference], [candidate])
    assert said.ok
    assert said.same == 0
    assert said.worst_tie == pytest.approx(0.2)


@pytest.mark.parametrize("likely_there", [{"x": -0.5, "b": -4.0}, {"x": -0.5}])
def test_a_token_that_the_reference_finds_far_less_likely_is_refused(likely_there: dict[str, float]) -> None:
    reference = Answer(("a", "b"), ({"a": -0.1}, {"b": -1.0, "x": -1.1}))
    said = compare([reference], [Answer(("a", "x"), ({"a": -0.1}, likely_there))])
    assert not said.ok
    assert "far less likely" in said.describe()


def test_an_answer_that_begins_differently_is_refused_and_named() -> None:
    reference = Answer(("The", "c"), ({"The": -1.81, "L": -1.94}, {"c": -1.0}))
    other = Answer(("L", "c"), ({"L": -1.9, "The": -1.9}, {"c": -1.0}))
    said = compare([reference] * 11, [other, *[reference] * 10])
    assert not said.ok
    assert said.begun_differently == (0,)
    assert "What is the capital of France?" in said.describe()
    assert said.to_json()["begun_differently"] == ["'What is the capital of France?'"]


def test_log_probabilities_that_differ_everywhere_are_refused() -> None:
    said = compare([answer(*"abcd")] * 8, [answer(*"abcd", noise=0.1)] * 8)
    assert not said.ok
    assert said.mean == pytest.approx(0.1)
    assert "on average" in said.describe()


def test_a_seeded_defect_of_one_layer_is_refused_and_rounding_is_not() -> None:
    """Logits of a random model; bf16 rounding of them, and a layer that is scaled wrong."""
    generator = random.Random(7)
    prompts, steps, words = 34, 64, 50

    def answers(change: float, defect: float) -> list[Answer]:
        noise = random.Random(8)
        made = []
        for prompt in range(prompts):
            tokens, tops = [], []
            for step in range(steps):
                row = logits[prompt][step]
                changed = [
                    value * (1 + defect * (index % 3 == 0)) + noise.uniform(-change, change)
                    for index, value in enumerate(row)
                ]
                total = math.log(sum(math.exp(value) for value in changed))
                likely = sorted(range(words), key=lambda i: -changed[i])[:5]
                tokens.append(str(likely[0]))
                tops.append({str(i): changed[i] - total for i in likely})
            made.append(Answer(tuple(tokens), tuple(tops)))
        return made

    # The first token is decided by far, as most are.
    logits = [
        [
            [generator.gauss(0, 3) + 12 * (step == 0 and word == prompt % words) for word in range(words)]
            for step in range(steps)
        ]
        for prompt in range(prompts)
    ]
    reference = answers(0.0, 0.0)
    assert compare(reference, answers(0.03, 0.0)).ok
    assert not compare(reference, answers(0.03, 0.08)).ok


def test_answers_survive_the_disk(tmp_path: Path) -> None:
    written = [answer("a", "b"), answer("c")]
    golden.write(tmp_path / golden.FILE, written)
    assert golden.read(tmp_path / golden.FILE) == written


def test_there_are_chats_among_at_least_32_prompts() -> None:
    assert len(golden._CHATS) >= 8
    assert len(golden._CHATS) + len(golden._TEXTS) >= 32
    assert golden.TOKENS == 64
