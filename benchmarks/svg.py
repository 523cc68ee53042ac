"""The waterfall, and the history, as one SVG file each: any width, light or dark; and as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from benchmarks.layout import KINDS, Kind, Waterfall, ticks, waterfall
from benchmarks.schema import BenchResult
from benchmarks.summary import UNATTRIBUTED, compared, median_run, short_names, verdict
from builder.errors import HostError, InputError

WIDTH = 1000
_LEFT = 132  # of the first bar: process names stand before it
_RIGHT = 24
MARGIN = 20
_NAME = 17  # characters of a process that fit
_ROW = 20
_BAR = 16
_CHARACTER = 0.58  # of the font size, a generous mean
_FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', 'Noto Sans', "
    "'DejaVu Sans', Arial, sans-serif"
)
# Colours stand in attributes, for readers without style sheets; dark ones win where the reader prefers them.
_LIGHT = {
    "bg": "#ffffff", "fg": "#17202e", "muted": "#5a6577", "line": "#dfe3ea", "gap": "#dbe0e8",
    "ink": "#0d1420", "bad": "#b3261e", "good": "#1a7f4b",
}  # fmt: skip
_DARK = {
    "bg": "#181e27", "fg": "#e6eaf0", "muted": "#9aa6b8", "line": "#2c3542", "gap": "#3a4453",
    "ink": "#0d1420", "bad": "#ff8a80", "good": "#5fd39a",
}  # fmt: skip
_NO_LETTER = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
_LETTER = _NO_LETTER.replace("/>", f'><text y="9" font-family="{_FONT}">X</text></svg>')
SERIES = (
    ("#2f6fd0", "#6aa2f5"),
    ("#c25a12", "#f0a83c"),
    ("#1e8a66", "#35b58a"),
    ("#a13d7c", "#e57fb5"),
    ("#6a55c2", "#a594e0"),
)


class Canvas:
    """An SVG drawing that grows downwards; `name` of a colour is a key of the palette."""

    def __init__(self, title: str) -> None:
        self._root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
        ET.SubElement(self._root, "title").text = title
        self._style = ET.SubElement(self._root, "style")
        self._background = ET.SubElement(self._root, "rect", width="100%", height="100%", fill=_LIGHT["bg"])
        self._background.set("class", "bg")
        self._pattern()
        self._light, self._dark = dict(_LIGHT), dict(_DARK)

    def _pattern(self) -> None:
        hatch = ET.SubElement(self._root, "pattern", id="hatch", width="6", height="6")
        hatch.set("patternUnits", "userSpaceOnUse")
        hatch.set("patternTransform", "rotate(45)")
        line = ET.SubElement(hatch, "rect", width="2", height="6", fill=_LIGHT["gap"])
        line.set("class", "gap")

    def color(self, name: str, light: str, dark: str) -> str:
        """Adds a colour to the palette; its name."""
        self._light[name], self._dark[name] = light, dark
        return name

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, color: str = "fg", bold: bool = False,
        anchor: str = "start",
    ) -> None:  # fmt: skip
        """`y`: of the baseline."""
        weight = {"font-weight": "600"} if bold else {}
        attributes = {"x": _n(x), "y": _n(y), "font-size": _n(size), "text-anchor": anchor, **weight}
        self._add("text", attributes, fill=color).text = text

    def rect(
        self, x: float, y: float, width: float, height: float, color: str,
        *, tip: str = "", pale: bool = False,
    ) -> None:  # fmt: skip
        """`color` "hatch" is no palette colour but the pattern of unexplained time."""
        box = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height), "rx": _n(min(3, width / 2))}
        if color == "hatch":
            element = ET.SubElement(self._root, "rect", {**box, "fill": "url(#hatch)"})
        elif pale:
            element = self._add("rect", {**box, "fill-opacity": "0.2"}, fill=color, stroke=color)
        else:
            element = self._add("rect", box, fill=color)
        if tip:
            ET.SubElement(element, "title").text = tip

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float = 1) -> None:
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._add("polyline", {"points": path, "fill": "none", "stroke-width": _n(width)}, stroke=color)

    def dot(
        self, x: float, y: float, radius: float, color: str, *, tip: str = "", ring: bool = False
    ) -> None:
        at = {"cx": _n(x), "cy": _n(y), "r": _n(radius)}
        element = (
            self._add("circle", {**at, "fill": "none", "stroke-width": "2"}, stroke=color)
            if ring
            else self._add("circle", at, fill=color)
        )
        if tip:
            ET.SubElement(element, "title").text = tip

    def _add(self, tag: str, attributes: dict[str, str], **colors: str) -> ET.Element:
        element = ET.SubElement(self._root, tag, attributes)
        for attribute, name in colors.items():
            element.set(attribute, self._light[name])
        element.set("class", " ".join(f"{attribute[0]}-{name}" for attribute, name in colors.items()))
        return element

    def finish(self, height: float) -> str:
        """The file's text."""
        self._root.set("viewBox", f"0 0 {WIDTH} {_n(height)}")
        self._root.set("width", str(WIDTH))
        self._root.set("height", _n(height))
        self._root.set("font-family", _FONT)
        dark = "".join(
            f".f-{name}{{fill:{value}}}.s-{name}{{stroke:{value}}}" for name, value in self._dark.items()
        )
        own = f".bg{{fill:{_DARK['bg']}}}.gap{{fill:{_DARK['gap']}}}"
        self._style.text = f"@media (prefers-color-scheme: dark){{{own}{dark}}}"
        return ET.tostring(self._root, encoding="unicode") + "\n"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def waterfall_svg(result: BenchResult) -> str:
    """The median run of each image, one below the other on one scale."""
    names = short_names(result)
    medians = [(names[i.reference], run) for i in result.images if (run := median_run(result, i.reference))]
    drawn = [(name, waterfall(run)) for name, run in medians]
    if not drawn:
        raise InputError("There is nothing to draw: no run reached its first token.")
    canvas = Canvas(f"Cold start of {', '.join(name for name, _ in drawn)}")
    kinds = list(dict.fromkeys(KINDS.values()))
    colors = {kind: canvas.color(f"k{i}", kind.light, kind.dark) for i, kind in enumerate(kinds)}
    seen = {KINDS[bar.phase] for _, one in drawn for lane in one.lanes for bar in lane.bars}
    entries = [(kind.name, colors[kind]) for kind in kinds if kind in seen]
    y = legend(canvas, [*entries, (UNATTRIBUTED, "hatch"), ("pale: not on the critical path", "muted")], 30)
    scale = (WIDTH - _LEFT - _RIGHT) / max(one.seconds for _, one in drawn)
    for name, one in drawn:
        y = _one(canvas, name, one, colors, scale, y + 18)
    y = _axis(canvas, max(one.seconds for _, one in drawn), scale, y + 6)
    for line in wrapped(compared(result), 11):
        y += 16
        canvas.text(MARGIN, y, line, size=11, color="muted")
    return canvas.finish(y + MARGIN)


def legend(canvas: Canvas, entries: Sequence[tuple[str, str]], y: float) -> float:
    """(name, colour) in as many rows as they need, the first at `y`; the last one's y."""
    x: float = MARGIN
    longest = int((WIDTH - 2 * MARGIN - 16) / (12 * _CHARACTER))
    for whole, color in entries:
        # The end of a reference tells more of it than its registry.
        name = whole if len(whole) <= longest else "…" + whole[1 - longest :]
        width = 16 + len(name) * 12 * _CHARACTER + 14
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 20
        canvas.rect(x, y - 10, 11, 11, color, pale=color == "muted")
        canvas.text(x + 16, y, name)
        x += width
    return y


def _one(
    canvas: Canvas, name: str, drawn: Waterfall, colors: dict[Kind, str], scale: float, y: float
) -> float:
    y += 14
    canvas.text(MARGIN, y, f"{name}: {drawn.seconds:.2f} s", size=15, bold=True)
    y += 17
    canvas.text(MARGIN, y, verdict(drawn.run), color="muted")
    y += 10
    canvas.text(MARGIN, y + 12.5, "critical path", size=11.5, bold=True)
    for part in drawn.path:
        x, width = _LEFT + part.start * scale, part.seconds * scale
        if width < 0.5:
            continue
        label = part.bar.phase.value.replace("_", " ") if part.bar else UNATTRIBUTED
        color = colors[KINDS[part.bar.phase]] if part.bar else "hatch"
        canvas.rect(x, y, width, _BAR, color, tip=f"{label}: {part.seconds:.3f} s")
        _label(canvas, x, y, width, label, part.seconds, "ink" if part.bar else "fg")
    y += _ROW
    for lane in drawn.lanes:
        canvas.line([(MARGIN, y - 2), (WIDTH - _RIGHT, y - 2)], "line")
        canvas.text(MARGIN, y + 12.5, lane.process[:_NAME], size=11.5)
        for bar in lane.bars:
            x, top = _LEFT + bar.start * scale, y + bar.row * _ROW
            width, critical = max(bar.seconds * scale, 1.0), bar in drawn.critical
            label = bar.phase.value.replace("_", " ")
            tip = f"{label}, {bar.process}: {bar.start:.3f} s to {bar.end:.3f} s"
            canvas.rect(x, top, width, _BAR, colors[KINDS[bar.phase]], tip=tip, pale=not critical)
            _label(canvas, x, top, width, label, bar.seconds, "ink" if critical else "fg")
        y += lane.rows * _ROW
    return y


def _label(canvas: Canvas, x: float, y: float, width: float, name: str, seconds: float, color: str) -> None:
    """The longest of name and seconds, name, seconds that fits."""
    texts = (f"{name} {seconds:.2f}", name, f"{seconds:.2f}")
    fitting = next((text for text in texts if len(text) * 11 * _CHARACTER + 8 < width), None)
    if fitting:
        canvas.text(x + 5, y + 12, fitting, size=11, color=color)


def _axis(canvas: Canvas, seconds: float, scale: float, y: float) -> float:
    canvas.line([(_LEFT, y), (WIDTH - _RIGHT, y)], "muted")
    for tick in ticks(seconds):
        x = _LEFT + tick * scale
        canvas.line([(x, y), (x, y + 4)], "muted")
        canvas.text(x, y + 16, f"{tick:g} s", size=11, color="muted", anchor="middle")
    return y + 20


def wrapped(text: str, size: float) -> list[str]:
    return textwrap.wrap(text, int((WIDTH - 2 * MARGIN) / (size * _CHARACTER)))


def check_png() -> None:
    """HostError where the library that draws PNG, or any font, is missing."""
    try:
        import resvg_py
    except ImportError as error:
        raise HostError(
            "PNG needs a library that is not installed.",
            why="resvg-py draws SVG as PNG.",
            fix="pip install 'coldstart[png]', or write --svg.",
        ) from error
    if resvg_py.svg_to_bytes(svg_string=_LETTER) == resvg_py.svg_to_bytes(svg_string=_NO_LETTER):
        raise HostError(
            "There is no font on this machine: the PNG would have no text.",
            fix="Install one, such as Debian's fonts-dejavu-core, or write --svg.",
        )


def png(svg: str) -> bytes:
    """The drawing, light, at twice its size."""
    check_png()
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * WIDTH))
