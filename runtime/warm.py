"""`python3 -m runtime warm --output FOLDER [--mode NAME] [--loaders] [FLAGS]`: records a start of the server.

First each mode that may serve here, or only the one that is named: its golden answers against those of a
plain eager start, its speed, and what it compiles. With `--loaders`, starts from a cold page cache, with each
of vLLM's ways of loading weights. Then, with the best one, a last start from its own recording, which lists
the files that a start opens and proves that nothing is compiled again. For `coldstart prewarm`, which adds
the folder to the image. Works in any container engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from runtime import deferred, fingerprint, golden, logs, metas, modes, quantization_methods, record, state
from runtime.modes import Measured
from runtime.phases import Phase
from runtime.prefetch import FILE_LIST
from runtime.preflight import Facts
from runtime.processes import descendants
from runtime.settings import Settings
from runtime.state import Mode, Recording
from runtime.switches import VARIABLE as OFF
from runtime.switches import Switch

_POLL_SECONDS = 0.2
_STOP_SECONDS = 60
EXIT_WRONG = 1
# Of each loader, in turns.
_LOADER_STARTS = 3
# Of the weights, that a start reads from the disk when they have left the page cache.
_COLD_SHARE = 0.9
_POOLING = ("/v1/embeddings", "/classify", "/pooling")  # a server has some of them, by its model
# What touches weights or KV cache, and could make an answer wrong: the reference goes without.
_COULD_BE_WRONG = (Switch.BYTEWISE_REPACK, Switch.LAZY_KV_CACHE, Switch.SHORT_WARMUP)


class WarmError(Exception):
    """The server did not start, or not as recorded. code: what to exit with."""

    def __init__(self, message: str, code: int = EXIT_WRONG) -> None:
        super().__init__(message)
        self.code = code


def warm(
    settings: Settings,
    argv: Sequence[str],
    facts: Facts,
    output: Path,
    insisted: Mode | None = None,
    *,
    loaders: bool = False,
) -> int:
    """Exit code 0 when `output` is complete; else the server's own. facts: as preflight found them.

    insisted: the mode to record, if it answers right, in place of the one that `--optimize` would choose.
    loaders: look for the quickest way of loading the weights, too.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="coldstart-warm-") as folder:
            _Warm(settings, argv, facts, output, Path(folder)).run(insisted, loaders=loaders)
    except WarmError as error:
        logs.say(f"warm: not recorded: {error}", "error")
        return error.code
    return 0


class _Warm:
    def __init__(
        self, settings: Settings, argv: Sequence[str], facts: Facts, output: Path, folder: Path
    ) -> None:
        self._settings, self._argv, self._facts = settings, argv, facts
        self._output, self._folder = output, folder
        self._url = f"http://127.0.0.1:{settings.port}"
        self._generates, self._chat = True, False
        self._golden: dict[str, list[golden.Answer]] = {}
        self._report: dict[str, Any] = {"optimize": settings.manifest.optimize, "modes": []}

    def run(self, insisted: Mode | None, *, loaders: bool) -> None:
        if insisted:
            chosen = insisted
            self._hold_to_eager(insisted)
        else:
            chosen = self._compare(modes.candidates(self._settings)).mode
        self._report["chosen"] = chosen.name
        arguments = self._quickest_loader() if loaders else ()
        logs.say(f"warm: recording a start: {chosen.name}")
        self._record(chosen, arguments)

    def _compare(self, candidates: Sequence[Mode]) -> Measured:
        """The best mode. Each is held against an eager start of its dtype."""
        optimize = self._settings.manifest.optimize
        eager = self._refer(modes.eager(self._settings))
        if not self._generates:
            return self._as_vllm_does()
        right = []
        for mode in candidates:
            reference = modes.reference(mode)
            if reference.name not in self._golden:
                self._refer(reference)
            if measured := self._try(mode):
                right.append(measured)
            if measured and optimize != "throughput":
                break  # the first is preferred; the others are for where it answers differently
        chosen = modes.choose(optimize, eager, right)
        fastest = max((eager, *right), key=lambda one: one.rate)
        gain, loss = chosen.rate / eager.rate - 1, chosen.rate / fastest.rate - 1
        self._report |= {
            "tokens_per_second": chosen.rate,
            "against_eager": gain,
            "against_fastest": loss,
        }
        others = (
            f"{gain:+.0%} against eager, {loss:+.0%} against the fastest that answers right "
            f"({fastest.mode.name})"
            if candidates
            else "no other way was tried: `coldstart prewarm IMAGE --mode NAME` measures one, in minutes"
        )
        served = f"{chosen.mode.name}: {chosen.rate:.0f} tokens/s"
        logs.say(f"warm: --optimize {optimize} serves with {served}; {others}")
        return chosen

    def _as_vllm_does(self) -> Measured:
        """For models that generate nothing which could be compared or counted: embeddings, scores."""
        mode = modes.unrecorded(self._settings)
        logs.say(f"warm: the model generates no text to hold other ways of running to; {mode.name} is taken")
        if not self._cache(mode).is_dir():
            with self._server(mode):
                self._ask_once()
        return Measured(mode, 0.0)

    def _hold_to_eager(self, mode: Mode) -> None:
        eager = self._refer(modes.reference(mode))
        if not self._generates:
            if mode != eager.mode:
                raise WarmError(f"--mode {mode.name}: the model generates no text to hold it to")
            return
        measured = eager if mode == eager.mode else self._try(mode)
        if measured is None:
            raise WarmError(f"--mode {mode.name} is refused, see above")
        self._report |= {
            "tokens_per_second": measured.rate,
            "against_eager": measured.rate / eager.rate - 1,
        }

    def _try(self, mode: Mode) -> Measured | None:
        """None where it answers differently from eager of its dtype, which was asked already."""
        logs.say(f"warm: trying {mode.name}: the first start compiles, which takes minutes")
        with self._server(mode):
            said = golden.compare(self._golden[modes.reference(mode).name], self._ask())
            if said.ok:
                return self._measure(mode, said)
            self._tell(mode, said, None)
            return None

    def _refer(self, mode: Mode) -> Measured:
        with self._server(mode, off=_COULD_BE_WRONG):
            model = self._settings.served_model_name
            self._generates = golden.generates(self._url, model)
            if not self._generates:
                self._ask_once()
                return Measured(mode, 0.0)
            self._chat = golden.has_chat(self._url, model)
            self._golden[mode.name] = self._ask()
            return self._measure(mode)

    def _ask(self) -> list[golden.Answer]:
        return golden.ask(self._url, self._settings.served_model_name, chat=self._chat)

    def _measure(self, mode: Mode, said: golden.Comparison | None = None) -> Measured:
        rate = golden.tokens_per_second(self._url, self._settings.served_model_name)
        self._tell(mode, said, rate)
        return Measured(mode, rate)

    def _tell(self, mode: Mode, said: golden.Comparison | None, rate: float | None) -> None:
        self._report["modes"].append(
            {"mode": mode.name, "golden": said.to_json() if said else None, "tokens_per_second": rate}
        )
        judgement = said.describe() if said else "the reference"
        speed = f"{rate:.0f} tokens/s" if rate else "refused"
        logs.say(f"warm: {mode.name}: {speed}; {judgement}")

    def _quickest_loader(self) -> tuple[str, ...]:
        """Engine arguments of the loader with which eager starts from a cold page cache are ready soonest.

        None, which is vLLM's own choice, unless another is sooner by more than chance.
        """
        own = "vLLM's own"
        loaders = {own: (), **modes.loaders(self._settings)}
        if len(loaders) == 1:
            logs.say("warm: the arguments say how weights are loaded; no other way is tried")
            return ()
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(_LOADER_STARTS):
            for name in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
                try:
                    seconds[name].append(self._cold_start(f"{name}-{turn}", loaders[name]))
                except WarmError as error:
                    if name == own:
                        raise
                    logs.say(f"warm: loader {name} is left out: {error}", "warning")
                    del seconds[name]
        best = min(seconds, key=lambda name: median(seconds[name]))
        # Each of its starts before each of theirs; anything else may be the disk's mood.
        chosen = best if max(seconds[best]) < min(seconds[own]) else own
        told = ", ".join(f"{name} {median(values):.1f} s" for name, values in seconds.items())
        logs.say(f"warm: ready from a cold page cache with the loader {told}; taken: {chosen}")
        self._report |= {"loader": chosen, "loaders": seconds}
        return loaders[chosen]

    def _cold_start(self, name: str, arguments: tuple[str, ...]) -> float:
        """Seconds to ready of an eager start whose weights are on the disk only."""
        weights = list(Path(self._settings.manifest.model_path).glob("*.safetensors"))
        for path in weights:
            _forget(path)
        eager = modes.eager(self._settings)
        mode = replace(eager, name=f"loader-{name}", engine_args=(*eager.engine_args, *arguments))
        with self._server(mode) as pid:
            seconds = float(golden.get(f"{self._url}/startup")["elapsed"])
            size, read = sum(map(_size, map(str, weights))), sum(map(_read_bytes, (pid, *descendants(pid))))
        if read < size * _COLD_SHARE:
            logs.say(
                f"warm: a start that was to be cold read {read >> 20} MiB of {size >> 20} MiB of weights "
                "from the disk; the rest was in memory still",
                "warning",
            )
        return seconds

    def _record(self, mode: Mode, arguments: tuple[str, ...] = ()) -> None:
        """Write the recording of `mode`, start from it, and prove that the start used it.

        arguments: of the engine, that no answer and no compiled code depends on.
        """
        answers = self._golden.get(modes.reference(mode).name)
        cache = self._cache(mode)
        recording = self._write(replace(mode, engine_args=(*mode.engine_args, *arguments)), cache)
        if answers:
            golden.write(recording.folder / golden.FILE, answers)
        environment = {record.VARIABLE: str(self._output), state.FOLDER_VARIABLE: str(self._output)}
        with self._server(None, environment) as pid:
            startup = golden.get(f"{self._url}/startup")
            if startup["recording"]["status"] != "used":
                raise WarmError(f"the start did not use its own recording: {startup['recording']['reason']}")
            compiled = [event["detail"] for event in startup["phases"] if event["phase"] == Phase.COMPILE]
            if missed := [detail for detail in compiled if not detail.startswith("loaded")]:
                raise WarmError(f"vLLM compiled again what was recorded ({missed[0]})")
            if recording.has_compiled_code and not compiled:
                # No news is no proof.
                raise WarmError("vLLM does not say that it loaded the compiled code that was recorded")
            # Before the golden prompts, whose log-probabilities have vLLM import torch's compiler.
            self._ask_once()
            self._write_file_list(pid)
            touched = self._touched()
            if answers:
                said = golden.compare(answers, self._ask())
                if not said.ok:
                    raise WarmError(f"a start from the recording {said.describe()}")
                self._report["golden"] = said.to_json()
        if touched is not None:
            (self._output / deferred.TOUCHED).write_text(touched)
        self._report |= {"loaded": compiled, "ready_seconds": startup["elapsed"]}
        replace(recording, report=self._report).write()

    def _write(self, mode: Mode, cache: Path) -> Recording:
        names = tuple(json.loads((cache / record.VARIABLES).read_text()))
        here = fingerprint.gather(
            self._settings, os.environ, names, gpus=self._facts.gpus, driver=self._facts.driver
        )
        folder = self._output / state.RECORDINGS / state.key(here)
        shutil.rmtree(folder, ignore_errors=True)
        files: dict[str, tuple[int, str, int]] = {}
        for variable_folder in sorted(set(state.CACHE_VARIABLES.values())):
            for path, data, changed in state.collect(cache / variable_folder):
                name = f"{variable_folder}/{path}"
                target = folder / state.FILES / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                files[name] = (len(data), hashlib.sha256(data).hexdigest(), changed)
        folder.mkdir(parents=True, exist_ok=True)
        recording = Recording(folder, here, names, mode, files, self._report)
        recording.write()
        return recording

    def _cache(self, mode: Mode) -> Path:
        """The folder with what a server of this mode compiled."""
        return self._folder / mode.name

    @contextmanager
    def _server(
        self,
        mode: Mode | None,
        environment: Mapping[str, str] | None = None,
        off: Sequence[Switch] = (),
    ) -> Iterator[int]:
        """A server while the block runs; its pid. mode: none, to start as the image would; off: without."""
        variables = {**os.environ, "COLDSTART_DRAIN_DELAY": "0", **(environment or {})}
        arguments = list(self._argv)
        if mode is not None:
            cache = self._cache(mode)
            cache.mkdir()
            labels = [switch.label for switch in (Switch.RECORDING, *off)]
            variables |= {**mode.environment, **state.cache_environment(cache)}
            variables[OFF] = ",".join(filter(None, (variables.get(OFF), *labels)))
            variables[record.VARIABLES_VARIABLE] = str(cache / record.VARIABLES)
            # Before the recording, which is of what a start imports that knows them.
            variables[quantization_methods.VARIABLE] = str(self._output / quantization_methods.FILE)
            variables[metas.VARIABLE] = str(self._output / metas.FILE)
            arguments = [*mode.engine_args, *arguments]
        server = subprocess.Popen([sys.executable, "-m", "runtime", "serve", *arguments], env=variables)
        try:
            while not self._ready():
                if server.poll() is not None:
                    raise WarmError("the server ended, see above", server.returncode or EXIT_WRONG)
                time.sleep(_POLL_SECONDS)
            yield server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(_STOP_SECONDS)
            server.kill()
            server.wait()

    def _ready(self) -> bool:
        try:
            golden.get(f"{self._url}/ready")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def _ask_once(self) -> None:
        """What an ordinary first request is, so that what is only loaded for it is recorded too."""
        model = self._settings.served_model_name
        if not self._generates:
            for path in _POOLING:
                with suppress(urllib.error.HTTPError):
                    golden.post(f"{self._url}{path}", {"model": model, "input": "Hello"})
            return
        body: dict[str, Any] = {"model": model, "max_tokens": 4}
        golden.post(f"{self._url}/v1/completions", {**body, "prompt": "Hello"})
        if self._chat:
            messages = [{"role": "user", "content": "Hello"}]
            golden.post(f"{self._url}/v1/chat/completions", {**body, "messages": messages})

    def _touched(self) -> str | None:
        """Which deferred modules were needed so far; None where nothing is deferred."""
        with suppress(OSError):
            return (self._output / deferred.TOUCHED).read_text()
        return None

    def _write_file_list(self, server: int) -> None:
        """Libraries first, since the first import needs the largest; then files in order of opening."""
        output, model = self._output, self._settings.manifest.model_path
        mapped = sorted(
            {path for pid in descendants(server) for path in _libraries(pid)}, key=_size, reverse=True
        )
        opened = (output / record.OPENED).read_text().splitlines()
        (output / record.OPENED).unlink()
        wanted = [
            path
            for path in dict.fromkeys(mapped + opened)
            if path.startswith("/")
            and not path.startswith(("/proc", "/sys", "/dev", "/tmp", model))  # noqa: S108
            # Read only to find the import structures, which are remembered from now on.
            and not ("/transformers/models/" in path and path.endswith(".py"))
            and Path(path).is_file()
        ]
        (output / FILE_LIST).write_text("".join(f"{path}\n" for path in wanted))


def _libraries(pid: int) -> set[str]:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[5] for line in lines if line.count("/") and ".so" in line}
    return set()


def _forget(path: Path) -> None:
    """Have the kernel drop what it keeps of a file in memory, which it does unless somebody has it mapped."""
    with path.open("rb") as file:
        with suppress(OSError):  # what was just unpacked may not be on the disk yet, and then it stays
            os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes(pid: int) -> int:
    """What a process has had read from a disk."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])
    return 0


def _size(path: str) -> int:
    with suppress(OSError):
        return Path(path).stat().st_size
    return 0
