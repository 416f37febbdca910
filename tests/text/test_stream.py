"""The output parser: written-out cases, and for arbitrary markup the same reply however the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hadal.text import (
    Content,
    Event,
    OutputParser,
    Reasoning,
    Reply,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)

D = "｜DSML｜"
EOS = "<｜end▁of▁sentence｜>"
OPEN, CLOSE = f"<{D}tool_calls>\n", f"</{D}tool_calls>"


def parameter(name: str, value: str, kind: str = "true") -> str:
    return f'<{D}parameter name="{name}" string="{kind}">{value}</{D}parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<{D}invoke name="{name}">\n{"".join(parameters)}</{D}invoke>\n'


WEATHER = invoke("weather", parameter("city", "Ys"), parameter("days", "3", "false"))
WEATHER_CALL = ToolCall("weather", '{"city": "Ys", "days": 3}', True)


def parse(*pieces: str, thinking: bool = False, stream_arguments: bool = False) -> tuple[list[Event], Reply]:
    parser = OutputParser(thinking=thinking, stream_arguments=stream_arguments)
    events = [event for piece in pieces for event in parser.feed(piece)]
    last, reply = parser.finish()
    return events + last, reply


def reply_of(text: str, thinking: bool = False, stream_arguments: bool = False) -> Reply:
    return parse(text, thinking=thinking, stream_arguments=stream_arguments)[1]


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("", True, Reply("", "", (), 0)),
        ("hmm</think>yes", True, Reply("hmm", "yes", (), 0)),
        ("hmm", True, Reply("hmm", "", (), 0)),
        ("yes</think>", False, Reply("", "yes</think>", (), 0)),
        ("<think>hmm</think>yes", False, Reply("hmm", "yes", (), 0)),
        ("<think>hmm</think>yes", True, Reply("hmm", "yes", (), 0)),
        (f"yes{EOS}", False, Reply("", "yes", (), 0)),
        (f"hmm{EOS}", True, Reply("hmm", "", (), 0)),
        (f"yes{EOS}more", False, Reply("", "yesmore", (), 0)),
        (f"see\n\n{OPEN}{WEATHER}{CLOSE}{EOS}", False, Reply("", "see", (WEATHER_CALL,), 0)),
        (f"r</think>\n\n{OPEN}{WEATHER}{WEATHER}{CLOSE}", True, Reply("r", "", (WEATHER_CALL, WEATHER_CALL), 0)),
        (f"see{OPEN}{WEATHER}{CLOSE}", False, Reply("", "see", (WEATHER_CALL,), 0)),
        (f"\n\n\n{OPEN}{invoke('f')}{CLOSE}", False, Reply("", "\n", (ToolCall("f", "{}", True),), 0)),
        (f"a\n\n{OPEN}{WEATHER}{CLOSE}b", False, Reply("", "ab", (WEATHER_CALL,), 0)),
        (f"r\n\n{OPEN}{WEATHER}{CLOSE}s</think>c", True, Reply("rs", "c", (WEATHER_CALL,), 0)),
        ((f"{OPEN}{WEATHER}{CLOSE}").replace("\n", ""), False, Reply("", "", (WEATHER_CALL,), 0)),
    ],
)
def test_well_formed_answers(text: str, thinking: bool, expected: Reply) -> None:
    assert reply_of(text, thinking) == expected
    assert reply_of(text, thinking, stream_arguments=True) == expected


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
    assert reply_of(f"a{text}") == Reply("", f"a{text}", (), 1)
    assert reply_of(f"a{text}", thinking=True) == Reply(f"a{text}", "", (), 1)


@pytest.mark.parametrize("text", [CLOSE, WEATHER, parameter("a", "b"), f"{D}tool_calls>", f"<{D}", f"<{D}tool_calls"])
def test_stray_markup_is_text(text: str) -> None:
    assert reply_of(f"a{text}b") == Reply("", f"a{text}b", (), 0)


def test_good_calls_survive_a_broken_neighbour() -> None:
    broken = invoke("f", "text")
    assert reply_of(f"a\n\n{OPEN}{WEATHER}{broken}{CLOSE}") == Reply("", f"a{broken}{CLOSE}", (WEATHER_CALL,), 1)
    assert reply_of(f"{OPEN}oops\n\n{OPEN}{WEATHER}{CLOSE}") == Reply("", f"{OPEN}oops", (WEATHER_CALL,), 1)


def test_markup_mentioned_in_thought_does_not_swallow_the_answer() -> None:
    reply = reply_of(f"I write {OPEN} first</think>\n\n{OPEN}{WEATHER}{CLOSE}", thinking=True)
    assert reply == Reply(f"I write {OPEN} first", "", (WEATHER_CALL,), 1)
    cut = f'{OPEN}<{D}invoke name="f">\n<{D}parameter name="a" string="true">'
    assert reply_of(f"{cut}x</think>yes", thinking=True) == Reply(f"{cut}x", "yes", (), 1)


def test_end_of_sentence_ends_a_value() -> None:
    cut = f'{OPEN}<{D}invoke name="f">\n<{D}parameter name="a" string="true">x'
    assert reply_of(cut + EOS) == Reply("", cut, (), 1)


def test_text_values_are_raw_and_json_values_are_kept_as_written() -> None:
    value = 'say "hi"\n\t\\ <b> </｜DSML> é 🐟 \x00'
    text = OPEN + invoke("f", parameter("a", value), parameter("b", ' {"x": 1.0e5} ', "false")) + CLOSE
    for stream_arguments in (False, True):
        (made,) = reply_of(text, stream_arguments=stream_arguments).tool_calls
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
    assert parser.feed(WEATHER[-3:])[0] == ToolCallStart(0, "weather")
    assert parser.feed(CLOSE + "\n") == []
    assert parser.finish()[0] == [Content("\n")]


def test_streamed_arguments_flow_and_a_cut_leaves_an_incomplete_call() -> None:
    parser = OutputParser(thinking=False, stream_arguments=True)
    assert parser.feed(f'{OPEN}<{D}invoke name="f">') == [ToolCallStart(0, "f"), ToolCallArguments(0, "{")]
    assert parser.feed(f'\n<{D}parameter name="a" string="true">one') == [
        ToolCallArguments(0, '"a": "'),
        ToolCallArguments(0, "one"),
    ]
    assert parser.feed(' "two') == [ToolCallArguments(0, ' \\"two')]
    assert parser.feed(f"</{D}para") == []
    last, reply = parser.finish()
    assert reply.tool_calls == (ToolCall("f", f'{{"a": "one \\"two</{D}para', False),)
    assert (reply.content, reply.malformed) == ("", 1)
    assert last == [ToolCallArguments(0, f"</{D}para")]


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


def joined(events: list[Event], complete: tuple[bool, ...], malformed: int) -> Reply:
    """The reply that a client builds from the events alone."""
    names: list[str] = []
    arguments: list[str] = []
    reasoning = content = ""
    for event in events:
        if isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, Content):
            content += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(names)
            names.append(event.name)
            arguments.append("")
        else:
            assert event.index == len(names) - 1
            arguments[event.index] += event.text
    calls = tuple(ToolCall(*call) for call in zip(names, arguments, complete, strict=True))
    return Reply(reasoning, content, calls, malformed)


@settings(max_examples=400, deadline=None)
@given(parts=soup, cuts=st.lists(st.integers(0, 400), max_size=12), thinking=st.booleans(), eager=st.booleans())
@example(parts=["\n\n", OPEN, "\n", WEATHER, "\n", CLOSE], cuts=list(range(200)), thinking=True, eager=True)
def test_every_cut_gives_the_same_reply(parts: list[str], cuts: list[int], thinking: bool, eager: bool) -> None:
    text = "".join(parts)
    whole = reply_of(text, thinking, eager)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    for ways in (pieces, list(text)):
        events, reply = parse(*ways, thinking=thinking, stream_arguments=eager)
        assert reply == whole
        assert joined(events, tuple(call.complete for call in reply.tool_calls), reply.malformed) == reply


@settings(max_examples=300, deadline=None)
@given(parts=soup, thinking=st.booleans(), eager=st.booleans())
def test_nothing_but_markers_is_lost(parts: list[str], thinking: bool, eager: bool) -> None:
    text = "".join(part.replace("w", f"w{i}-") if part[0] == "w" else part for i, part in enumerate(parts))
    reply = reply_of(text, thinking, eager)
    kept = reply.reasoning + reply.content + "".join(call.name + call.arguments for call in reply.tool_calls)
    assert all(part.replace("w", f"w{i}-") in kept for i, part in enumerate(parts) if part[0] == "w")
    if not reply.tool_calls:
        marks = text.count(EOS) * len(EOS)
        thought = len("<think>") * text.startswith("<think>")
        shut = 0 if not (thinking or thought) else len("</think>") * (len(kept) + marks + thought < len(text))
        assert len(kept) + marks + thought + shut == len(text)
    for call in reply.tool_calls:
        if call.complete:
            assert isinstance(json.loads(call.arguments), dict)


def test_many_unclosed_blocks_are_read_in_reasonable_time() -> None:
    opening = f'{OPEN}<{D}invoke name="f">\n<{D}parameter name="a" string="true">x'
    reply = reply_of(opening * 300)
    assert (reply.content, reply.tool_calls, reply.malformed) == (opening * 300, (), 300)
