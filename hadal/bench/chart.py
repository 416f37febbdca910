"""A chart of figures as an SVG file: one bar per figure, as long as its share of the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from hadal.bench.phases import Figure

LEFT, RIGHT, WIDTH = 190, 240, 920
TOP, ROW, BAR = 92, 34, 18
COLOURS = {"reads": "#2a7f9e", "products": "#c2703d"}
LEGEND = {"reads": "memory reads", "products": "BF16 products"}
INK, QUIET, GRID = "#1f2933", "#66727f", "#e4e8ec"


def write_chart(path: str | Path, title: str, figures: Sequence[Figure]) -> None:
    """Write the chart; the axis ends at the limit, or at the largest figure where one is beyond it."""
    bottom = TOP + ROW * len(figures)
    scale = (WIDTH - LEFT - RIGHT) / max(1.0, *(f.fraction for f in figures))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 40}" width="{WIDTH}" role="img" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{escape(title)}: share of the machine's limit</title>",
        f'<rect width="{WIDTH}" height="{bottom + 40}" fill="#ffffff"/>',
        _text(24, 34, title, INK, 'font-size="17" font-weight="600"'),
        _text(24, 56, "share of what this machine allows, by what bounds the work", QUIET),
    ]
    for number, (bound, colour) in enumerate(COLOURS.items()):
        x: float = WIDTH - 270 + 130 * number
        parts.append(f'<rect x="{x}" y="46" width="11" height="11" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 17, 56, LEGEND[bound], QUIET))
    for percent in (0, 25, 50, 75, 100):
        x = LEFT + scale * percent / 100
        line = QUIET if percent == 100 else GRID
        parts.append(f'<path d="M{x:.1f} {TOP - 8}V{bottom}" stroke="{line}"/>')
        parts.append(_text(x, bottom + 20, f"{percent} %", QUIET, 'text-anchor="middle" font-size="12"'))
    for number, figure in enumerate(figures):
        parts += _bar(figure, TOP + ROW * number, scale)
    Path(path).write_text("\n".join([*parts, "</svg>\n"]), "utf-8")


def _bar(figure: Figure, top: int, scale: float) -> list[str]:
    length = scale * figure.fraction
    middle = top + BAR - 5
    note = f"{figure.fraction:.0%}, {figure.tokens_per_second:,.0f} tokens/s"
    note += "" if figure.over_short is None else f", {figure.over_short:.2f} of 512"
    name = f"{figure.phase} · {figure.tokens:,}"
    return [
        _text(LEFT - 12, middle, name, INK, 'text-anchor="end"'),
        f'<rect x="{LEFT}" y="{top}" width="{max(length, 1):.1f}" height="{BAR}" rx="3" '
        f'fill="{COLOURS[figure.bound]}"/>',
        # A white rim keeps the note readable where it crosses a line of the grid.
        _text(LEFT + length + 8, middle, note, INK, 'stroke="#ffffff" stroke-width="4" paint-order="stroke"'),
    ]


def _text(x: float, y: float, text: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}" {more}>{escape(text)}</text>'
