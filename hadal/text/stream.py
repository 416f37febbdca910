"""OutputParser: generated text -> reasoning, content and tool calls, piece by piece as it arrives.

The result does not depend on how the text was cut into pieces. Text that looks like a tool call and is not one comes
back as text; nothing is lost except the markers of a well-formed answer (spec 7.4).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hadal.text.stops import partial_suffix
from hadal.text.tokens import DSML, EOS, THINK_CLOSE, THINK_OPEN

_CALLS_OPEN = f"<{DSML}tool_calls>"
_CALLS_CLOSE = f"</{DSML}tool_calls>"
_INVOKE_OPEN = f'<{DSML}invoke name="'
_INVOKE_CLOSE = f"</{DSML}invoke>"
_PARAMETER_OPEN = f'<{DSML}parameter name="'
_PARAMETER_CLOSE = f"</{DSML}parameter>"
_INVOKE_TAIL = '">'
_TEXT_TAIL = '" string="true">'
_JSON_TAIL = '" string="false">'

# The blank line before a block belongs to the block, so it is held back like a marker.
_REASONING_MARKERS = (f"\n\n{_CALLS_OPEN}", _CALLS_OPEN, THINK_CLOSE, EOS)
_CONTENT_MARKERS = (f"\n\n{_CALLS_OPEN}", _CALLS_OPEN, EOS)
_VALUE_MARKERS = (_PARAMETER_CLOSE, EOS)
_SPACES = " \t\r\n"


@dataclass(frozen=True)
class Reasoning:
    """More text of the think span."""

    text: str


@dataclass(frozen=True)
class Content:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call; `arguments` is the JSON text of an object."""

    name: str
    arguments: str


Event = Reasoning | Content | ToolCall


class OutputParser:
    """Parses one answer: feed text and read events; joined in order they are the answer.

    `thinking` says that the prompt left a think span open (`Prompt.end`). A call is announced when it is complete and
    valid, so that broken ones can come back whole as text. Blocks are read in the think span as well, for a call there
    is meant, too. `malformed` counts blocks that came back, wholly or from the first broken call on.
    """

    def __init__(self, *, thinking: bool) -> None:
        self.thinks = thinking  # whether the text that comes next belongs to the think span, as far as is certain
        self.malformed = 0
        self._state: Literal["start", "text", "calls", "parameters", "value"] = "start"
        self._buffer = ""  # not yet looked at
        self._opener = ""  # the opening tag of a block of which nothing is announced yet
        self._raw: list[str] = []  # what follows it and is not announced either
        self._events: list[Event] = []
        self._name = ""  # of the call being read
        self._arguments: list[str] = []  # its JSON text so far; empty between calls
        self._names: set[str] = set()
        self._value: list[str] = []
        self._value_is_text = True

    def feed(self, text: str) -> list[Event]:
        """The events that became certain with this text."""
        self._buffer += text
        while self._step(final=False):
            pass
        return self._drain()

    def finish(self) -> list[Event]:
        """The last events."""
        while self._step(final=True):
            pass
        return self._drain()

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self, final: bool) -> bool:
        """Consumes one marker or tag; False when more text is needed (or, at the end, when all is consumed)."""
        if self._state == "start":
            return self._step_start(final)
        if self._state == "text":
            return self._step_text(final)
        if self._state == "value":
            return self._step_value(final)
        unspaced = self._buffer.lstrip(_SPACES)
        if self._opener or self._arguments:  # spaces after what is announced belong to the block and never come back
            self._raw.append(self._buffer[: len(self._buffer) - len(unspaced)])
        self._buffer = unspaced
        return self._step_calls(final) if self._state == "calls" else self._step_parameters(final)

    def _step_start(self, final: bool) -> bool:
        """A leading <think> opens the think span whether or not the prompt had done so."""
        if THINK_OPEN.startswith(self._buffer) and self._buffer != THINK_OPEN and not final:
            return False
        if self._buffer.startswith(THINK_OPEN):
            self._buffer = self._buffer[len(THINK_OPEN) :]
            self.thinks = True
        self._state = "text"
        return True

    def _step_text(self, final: bool) -> bool:
        markers = _REASONING_MARKERS if self.thinks else _CONTENT_MARKERS
        found = _find_first(self._buffer, markers)
        if found is None:
            keep = 0 if final else partial_suffix(self._buffer, markers)
            self._emit_text(self._buffer[: len(self._buffer) - keep])
            self._buffer = self._buffer[len(self._buffer) - keep :]
            return False
        start, marker = found
        self._emit_text(self._buffer[:start])
        self._buffer = self._buffer[start + len(marker) :]
        if marker in (THINK_CLOSE, EOS):
            self.thinks = False  # after EOS there is nothing left to think about; later text stays visible
        else:
            self._opener, self._state = marker, "calls"
        return True

    def _step_calls(self, final: bool) -> bool:
        """Between the calls of a block."""
        if not self._opener and self._buffer.startswith(_CALLS_CLOSE):
            self._take(len(_CALLS_CLOSE))
            self._commit()
            self._state = "text"
            return True
        tag = _read_tag(self._buffer, _INVOKE_OPEN, (_INVOKE_TAIL,))
        if isinstance(tag, _Tag):
            self._take(tag.length)
            self._name, self._arguments, self._names = tag.name, ["{"], set()
            self._state = "parameters"
            return True
        closing = not self._opener and _CALLS_CLOSE.startswith(self._buffer)
        return self._wait_or_break(tag == "partial" or closing, final)

    def _step_parameters(self, final: bool) -> bool:
        """Between the parameters of a call."""
        if self._buffer.startswith(_INVOKE_CLOSE):
            self._take(len(_INVOKE_CLOSE))
            self._events.append(ToolCall(self._name, "".join(self._arguments) + "}"))
            self._commit()
            self._state = "calls"
            return True
        tag = _read_tag(self._buffer, _PARAMETER_OPEN, (_TEXT_TAIL, _JSON_TAIL))
        if isinstance(tag, _Tag) and tag.name not in self._names:
            self._take(tag.length)
            self._value, self._value_is_text = [], tag.tail == _TEXT_TAIL
            label = (", " if self._names else "") + json.dumps(tag.name, ensure_ascii=False) + ": "
            self._arguments.append(label + ('"' if self._value_is_text else ""))
            self._names.add(tag.name)
            self._state = "value"
            return True
        return self._wait_or_break(tag == "partial" or _INVOKE_CLOSE.startswith(self._buffer), final)

    def _step_value(self, final: bool) -> bool:
        found = _find_first(self._buffer, _VALUE_MARKERS)
        if found is None:
            keep = 0 if final else partial_suffix(self._buffer, _VALUE_MARKERS)
            self._take_value(len(self._buffer) - keep)
            return self._wait_or_break(True, final)
        start, marker = found
        self._take_value(start)
        if marker == EOS or not (self._value_is_text or _is_json("".join(self._value))):
            return self._wait_or_break(False, final)
        self._take(len(marker))
        self._arguments.append('"' if self._value_is_text else "".join(self._value))
        self._state = "parameters"
        return True

    def _take_value(self, length: int) -> None:
        text = self._buffer[:length]
        self._take(length)
        if not self._value_is_text:
            self._value.append(text)
        elif text:
            self._arguments.append(json.dumps(text, ensure_ascii=False)[1:-1])

    def _take(self, length: int) -> None:
        self._raw.append(self._buffer[:length])
        self._buffer = self._buffer[length:]

    def _commit(self) -> None:
        """What was read is announced: it can no longer come back as text."""
        self._opener, self._raw, self._arguments = "", [], []

    def _wait_or_break(self, possible: bool, final: bool) -> bool:
        """Waits while the text may still become a tag; else what is not announced is read again as text."""
        if possible and not final:
            return False
        self.malformed += bool(self._opener or self._raw or self._buffer)
        self._emit_text(self._opener)
        self._buffer = "".join(self._raw) + self._buffer
        self._state = "text"
        self._commit()
        return True

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text) if self.thinks else Content(text))


@dataclass(frozen=True)
class _Tag:
    name: str
    tail: str
    length: int


def _read_tag(text: str, head: str, tails: Sequence[str]) -> _Tag | Literal["partial"] | None:
    """The tag `head` NAME `tail` at the start of `text`; "partial" while it may still become one."""
    if not text.startswith(head):
        return "partial" if head.startswith(text) else None
    quote = text.find('"', len(head))
    name = text[len(head) : quote if quote >= 0 else None]
    if "\n" in name or quote == len(head):
        return None
    if quote < 0:
        return "partial"
    for tail in tails:
        if text.startswith(tail, quote):
            return _Tag(name, tail, quote + len(tail))
    return "partial" if any(tail.startswith(text[quote:]) for tail in tails) else None


def _find_first(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    found = [(text.find(marker), marker) for marker in markers]
    return min(((start, marker) for start, marker in found if start >= 0), default=None)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
