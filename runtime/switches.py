"""The optimisations of a start. Each can be switched off, to see what it saves or to rule it out as a cause.

Standard library only. A new one is a line here and a question to `on` where it would act: --help,
--print-config, the documentation and `coldstart bench ablate` list it by themselves.
"""

from __future__ import annotations

import enum
import json
import os

VARIABLE = "COLDSTART_OFF"


class Switch(enum.Enum):
    """label: the name that users give; help: what it does while it is on."""

    TEMPLATE = ("template", "vLLM is imported once, and its processes are forked from that one.")
    READ_AHEAD = ("read-ahead", "The files that a start needs are read ahead while Python imports.")
    GC_PAUSE = ("gc-pause", "Python's garbage collector pauses until everything is imported.")
    IMPORT_STRUCTURES = (
        "import-structures",
        "What transformers would find by reading 2,600 files at each import is remembered.",
    )
    OPERATOR_SOURCES = (
        "operator-sources",
        "Where an operator of torch is registered is taken from the frame, not looked up in every module.",
    )
    GENERATED_CODE = (
        "generated-code",
        "The methods that Python generates for data classes are remembered compiled.",
    )
    LATE_VALIDATORS = (
        "late-validators",
        "Pydantic makes what validates a kind of request when the first of that kind comes.",
    )
    QUANTIZATION_METHODS = (
        "quantization-methods",
        "Of vLLM's quantization methods only the model's is imported; that no other wants it is remembered.",
    )
    DEFERRED_IMPORTS = (
        "deferred-imports",
        "Modules that the recorded start did not use are imported when something first needs them.",
    )
    CORE_IMPORTS_LATER = (
        "core-imports-later",
        "What only the engine core needs is imported while the API process already starts. Needs template.",
    )
    INSPECT_IN_FORK = (
        "inspect-in-fork",
        "vLLM looks at the model's class in a fork, not in a new interpreter. Needs template.",
    )
    CORE_BESIDE_TOKENIZER = (
        "core-beside-tokenizer",
        "The engine core starts, and routes are imported, while tokenizers are made.",
    )
    TOKENIZER_ONCE = (
        "tokenizer-once",
        "Tokenizers are parsed once, and copies share that; the engine core makes its own when it is needed.",
    )
    RECORDING = ("recording", "The mode and the compiled code that were recorded for this machine are used.")
    SHORT_WARMUP = (
        "short-warmup",
        "The run that warms up compiled code on CPUs takes a few tokens where nothing is to be compiled.",
    )
    BYTEWISE_REPACK = (
        "bytewise-repack",
        "4-bit weights get the order of the CPU's kernel by moving bytes, not by way of 32-bit integers.",
    )
    LAZY_KV_CACHE = ("lazy-kv-cache", "The kernel zeroes a CPU's KV cache page by page, as it is used.")

    def __init__(self, label: str, help: str) -> None:
        self.label = label
        self.help = help

    @property
    def on(self) -> bool:
        """Whether this start uses it. PID 1 has checked the setting and hands it to every process."""
        return self.label not in os.environ.get(VARIABLE, "").split(",")


LABELS = tuple(switch.label for switch in Switch)


def turn_off(switch: Switch) -> None:
    """For this process and the ones that it starts from now on."""
    os.environ[VARIABLE] = ",".join(filter(None, (os.environ.get(VARIABLE), switch.label)))


def to_json() -> str:
    """The list as `python3 -m runtime switches` prints it: objects with name and help."""
    return json.dumps([{"name": switch.label, "help": switch.help} for switch in Switch])
