"""The output parser on damaged calls: every cut gives the same events, nothing is lost, and damage is counted."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.text import Content, OutputParser, Reasoning, ToolCall, encode_messages, own_prompt_texts
from tests.text.test_stream import BROKEN, CLOSE, EOS, OPEN, WEATHER, D, invoke, parameter

Events = tuple[tuple[str, str, str], ...]


def events_of(*pieces: str, thinking: bool = False) -> tuple[Events, int]:
    """Events in order, texts of one kind joined, and how many blocks came back."""
    parser, joined = OutputParser(thinking=thinking), list[tuple[str, str, str]]()
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        if isinstance(event, ToolCall):
            joined.append(("call", event.name, event.arguments))
            continue
        kind = "reasoning" if isinstance(event, Reasoning) else "content"
        before = joined.pop()[1] if joined and joined[-1][0] == kind else ""
        joined.append((kind, before + event.text, ""))
    return tuple(joined), parser.malformed


TAGS = [
    "\n\n",
    OPEN,
    '<｜DSML｜invoke name="größe_🐟">\n',
    '<｜DSML｜parameter name="tiefe é" string="true">',
    "w0",
    f"</{D}parameter>\n",
    '<｜DSML｜parameter name="n" string="false">',
    '[1, {"a": "w1"}]',
    f"</{D}parameter>\n",
    f"</{D}invoke>\n",
    CLOSE,
]
INTRUDERS = [
    EOS,
    "<think>",
    "</think>",
    "\n",
    "w2",
    OPEN,
    CLOSE,
    WEATHER,
    f"{OPEN}{WEATHER}{CLOSE}",
    D,
    "｜",
    "<",
    f'<{D}parameter name="tiefe é" string="true">',
    f'<{D}parameter name="x" string="maybe">',
    f'<{D}invoke name="a"b">',
    f"</{D}invoke>",
]


@st.composite
def damaged(draw: Any) -> list[str]:
    """A well-formed answer of two calls with some parts gone, doubled, moved or foreign."""
    parts = ["w3", *TAGS[:-1], *TAGS[2:], "w4"]
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(parts) - 1))
        change = draw(st.sampled_from(["drop", "double", "insert", "move"]))
        if change == "double":
            parts.insert(place, parts[place])
        elif change == "insert":
            parts.insert(place, draw(st.sampled_from(INTRUDERS)))
        else:
            taken = parts.pop(place)
            if change == "move" and parts:
                parts.insert(draw(st.integers(0, len(parts) - 1)), taken)
        parts = parts or ["w5"]
    return parts


@settings(max_examples=300, deadline=None)
@given(parts=damaged(), cuts=st.lists(st.integers(0, 900), max_size=30), thinking=st.booleans())
def test_damaged_answers_read_alike_however_cut_and_lose_nothing(
    parts: list[str], cuts: list[int], thinking: bool
) -> None:
    words = re.findall(r"w\d", "".join(parts))
    marks = iter(f"<{i}>" for i in range(len(words)))
    text = re.sub(r"w\d", lambda found: next(marks), "".join(parts))
    whole, malformed = events_of(text, thinking=thinking)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for pieces in ([text[start:end] for start, end in pairwise(edges)], list(text)):
        assert events_of(*pieces, thinking=thinking) == (whole, malformed)
    told = re.findall(r"<\d+>", "".join("".join(event[1:]) for event in whole))
    assert told == [f"<{i}>" for i in range(len(words))], "every word once, in order"
    for event in whole:
        if event[0] == "call":
            assert isinstance(json.loads(event[2]), dict)


ANSWERS = [f"ok\n\n{OPEN}{WEATHER}{invoke('größe_🐟', parameter('é', 'a｜b'))}{CLOSE}{EOS}", *BROKEN]


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("thinking", [True, False])
def test_every_single_cut_gives_the_same_events(text: str, thinking: bool) -> None:
    text = f"hm</think>{text}" if thinking else text
    whole = events_of(text, thinking=thinking)
    for cut in range(1, len(text)):
        assert events_of(text[:cut], text[cut:], thinking=thinking) == whole, cut


@pytest.mark.parametrize(
    ("text", "malformed"),
    [
        (f"hm</think>ok\n\n{OPEN}{WEATHER}{CLOSE}", 0),
        (f"hm</think>ok\n\n{OPEN}{WEATHER}", 0),
        (f"hm\n\n{OPEN}{WEATHER}{WEATHER}{CLOSE}", 0),
        (f"hm</think>\n\n{OPEN}oops", 1),
        (f"hm</think>\n\n{OPEN}{OPEN}oops", 2),
        (f"hm</think>{CLOSE}", 0),
        (f"hm</think>{D}{D[1:]}", 0),
        (f"hm</think>\n\n{OPEN}{WEATHER}oops{CLOSE}", 1),
        (f"hm</think>\n\n{OPEN}{invoke('f', 'oops')}{CLOSE}", 1),
        (f"I write {OPEN} then</think>ok", 1),
    ],
)
def test_damage_is_counted(text: str, malformed: int) -> None:
    for pieces in ([text], list(text)):
        assert events_of(*pieces, thinking=True)[1] == malformed


def test_a_block_in_an_unclosed_thought_is_called() -> None:
    assert events_of(f"I must look\n\n{OPEN}{WEATHER}{CLOSE}{EOS}", thinking=True)[0] == (
        ("reasoning", "I must look", ""),
        ("call", "weather", '{"city": "Ys", "days": 3}'),
    )


names = st.text(st.characters(exclude_characters='"\n｜', exclude_categories=["Cs"]), min_size=1, max_size=8)
strings = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=5,
)
calls = st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(content=strings, made=calls, cut=st.integers(0, 200))
def test_what_the_codec_writes_the_parser_reads(content: str, made: list[tuple[str, dict[str, Any]]], cut: int) -> None:
    asked = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in made]
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": f"x{content}", "tool_calls": asked}]
    text = encode_messages(chat, own_prompt_texts(), thinking=False).text.split("</think>", 1)[1]
    parser = OutputParser(thinking=False)
    events = parser.feed(text[:cut]) + parser.feed(text[cut:]) + parser.finish()
    assert "".join(event.text for event in events if isinstance(event, Content)) == f"x{content}"
    read = [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, ToolCall)]
    assert read == made and not parser.malformed
