"""What a terminal shows: names as they are."""

from __future__ import annotations

import io

from rich.console import Console

from builder import console


def _shown(terminal: bool) -> str:
    made = console.terminal(stderr=True)
    made.file = output = io.StringIO()
    made._force_terminal = terminal
    reporter = console.ConsoleReporter(made)
    reporter.step("Starting app:new: [bold]x[/bold]")
    with reporter.task("Sending app:new: [red]y[/red]", 10) as task:
        task.advance(10)
        task.detail("layer app:new: [red]z[/red]")
    return output.getvalue()


def test_names_are_neither_emoji_nor_markup() -> None:
    for terminal in (False, True):
        shown = _shown(terminal)
        for words in ("Starting app:new: [bold]x[/bold]", "Sending app:new: [red]y[/red]"):
            assert words in shown
    assert "app:new: [red]z[/red]" in _shown(terminal=True)
    assert (
        Console(file=io.StringIO()).render_str("app:new: x").plain != "app:new: x"
    )  # else this tests nothing
