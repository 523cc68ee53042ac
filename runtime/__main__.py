"""Entrypoint of every image: `python3 -m runtime [serve] [FLAGS]` as PID 1.

`… health` is for HEALTHCHECK, `… fetch` is the download that PID 1 starts beside itself, `… switches` prints
the optimisations that --off can name, as JSON, `… golden` whether the running server answers as recorded.
"""

# First of all, so that the clock starts before the imports that it measures.
import time

STARTED = time.time()

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.settings import Settings, VllmArgument, WarmOptions

# The kernel drops signals to a PID 1 that has no handler. Until the supervisor has its own, just leave.
if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(_number, lambda *_: os._exit(0))

EXIT_SETTINGS = 2
EXIT_PREFLIGHT = 3
EXIT_PORT = 5
_PRINT_CONFIG = ("--print-config", "--print-config=text", "--print-config=json")


def _stop(message: str, code: int) -> int:
    from runtime import logs

    # The JSON of a start that is refused goes where that of every other goes.
    logs.say(f"exit {code}: {message}", "error", stream=sys.stdout if logs.is_json() else None)
    return code


def main(argv: list[str]) -> int:
    from runtime import logs
    from runtime import settings as settings_module

    command, rest = ("serve", argv)
    if argv and argv[0] in settings_module.COMMANDS:
        command, rest = argv[0], argv[1:]
    # What is said before the settings are known, or because they are wrong, has the format asked for too.
    asked = " ".join(rest).replace("=", " ").replace("_", "-")
    wants_json = "--log-format json" in asked or os.environ.get("COLDSTART_LOG_FORMAT") == "json"
    logs.begin("json" if wants_json else "text")
    try:
        if command == "health":
            from runtime.health import check_pid1

            return check_pid1(settings_module.read_manifest())
        if command == "fetch":
            from runtime import fetch

            return fetch.main(settings_module.read_manifest())
        if command == "golden":
            from runtime import golden_check

            return golden_check.main(settings_module.read_manifest())
        if command == "switches":
            from runtime import switches

            print(switches.to_json())
            return 0
        if {"-h", "--help"} & set(rest):
            print(settings_module.help_text(settings_module.read_vllm_arguments()))
            return 0
        return _serve(rest, settings_module.take_warm_options(rest) if command == "warm" else None)
    except settings_module.SettingsError as error:
        return _stop(str(error), EXIT_SETTINGS)


def _serve(argv: list[str], recorded: "WarmOptions | None") -> int:
    """Serve, or record a start. Raises SettingsError."""
    from contextlib import nullcontext
    from dataclasses import replace
    from pathlib import Path

    from runtime import logs, prefetch, state, switches
    from runtime import settings as settings_module
    from runtime.listener import bind
    from runtime.switches import Switch

    parse_started = time.time()
    manifest = settings_module.read_manifest()
    flags = [argument for argument in argv if argument not in _PRINT_CONFIG]
    known = settings_module.read_vllm_arguments()
    settings = settings_module.load(flags, os.environ, manifest, known)
    serves = recorded is None and len(flags) == len(argv)
    try:
        # Before anything that may take its time, such as asking for the GPUs: what connects now, waits until
        # the supervisor answers, and that looks at the machine meanwhile.
        listener = bind(settings.host, settings.port) if serves else None
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        return _stop(
            f"cannot listen on {where}: {error.strerror}. Free the port or choose another with --port.",
            EXIT_PORT,
        )
    if listener is None:
        return _look(settings, argv, flags, known, recorded)
    os.environ[switches.VARIABLE] = ",".join(settings.off)
    if Switch.READ_AHEAD.on:
        # What is downloaded, and verified, is read by that.
        shards = manifest.shards if manifest.weights != "download" else ()
        prefetch.start(Path(manifest.model_path), shards, state.folder())
    settings = replace(settings, api_keys=settings_module.read_api_keys(settings, os.environ))
    parsed = (parse_started, time.time())
    logs.begin(settings.log_format)

    from runtime.supervisor import Supervisor

    with logs.as_json() if settings.log_format == "json" else nullcontext():
        return Supervisor(settings, listener, started=STARTED, parsed=parsed).run()


def _look(
    settings: "Settings",
    argv: list[str],
    flags: list[str],
    known: "Sequence[VllmArgument]",
    recorded: "WarmOptions | None",
) -> int:
    """`warm` and --print-config, which look at the machine first. Raises SettingsError."""
    from dataclasses import replace

    from runtime import logs, modes, preflight
    from runtime import settings as settings_module

    facts = preflight.gather(settings.manifest)
    settings, _ = modes.find_recording(settings, facts, os.environ)
    settings = replace(settings, api_keys=settings_module.read_api_keys(settings, os.environ))
    if recorded is None:
        as_json = "--print-config=json" in argv
        print(settings_module.describe(settings, os.environ, known, as_json=as_json))
        return 0
    logs.begin(settings.log_format)
    try:
        preflight.check(settings, facts, os.environ)
    except preflight.PreflightError as error:
        return _stop(str(error), EXIT_PREFLIGHT)

    from runtime.warm import warm

    insisted = modes.named(settings, recorded.mode) if recorded.mode else None
    return warm(settings, flags, facts, recorded.output, insisted, loaders=recorded.loaders)


# Processes forked from the template import this file again under another name.
if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # multiprocessing's own clean-up would print a traceback after the last line
