"""Errors that a user sees: what failed, why, and what to do next."""

from __future__ import annotations


class ColdstartError(Exception):
    """Base of every error that the CLI prints as one message.

    what: what failed, naming the value; why: the cause; fix: the next step.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(" ".join(part for part in (what, why, fix) if part))


class InputError(ColdstartError):
    """A flag, a spec file or an engine argument is wrong."""

    exit_code = 2


class ModelError(ColdstartError):
    """The model does not exist, is incomplete, or cannot be served or quantized."""

    exit_code = 3


class HostError(ColdstartError):
    """This machine lacks something: Docker Engine, disk space, a tool."""

    exit_code = 4


class BuildError(ColdstartError):
    """A build step failed; `log` is the tail of what the step itself printed."""

    exit_code = 5

    def __init__(self, what: str, *, why: str = "", fix: str = "", log: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.log = log


class VerifyError(ColdstartError):
    """A finished image or a measured run does not hold what it must."""

    exit_code = 6


class RegressionError(ColdstartError):
    """An image starts slower than its baseline, by more than was allowed."""

    exit_code = 7
