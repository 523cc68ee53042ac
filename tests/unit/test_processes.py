"""The tree of processes, for real: what is below us ends, whatever it does, and leaves nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runtime import processes


def _run(code: str) -> str:
    """Runs in a process of its own, which is then the ancestor."""
    script = "import os, signal, subprocess, sys, time\nfrom runtime import processes\n" + textwrap.dedent(
        code
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_orphans_and_processes_that_ignore_signals_are_ended_and_reaped() -> None:
    left = _run(
        """
        processes.adopt_orphans()
        child = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork(); time.sleep(60)"
        # The shell leaves at once: its child is an orphan.
        subprocess.run(["sh", "-c", f"{sys.executable} -c '{child}' & exit 0"], check=True)
        while len(processes.descendants(os.getpid())) < 2:
            time.sleep(0.01)
        processes.end_descendants(os.getpid(), 20)
        print(processes.descendants(os.getpid()))
        """
    )
    assert left == "[]"


def test_shared_memory_of_killed_processes_is_known_and_semaphores_are_removed() -> None:
    segment, semaphore, left = _run(
        """
        import tempfile, textwrap
        lock = processes.context().Lock()  # a file until multiprocessing's resource tracker removes it
        semaphore = "/dev/shm/sem." + lock._semlock.name.strip("/")
        assert os.path.exists(semaphore)
        name = tempfile.mktemp(prefix="coldstart-", dir="/dev/shm")
        child = textwrap.dedent(
            f'''
            import mmap, time
            with open("{name}", "w+b") as file:
                file.truncate(4096)
                mapped = mmap.mmap(file.fileno(), 4096)
                print("mapped", flush=True)
                time.sleep(60)
            '''
        )
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
        process.stdout.readline()
        found = processes.shared_memory(os.getpid())
        processes.end_descendants(os.getpid(), 20)
        print(name in map(str, found), os.path.exists(semaphore), processes.descendants(os.getpid()))
        for path in found:
            path.unlink()
        sys.stdout.flush()
        os._exit(0)  # as PID 1 does: the lock's own finalizer would find nothing
        """
    ).split(maxsplit=2)
    assert (segment, semaphore, left) == ("True", "False", "[]")


def test_a_process_that_starts_while_all_are_ended_is_ended_and_its_semaphores_are_removed() -> None:
    semaphore, left = _run(
        """
        from multiprocessing import resource_tracker

        lock = processes.context().Lock()
        semaphore = "/dev/shm/sem." + lock._semlock.name.strip("/")
        held = os.dup(resource_tracker.getfd())
        first = subprocess.Popen(["sleep", "60"], pass_fds=[held])
        found, late = processes.descendants, []

        def descendants(pid):
            seen = found(pid)
            if first.pid not in seen and not late:
                # What a thread of PID 1 may do just now: start a forkserver, which has the tracker's pipe.
                late.append(subprocess.Popen(["sleep", "61"], pass_fds=[held]))
                os.close(held)
            return seen

        processes.descendants = descendants
        processes.end_descendants(os.getpid(), 20)
        print(os.path.exists(semaphore), found(os.getpid()), len(late))
        sys.stdout.flush()
        os._exit(0)
        """
    ).split(maxsplit=1)
    assert (semaphore, left) == ("False", "[] 1")


def test_an_open_device_and_a_thread_forbid_a_fork(tmp_path: Path) -> None:
    said = _run(f"""
        import threading
        processes._DEVICES = ("{tmp_path}/nvidia",)
        print(repr(processes.why_not_fork()))
        with open("{tmp_path}/nvidia0", "w"), open("{tmp_path}/other", "w"):
            print(processes.why_not_fork())
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        print(processes.why_not_fork(), flush=True)
        os._exit(0)
    """).splitlines()
    assert said[0] == "''"
    assert said[1] == f"since importing vLLM opened {tmp_path}/nvidia0"
    assert said[2] == "since importing vLLM started 1 thread"


def test_how_a_process_ended_is_known_when_it_was_reaped_first() -> None:
    said = _run(
        """
        import multiprocessing
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        processes.reap()
        process.join()
        print(process.exitcode, processes.exit_code(process))
        """
    )
    assert said == "None -9"


def test_the_kernel_takes_others_first_and_their_forks() -> None:
    scores = _run("""
        processes.start_tracker()
        child = os.fork()
        if child == 0:
            processes.go_before(os.getppid(), os.getpid())
            os.execv("/bin/sh", ["sh", "-c", "cat /proc/self/oom_score_adj; exit"])
        os.waitpid(child, 0)
        tracker = processes.resource_tracker._resource_tracker._pid
        sys.stdout.write(open(f"/proc/{tracker}/oom_score_adj").read())
        sys.stdout.write(open("/proc/self/oom_score_adj").read())
        sys.stdout.flush()
        processes.go_before(os.getpid(), 1 << 30)  # nobody: nothing happens
    """).split()
    forked, tracker, own = map(int, scores)
    assert forked == tracker == min(1000, own + 100)


def test_what_vllm_preloads_in_its_engine_is_preloaded_in_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (
        "torch/lib/libgomp.so.1",
        "vllm/libs/libtcmalloc_minimal.so.4",
        "vllm/libs/libtcmalloc.so.4",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for package in ("torch", "vllm"):
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    gomp, tcmalloc = f"{tmp_path}/torch/lib/libgomp.so.1", f"{tmp_path}/vllm/libs/libtcmalloc_minimal.so.4"
    assert processes.preload("cuda", {}) == ""
    assert processes.preload("cpu", {}) == f"{tcmalloc}:{gomp}"
    assert processes.preload("cpu", {"LD_PRELOAD": "/x.so"}) == f"{tcmalloc}:/x.so:{gomp}"
    assert processes.preload("cpu", {"LD_PRELOAD": "/libiomp5.so"}) == f"{tcmalloc}:/libiomp5.so"
    own = "/libtcmalloc.so.4:/libomp.so"
    assert processes.preload("cpu", {"LD_PRELOAD": own}) == own
    (tmp_path / "vllm/libs/libtcmalloc_minimal.so.4").unlink()
    assert processes.preload("cpu", {}) == f"{tmp_path}/vllm/libs/libtcmalloc.so.4:{gomp}"
