"""The bytes of events and answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.server.wire import Event, dump


@given(
    st.recursive(
        st.text() | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_says_what_it_was_given(value: object) -> None:
    assert json.loads(dump(value).encode()) == value


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\n", "\r", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_an_event_is_one_line_to_readers_of_every_kind(end: str) -> None:
    written = Event({"text": f"a{end}b"}).encode().decode()
    assert written.splitlines() == [written.rstrip("\n"), ""]
    assert json.loads(written.removeprefix("data: ")) == {"text": f"a{end}b"}


def test_half_a_surrogate_pair_is_told_by_an_escape() -> None:
    assert dump({"text": "\ud83d"}) == '{"text":"\\ud83d"}'
