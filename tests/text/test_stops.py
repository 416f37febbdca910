"""Stop strings against a character-by-character reading of the rule, for every way of cutting the text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hadal.text import StopStrings

short = st.text(alphabet="ab\n", max_size=12)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


def feed_in_pieces(text: str, stops: list[str], cuts: list[int]) -> tuple[str, str | None]:
    filter_ = StopStrings(stops)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = "".join(filter_.feed(text[start:end]) for start, end in pairwise(edges))
    return shown + ("" if filter_.matched else filter_.finish()), filter_.matched


@given(
    text=short,
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=8),
)
def test_every_cut_gives_the_first_completed_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    assert feed_in_pieces(text, stops, cuts) == first_stop(text, stops)


def test_a_possible_stop_is_held_back_and_then_released() -> None:
    stops = StopStrings(["STOP"])
    assert stops.feed("go ST") == "go "
    assert stops.feed("AY ST") == "STAY "
    assert stops.finish() == "ST" and stops.matched is None


def test_nothing_comes_after_a_stop() -> None:
    stops = StopStrings(["\n\n"])
    assert stops.feed("one\n") == "one"
    assert stops.feed("\ntwo") == "" and stops.matched == "\n\n"
    assert stops.feed("three") == "" and stops.finish() == ""
