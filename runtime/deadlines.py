"""How long a start may go without a sign of progress, phase by phase. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.defaults import PHASE_TIMEOUT_SECONDS
from runtime.phases import Phase

# Those that PID 1 watches: what lies before them is over in a moment or is not in the container.
PHASES = (
    *(Phase.CONFIG_PARSE, Phase.ENGINE_IMPORT, Phase.MODEL_DOWNLOAD, Phase.ENGINE_INIT, Phase.WEIGHT_LOAD),
    *(Phase.COMPILE, Phase.KV_CACHE_ALLOC, Phase.GRAPH_CAPTURE, Phase.TOKENIZER_INIT, Phase.READY),
)


@dataclass(frozen=True)
class Deadlines:
    """default: seconds for a phase that is not in `phases`, and between two phases."""

    default: float = PHASE_TIMEOUT_SECONDS
    phases: Mapping[Phase, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Deadlines:
        """From "600", "weight_load=3600" or "600,weight_load=3600,compile=1800". Raises ValueError."""
        default: float | None = None
        phases: dict[Phase, float] = {}
        for entry in text.split(","):
            name, equals, value = (part.strip() for part in entry.rpartition("="))
            phase, seconds = _phase(name) if equals else None, _seconds(value)
            if phase in phases or (phase is None and default is not None):
                raise ValueError(f"gives {name or 'a number without a phase'} twice")
            if phase is None:
                default = seconds
            else:
                phases[phase] = seconds
        return cls(PHASE_TIMEOUT_SECONDS if default is None else default, phases)

    def seconds(self, phase: Phase | None) -> float:
        """phase: the one under way, None between two."""
        return self.phases.get(phase, self.default) if phase else self.default

    @property
    def shortest(self) -> float:
        return min((self.default, *self.phases.values()))

    def __str__(self) -> str:
        return ",".join([f"{self.default:g}", *(f"{phase}={s:g}" for phase, s in self.phases.items())])


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError("must give seconds above 0, as in 600,weight_load=3600")
    return value


def _phase(name: str) -> Phase:
    known = [phase.value for phase in PHASES]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"they are {', '.join(known)}"
        raise ValueError(f"names the phase {name!r}, which a start does not have ({hint})")
    return Phase(name)
