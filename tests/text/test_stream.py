"""The output parser: written-out cases, and for arbitrary markup the same reply however the text is cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hadal.text import Content, Event, OutputParser, Reasoning, ToolCall

D = "｜DSML｜"
EOS = "<｜end▁of▁sentence｜>"
OPEN, CLOSE = f"<{D}tool_calls>\n", f"</{D}tool_calls>"


def parameter(name: str, value: str, kind: str = "true") -> str:
    return f'<{D}parameter name="{name}" string="{kind}">{value}</{D}parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<{D}invoke name="{name}">\n{"".join(parameters)}</{D}invoke>\n'


WEATHER = invoke("weather", parameter("city", "Ys"), parameter("days", "3", "false"))
WEATHER_CALL = ToolCall("weather", '{"city": "Ys", "days": 3}')


@dataclass(frozen=True)
class Reply:
    """A whole answer, joined from the events."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]


def reply_to(*pieces: str, thinking: bool = False) -> Reply:
    parser = OutputParser(thinking=thinking)
    events: list[Event] = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    content = "".join(e.text for e in events if isinstance(e, Content))
    return Reply(reasoning, content, tuple(e for e in events if isinstance(e, ToolCall)))


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("", True, Reply("", "", ())),
        ("hmm</think>yes", True, Reply("hmm", "yes", ())),
        ("hmm", True, Reply("hmm", "", ())),
        ("yes</think>", False, Reply("", "yes</think>", ())),
        ("<think>hmm</think>yes", False, Reply("hmm", "yes", ())),
        ("<think>hmm</think>yes", True, Reply("hmm", "yes", ())),
        (f"yes{EOS}", False, Reply("", "yes", ())),
        (f"hmm{EOS}", True, Reply("hmm", "", ())),
        (f"yes{EOS}more", False, Reply("", "yesmore", ())),
        (f"see\n\n{OPEN}{WEATHER}{CLOSE}{EOS}", False, Reply("", "see", (WEATHER_CALL,))),
        (f"r</think>\n\n{OPEN}{WEATHER}{WEATHER}{CLOSE}", True, Reply("r", "", (WEATHER_CALL, WEATHER_CALL))),
        (f"see{OPEN}{WEATHER}{CLOSE}", False, Reply("", "see", (WEATHER_CALL,))),
        (f"\n\n\n{OPEN}{invoke('f')}{CLOSE}", False, Reply("", "\n", (ToolCall("f", "{}"),))),
        (f"a\n\n{OPEN}{WEATHER}{CLOSE}b", False, Reply("", "ab", (WEATHER_CALL,))),
        (f"r\n\n{OPEN}{WEATHER}{CLOSE}s</think>c", True, Reply("rs", "c", (WEATHER_CALL,))),
        ((f"{OPEN}{WEATHER}{CLOSE}").replace("\n", ""), False, Reply("", "", (WEATHER_CALL,))),
    ],
)
def test_well_formed_answers(text: str, thinking: bool, expected: Reply) -> None:
    assert reply_to(text, thinking=thinking) == expected


BROKEN = [
    f"\n\n{OPEN}",
    f"\n\n{OPEN}{CLOSE}",
    f"\n\n{OPEN}hello",
    f"\n\n{OPEN}<{D}invoke name=weather>",
    f'\n\n{OPEN}<{D}invoke name="">\n',
    f'\n\n{OPEN}<{D}invoke name="f">\n<{D}parameter name="a">1</{D}parameter>\n</{D}invoke>\n{CLOSE}',
    f"\n\n{OPEN}{invoke('f', parameter('a', '1'), parameter('a', '2'))}{CLOSE}",
    f"\n\n{OPEN}{invoke('f', parameter('a', 'Ys', 'false'))}{CLOSE}",
    f"\n\n{OPEN}{invoke('f', parameter('a', 'NaN', 'false'))}{CLOSE}",
    f"\n\n{OPEN}{invoke('f', parameter('a', '1', 'maybe'))}{CLOSE}",
    f'\n\n{OPEN}<{D}invoke name="f">\n<{D}parameter name="a" string="true">cut sho',
    f"\n\n{OPEN}{invoke('f', 'text')}{CLOSE}",
]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_calls_come_back_whole_as_text(text: str) -> None:
    assert reply_to(f"a{text}") == Reply("", f"a{text}", ())
    assert reply_to(f"a{text}", thinking=True) == Reply(f"a{text}", "", ())


@pytest.mark.parametrize("text", [CLOSE, WEATHER, parameter("a", "b"), f"{D}tool_calls>", f"<{D}", f"<{D}tool_calls"])
def test_stray_markup_is_text(text: str) -> None:
    assert reply_to(f"a{text}b") == Reply("", f"a{text}b", ())


def test_good_calls_survive_a_broken_neighbour() -> None:
    broken = invoke("f", "text")
    assert reply_to(f"a\n\n{OPEN}{WEATHER}{broken}{CLOSE}") == Reply("", f"a{broken}{CLOSE}", (WEATHER_CALL,))
    assert reply_to(f"{OPEN}oops\n\n{OPEN}{WEATHER}{CLOSE}") == Reply("", f"{OPEN}oops", (WEATHER_CALL,))


def test_markup_mentioned_in_thought_does_not_swallow_the_answer() -> None:
    reply = reply_to(f"I write {OPEN} first</think>\n\n{OPEN}{WEATHER}{CLOSE}", thinking=True)
    assert reply == Reply(f"I write {OPEN} first", "", (WEATHER_CALL,))
    cut = f'{OPEN}<{D}invoke name="f">\n<{D}parameter name="a" string="true">'
    assert reply_to(f"{cut}x</think>yes", thinking=True) == Reply(f"{cut}x", "yes", ())


def test_end_of_sentence_ends_a_value() -> None:
    cut = f'{OPEN}<{D}invoke name="f">\n<{D}parameter name="a" string="true">x'
    assert reply_to(cut + EOS) == Reply("", cut, ())


def test_text_values_are_raw_and_json_values_are_kept_as_written() -> None:
    value = 'say "hi"\n\t\\ <b> </｜DSML> é 🐟 \x00'
    text = OPEN + invoke("f", parameter("a", value), parameter("b", ' {"x": 1.0e5} ', "false")) + CLOSE
    (made,) = reply_to(text).calls
    assert json.loads(made.arguments) == {"a": value, "b": {"x": 1e5}}
    assert made.arguments.endswith('"b":  {"x": 1.0e5} }')


def test_events_come_as_soon_as_they_are_certain() -> None:
    parser = OutputParser(thinking=True)
    assert parser.feed("let me </thi") == [Reasoning("let me ")]
    assert parser.feed("s") == [Reasoning("</this")]
    parser = OutputParser(thinking=True)
    assert parser.feed("ok</think>yes\n") == [Reasoning("ok"), Content("yes")]
    assert parser.feed("\n") == []
    assert parser.feed(f"\n{OPEN[:5]}") == [Content("\n")]
    assert parser.feed(OPEN[5:] + WEATHER[:-3]) == []
    assert parser.feed(WEATHER[-3:]) == [WEATHER_CALL]
    assert parser.feed(CLOSE + "\n") == []
    assert parser.finish() == [Content("\n")]


def test_the_parser_tells_whether_it_is_inside_the_thought() -> None:
    parser = OutputParser(thinking=True)
    told = []
    for piece in ("let me", "</thi", "nk>", "yes"):
        told.append(parser.thinks)
        parser.feed(piece)
    assert told == [True, True, True, False]
    opened = OutputParser(thinking=False)
    opened.feed("<think>hm")
    assert opened.thinks


FRAGMENTS = [
    "<think>",
    "</think>",
    EOS,
    "\n",
    "\n\n",
    " ",
    '"',
    "<",
    OPEN,
    OPEN.strip(),
    CLOSE,
    f'<{D}invoke name="f">\n',
    f"</{D}invoke>\n",
    f'<{D}parameter name="a" string="true">',
    f'<{D}parameter name="b" string="false">',
    f"</{D}parameter>\n",
    WEATHER,
    "12",
    "[1]",
    *BROKEN,
]
soup = st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from(["w0", "w1", "w2", "w3"]), max_size=14)


@settings(max_examples=400, deadline=None)
@given(parts=soup, cuts=st.lists(st.integers(0, 400), max_size=12), thinking=st.booleans())
@example(parts=["\n\n", OPEN, "\n", WEATHER, "\n", CLOSE], cuts=list(range(200)), thinking=True)
def test_every_cut_gives_the_same_reply(parts: list[str], cuts: list[int], thinking: bool) -> None:
    text = "".join(parts)
    whole = reply_to(text, thinking=thinking)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    assert reply_to(*pieces, thinking=thinking) == reply_to(*text, thinking=thinking) == whole


@settings(max_examples=300, deadline=None)
@given(parts=soup, thinking=st.booleans())
def test_nothing_but_markers_is_lost(parts: list[str], thinking: bool) -> None:
    text = "".join(part.replace("w", f"w{i}-") if part[0] == "w" else part for i, part in enumerate(parts))
    reply = reply_to(text, thinking=thinking)
    kept = reply.reasoning + reply.content + "".join(call.name + call.arguments for call in reply.calls)
    assert all(part.replace("w", f"w{i}-") in kept for i, part in enumerate(parts) if part[0] == "w")
    if not reply.calls:
        marks = text.count(EOS) * len(EOS)
        thought = len("<think>") * text.startswith("<think>")
        shut = 0 if not (thinking or thought) else len("</think>") * (len(kept) + marks + thought < len(text))
        assert len(kept) + marks + thought + shut == len(text)
    for call in reply.calls:
        assert isinstance(json.loads(call.arguments), dict)


def test_many_unclosed_blocks_are_read_in_reasonable_time() -> None:
    opening = f'{OPEN}<{D}invoke name="f">\n<{D}parameter name="a" string="true">x'
    reply = reply_to(opening * 300)
    assert reply == Reply("", opening * 300, ())
