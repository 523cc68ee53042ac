"""The files that a result is written to, and what a baseline is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ablation
from benchmarks.page import page
from benchmarks.report import markdown
from benchmarks.schema import BenchResult, read_result
from benchmarks.summary import baseline_lines, is_ablation, with_baseline
from benchmarks.svg import check_png, png, waterfall_svg
from builder.errors import InputError


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where to write which form; None: not at all."""

    html: Path | None = None
    svg: Path | None = None
    png: Path | None = None
    markdown: Path | None = None

    def check(self) -> None:
        """Raises before anything is measured what would fail after it: a missing folder or library."""
        for path in self._paths():
            check_folder(path)
        if self.png:
            check_png()

    def _paths(self) -> list[Path]:
        return [path for path in (self.html, self.svg, self.png, self.markdown) if path]

    def write(self, result: BenchResult, notes: Sequence[str] = ()) -> list[Path]:
        """The paths of what was written."""
        if self.html:
            write_whole(self.html, page(result, notes).encode())
        if self.markdown:
            write_whole(self.markdown, markdown(result, notes).encode())
        if self.svg or self.png:
            drawing = ablation.svg(result) if is_ablation(result) else waterfall_svg(result)
            if self.svg:
                write_whole(self.svg, drawing.encode())
            if self.png:
                write_whole(self.png, png(drawing))
        return self._paths()


def check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder", fix="Give a path in one that exists.")


def write_whole(path: Path, content: bytes) -> None:
    """Whoever reads `path` finds the old content or the new, never half of it."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


@dataclass(frozen=True, slots=True)
class FileBaseline:
    """One image of an earlier result. `image`: its reference there."""

    source: str
    result: BenchResult
    image: str

    @property
    def runs(self) -> int:
        return len(self.result.measured(self.image))

    def put_first(self, result: BenchResult) -> BenchResult:
        return with_baseline(result, self.result, self.image)

    def lines(self, result: BenchResult) -> list[str]:
        return baseline_lines(result, self.result, self.source)


def file_baseline(path: Path, images: Sequence[str]) -> FileBaseline:
    """The image of the file that one of `images` is called, else its only one. Raises InputError."""
    result = read_result(path)
    there = [image.reference for image in result.images]
    chosen = next((image for image in images if image in there), there[0] if len(there) == 1 else None)
    if chosen is None:
        raise InputError(
            f"{path} holds several images, and none is called {' or '.join(images)}",
            why=f"It holds {', '.join(there)}.",
            fix="Give the image the name that it has there, or a file of one image.",
        )
    if not result.measured(chosen):
        raise InputError(
            f"{path} holds no run of {chosen} that reached its first token", fix="Measure again."
        )
    return FileBaseline(str(path), result, chosen)
