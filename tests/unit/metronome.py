"""How late a thread is woken that only sleeps: what the machine, and no code under test, is to blame for."""

from __future__ import annotations

import threading
import time

_BEAT_SECONDS = 0.002


class Metronome:
    """worst: seconds, since it was made."""

    def __init__(self) -> None:
        self.worst = 0.0
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            due = time.monotonic() + _BEAT_SECONDS
            time.sleep(_BEAT_SECONDS)
            self.worst = max(self.worst, time.monotonic() - due)
