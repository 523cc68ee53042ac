"""Threads beside PID 1's own, which alone is to be told of signals. Standard library only."""

from __future__ import annotations

import signal
import threading


def start(thread: threading.Thread) -> threading.Thread:
    """Start it with every signal blocked: the kernel would give it one that the main thread holds back."""
    # A thread inherits what is blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return thread
