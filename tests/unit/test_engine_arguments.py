"""vLLM's arguments: the engine's are parsed without what the app is made of. With parsers made up here."""

from __future__ import annotations

import sys

import pytest

from runtime import engine, trace
from tests.unit.conftest import Put

_FILES = {
    "vllm/utils/argparse_utils.py": """
import argparse, logging
logger = logging.getLogger(__name__)
class FlexibleArgumentParser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):
        if len(set(args)) < len(args):
            logger.warning("Found duplicate keys %s", args)
        return super().parse_args(args, namespace)
""",
    "vllm/engine/arg_utils.py": """
from dataclasses import dataclass
@dataclass
class AsyncEngineArgs:
    max_model_len: int
    flash: bool = True
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--max-model-len", type=int, default=2048)
        return parser
    @classmethod
    def from_cli_args(cls, args):
        return cls(args.max_model_len)
""",
    "vllm/entrypoints/launchers/cli_args.py": """
from vllm.engine.arg_utils import AsyncEngineArgs
def make_arg_parser(parser):
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--tool-call-parser")
    parser.add_argument("--no-flash", action="store_true")
    return AsyncEngineArgs.add_cli_args(parser)
def validate_parsed_serve_args(args):
    if args.tool_call_parser == "none":
        raise ValueError("no such parser")
def propagate_flash_late_interaction(args, engine_args):
    engine_args.flash = not args.no_flash
""",
}
_APP = "vllm.entrypoints.launchers.cli_args"


@pytest.fixture(autouse=True)
def vllm(put: Put) -> None:
    for name, source in _FILES.items():
        put(name, source)


def test_the_engines_own_need_nothing_of_the_app(caplog: pytest.LogCaptureFixture) -> None:
    arguments = engine._Arguments(["--max-model-len", "4", "--max-model-len", "8"])
    assert arguments.of_engine().max_model_len == 8
    assert _APP not in sys.modules
    assert caplog.records == []  # the whole parser will say it
    assert arguments.of_app().max_model_len == 8
    assert arguments.of_app() is arguments.of_app()
    assert [record.getMessage() for record in caplog.records] == [
        "Found duplicate keys ['--max-model-len', '4', '--max-model-len', '8']"
    ]


@pytest.mark.parametrize("other", [["--tool-call-parser", "hermes"], ["--no-flash"]])
def test_where_others_are_given_all_are_parsed(other: list[str]) -> None:
    arguments = engine._Arguments(["--max-model-len", "8", *other])
    assert arguments.of_engine() is None
    engine_args = arguments.of_engine_and_app()
    assert engine_args.max_model_len == 8
    assert engine_args.flash == (other != ["--no-flash"])


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--max-model-len", "many"], "see its message above"),
        (["--max-model"], "see its message above"),
        (["--unheard-of", "3"], "see its message above"),
        (["--tool-call-parser", "none"], "no such parser"),
        (["stray"], "'stray' is not the value"),
    ],
)
def test_what_vllm_does_not_take_is_refused(argv: list[str], reason: str) -> None:
    arguments = engine._Arguments(argv)
    assert arguments.of_engine() is None
    with pytest.raises(engine.RefusedError, match=reason):
        arguments.of_engine_and_app()


def test_what_fails_of_the_app_beside_the_core_is_told_and_not_as_the_starts_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vLLM made up here has no app; it is wanted again later, and fails there if it must."""
    sent: list[dict[str, object]] = []
    monkeypatch.setattr(trace, "_send", sent.append)
    engine._prepare_app(engine._Arguments(["--max-model-len", "8"]), renderer=None)
    assert [message for message in sent if "error" in message] == []
    assert "is imported when it is built: ModuleNotFoundError" in "".join(capsys.readouterr())
