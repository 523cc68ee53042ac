"""`python3 -m runtime golden`: asks the running server its recording's golden answers again.

Prints one JSON object; for `coldstart verify`, and for whoever wonders whether a machine computes right.
"""

from __future__ import annotations

import json
from typing import Any

from runtime import golden, state
from runtime.health import pid1_url
from runtime.settings import Manifest


def main(manifest: Manifest) -> int:
    """Exit code 0 where the answers are right, or where none are recorded; else 1."""
    url, model = pid1_url(manifest)
    startup: dict[str, Any] = golden.get(f"{url}/startup")
    recording = startup["recording"]
    said: dict[str, Any] | None = None
    has_compiled_code = False
    if recording["status"] == "used":
        folder = state.folder() / state.RECORDINGS / recording["key"]
        has_compiled_code = state.Recording.read(folder).has_compiled_code
        if (folder / golden.FILE).is_file():
            chat = golden.has_chat(url, model)
            said = golden.compare(
                golden.read(folder / golden.FILE), golden.ask(url, model, chat=chat)
            ).to_json()
    compiled = [event["detail"] for event in startup["phases"] if event["phase"] == "compile"]
    print(
        json.dumps(
            {
                "recording": recording,
                "has_compiled_code": has_compiled_code,
                "compiled": compiled,
                "golden": said,
            }
        )
    )
    return 0 if said is None or said["ok"] else 1
