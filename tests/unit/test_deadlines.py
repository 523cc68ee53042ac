from __future__ import annotations

import pytest

from runtime.deadlines import Deadlines
from runtime.phases import Phase


@pytest.mark.parametrize(
    ("text", "other", "weight_load"),
    [("30", 30, 30), ("weight_load=3600", 600, 3600), ("30, weight_load=1.5,ready=2", 30, 1.5)],
)
def test_each_phase_has_its_own_or_the_common_limit(text: str, other: float, weight_load: float) -> None:
    deadlines = Deadlines.parse(text)
    assert deadlines.seconds(Phase.ENGINE_IMPORT) == deadlines.seconds(None) == other
    assert deadlines.seconds(Phase.WEIGHT_LOAD) == weight_load
    assert deadlines.shortest == min(30 if "30" in text else 600, weight_load, 2 if "ready" in text else 600)
    assert Deadlines.parse(str(deadlines)) == deadlines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *[
            (text, "seconds above 0")
            for text in ("", "soon", "0", "-1", "nan", "inf", "5,", "ready=", "ready=x")
        ],
        ("5,6", "a number without a phase twice"),
        ("ready=1,ready=1", "gives ready twice"),
        ("weight_laod=5", "did you mean weight_load"),
        ("=5", "they are config_parse, engine_import"),
        # In the report, yet nothing that PID 1 could end.
        ("image_pull=5", "a start does not have"),
    ],
)
def test_anything_else_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Deadlines.parse(text)
