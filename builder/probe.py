"""Scripts that run inside a base image with its own Python, to ask what it has. Text in, JSON out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from builder.errors import InputError

# vLLM is only looked for, not imported: its version stands in a file of its own.
BASE_FACTS = """
import importlib.util, json, pathlib, re, sys
spec = importlib.util.find_spec("vllm")
version = None
if spec and spec.origin:
    path = pathlib.Path(spec.origin).parent / "_version.py"
    text = path.read_text() if path.exists() else ""
    found = re.search(r"^__version__\\s*=\\s*(?:version\\s*=\\s*)?['\\"]([^'\\"]+)", text, re.M)
    version = found.group(1) if found else "unknown"
print(json.dumps({"python": list(sys.version_info[:2]), "vllm": version}))
"""

# argparse prints the reason to stderr and exits 2.
PARSE_ENGINE_ARGS = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser(prog="vllm", usage="", allow_abbrev=False)
args = make_arg_parser(parser).parse_args(sys.argv[1:])
try:
    validate_parsed_serve_args(args)
except (TypeError, ValueError) as error:
    sys.exit(f"error: {error}")
"""

# Prints one JSON list: every argument of the parser that the runtime uses, with the first words of its help.
LIST_ENGINE_ARGS = """
import json, re, sys
sys.argv.append("--help")  # else vLLM leaves the help texts out
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser(prog="vllm", allow_abbrev=False))
titles = {id(a): g.title for g in parser._action_groups for a in g._group_actions}
found = [
    {
        "group": titles.get(id(action)) or "options",
        "flags": list(action.option_strings),
        "help": " ".join(re.sub(r"API docs: \\S+", "", action.help or "").split(". ")[0].split())[:300],
    }
    for action in parser._actions
    if action.option_strings
]
print(json.dumps(sorted(found, key=lambda entry: (entry["group"], entry["flags"]))))
"""


@dataclass(frozen=True)
class BaseFacts:
    """python: (major, minor); vllm: its version."""

    python: tuple[int, int]
    vllm: str


def parse_base_facts(reference: str, output: str) -> BaseFacts:
    """Raises InputError when the base cannot carry the runtime."""
    try:
        data = json.loads(output.strip().splitlines()[-1])
        python = (int(data["python"][0]), int(data["python"][1]))
    except (IndexError, ValueError, KeyError, TypeError):
        raise InputError(
            f"the base image {reference} has no usable python3", why=output.strip()[-200:], fix=_OTHER_BASE
        ) from None
    if python < (3, 11):
        raise InputError(
            f"the base image {reference} has Python {python[0]}.{python[1]}",
            why="The runtime needs 3.11.",
            fix=_OTHER_BASE,
        )
    if not data["vllm"]:
        raise InputError(f"the base image {reference} has no vLLM", fix=_OTHER_BASE)
    return BaseFacts(python, str(data["vllm"]))


def parse_argument_list(output: str) -> str | None:
    """The JSON list among what LIST_ENGINE_ARGS printed; None where that vLLM cannot list its arguments."""
    for line in reversed(output.splitlines()):
        if line.startswith("[{"):
            try:
                return json.dumps(json.loads(line), indent=1) + "\n"
            except ValueError:
                return None
    return None


_OTHER_BASE = "Use vllm/vllm-openai at a version, or make a CPU base with `coldstart base cpu`."


def parser_complaint(output: str) -> str:
    """The one line of argparse's output that says what is wrong."""
    lines = [re.sub(r"^\S*:?\s*error:\s*", "", line) for line in output.splitlines() if "error:" in line]
    return lines[-1].strip() if lines else output.strip()[-300:]
