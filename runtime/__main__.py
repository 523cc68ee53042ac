"""Entrypoint of every image: `python3 -m runtime [serve] [FLAGS]` as PID 1, or `… health` for HEALTHCHECK."""

# First of all, so that the clock starts before the imports that it measures.
import time

STARTED = time.time()

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

# The kernel drops signals to a PID 1 that has no handler. Until the supervisor has its own, just leave.
if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(_number, lambda *_: os._exit(0))

EXIT_SETTINGS = 2
EXIT_PREFLIGHT = 3


def _stop(message: str, code: int) -> int:
    print(f"coldstart: {message}", file=sys.stderr, flush=True)
    return code


def main(argv: list[str]) -> int:
    from runtime import settings as settings_module

    command, rest = ("serve", argv)
    if argv and argv[0] in ("serve", "health", "warm"):
        command, rest = argv[0], argv[1:]
    try:
        manifest = settings_module.read_manifest()
        if command == "health":
            from runtime.health import check_pid1

            return check_pid1(manifest)
        output = settings_module.take_output(rest) if command == "warm" else None
        parse_started = time.time()
        settings = settings_module.load(rest, os.environ, manifest)
        api_key = settings_module.read_api_key(os.environ)
    except settings_module.SettingsError as error:
        return _stop(str(error), EXIT_SETTINGS)

    if api_key:
        os.environ["VLLM_API_KEY"] = api_key  # where vLLM looks for it; an argument would be in its log

    from runtime.preflight import PreflightError, check

    try:
        check(manifest)
    except PreflightError as error:
        return _stop(str(error), EXIT_PREFLIGHT)

    if output:
        from runtime.warm import warm

        return warm(settings, rest, output)

    from runtime.supervisor import Supervisor

    return Supervisor(settings, started=STARTED, parsed=(parse_started, time.time())).run()


# Processes forked from the template import this file again under another name.
if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # multiprocessing's own clean-up would print a traceback after the last line
