"""The chart is a well-formed SVG whose bars are as long as the figures say."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from hadal.bench import write_chart
from hadal.bench.chart import LEFT, RIGHT, WIDTH
from hadal.bench.phases import Figure

SPACE = "{http://www.w3.org/2000/svg}"


def bars(path: Path, figures: list[Figure]) -> list[float]:
    write_chart(path, "a <model> & its threads", figures)
    root = ElementTree.fromstring(path.read_text("utf-8"))
    assert root.tag == f"{SPACE}svg"
    texts = [t.text or "" for t in root.iter(f"{SPACE}text")]
    assert "a <model> & its threads" in texts
    for figure in figures:
        assert f"{figure.phase} · {figure.tokens:,}" in texts
        assert any(t.startswith(f"{figure.fraction:.0%}, ") for t in texts)
    return [float(r.get("width", 0)) for r in root.iter(f"{SPACE}rect") if r.get("x") == str(LEFT)]


def test_bars_are_shares_of_the_axis(tmp_path: Path) -> None:
    figures = [
        Figure("prefill", 512, 100.0, 200.0, 0.5, "products"),
        Figure("decode, long", 8192, 50.0, 200.0, 0.25, "reads", 0.9),
    ]
    assert bars(tmp_path / "a.svg", figures) == [(WIDTH - LEFT - RIGHT) / 2, (WIDTH - LEFT - RIGHT) / 4]


def test_a_figure_beyond_the_limit_stays_on_the_page(tmp_path: Path) -> None:
    figures = [Figure("decode", 8, 3.0, 2.0, 1.5, "reads"), Figure("decode", 16, 2.0, 2.0, 1.0, "reads")]
    longest, at_limit = bars(tmp_path / "a.svg", figures)
    assert longest == WIDTH - LEFT - RIGHT
    assert at_limit == pytest.approx(longest / 1.5, abs=0.1)
