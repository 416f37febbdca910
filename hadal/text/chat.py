"""The chat codec: OpenAI-shaped messages -> the exact prompt of DeepSeek-V4, for every rule set PromptTexts describes.

A Prompt keeps apart what the grammar wrote and what came from outside, so that the tokenizer can refuse control tokens
in the latter; its text is byte for byte the official encoding (spec 7.2-7.5). An assistant message that brings its
SampledTurn is written as the model wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hadal.text.prompts import PromptTexts, fill_template
from hadal.text.sampled import SAMPLED_KEY, SampledTurn
from hadal.text.tokenizer import Piece
from hadal.text.tokens import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    LATEST_REMINDER,
    TASKS,
    THINK_CLOSE,
    THINK_OPEN,
    USER,
)

Message = Mapping[str, Any]
PromptEnd = Literal["thinking", "content", "task", "closed"]

# `name` and `mask` (a training mark) have no place in the grammar; every other key that is not listed is an error.
_COMMON_KEYS = {"role", "content", "name", "mask"}
_ROLE_KEYS: Mapping[str, set[str]] = {
    "system": {"tools", "response_format"},
    "developer": {"tools", "response_format", "task"},
    "user": {"task"},
    "assistant": {"reasoning_content", "tool_calls", "prefix", "task", SAMPLED_KEY},
    "tool": {"tool_call_id"},
    "latest_reminder": set(),
}
_KEY_TYPES: Mapping[str, tuple[type, str]] = {
    "tools": (Sequence, "a list"),
    "tool_calls": (Sequence, "a list"),
    "tool_call_id": (str, "a string"),
    "reasoning_content": (str, "a string"),
    "response_format": (Mapping, "an object"),
    "prefix": (bool, "true or false"),
    SAMPLED_KEY: (SampledTurn, "none, it is not for callers"),
}
_MAY_LACK_CONTENT = {"system", "assistant"}


class ChatError(ValueError):
    """A conversation the grammar cannot express; the message names the place (message index) and the remedy."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. `pieces` go to `Tokenizer.encode_pieces`; `end` says what a model continues here:
    an open think span, content, the answer to a task token, or nothing (the conversation is closed)."""

    pieces: tuple[Piece, ...]
    end: PromptEnd

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class _Block:
    text: str
    is_result: bool = False
    call_id: str | None = None


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: Mapping[str, Any]
    call_id: str | None


@dataclass(frozen=True)
class _Turn:
    """One message after validation; tool results have become blocks of user turns. `place` is how errors name it."""

    place: str
    role: str
    blocks: tuple[_Block, ...]
    sections: tuple[Piece, ...] = ()
    has_tools: bool = False
    reasoning: str = ""
    calls: tuple[_Call, ...] = ()
    task: str | None = None
    prefix: bool = False
    sampled: SampledTurn | None = None


def encode_messages(
    messages: Sequence[Message],
    texts: PromptTexts,
    *,
    thinking: bool = True,
    effort: str | None = None,
    drop_thinking: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
) -> Prompt:
    """Renders OpenAI-shaped messages (content a string, None or text parts) as a V4 prompt (spec 7.2-7.5).

    `tools` and `response_format` join the first system message, which is made if there is none. `effort` speaks only
    while thinking. `drop_thinking` leaves out reasoning before the last user turn, unless any message defines tools.
    A last assistant message with `prefix` true is continued instead of closed; one with a SampledTurn under SAMPLED_KEY
    is written by that, whatever its content, calls and reasoning are. Raises ChatError.
    """
    if not messages:
        raise ChatError("messages is empty; give at least one message")
    if effort is not None and effort not in texts.efforts:
        raise ChatError(f"unknown effort {effort!r}; this model's rules accept {', '.join(texts.efforts)}")
    given = [(f"messages[{i}]", message) for i, message in enumerate(messages)]
    placed = _add_request_keys(given, {"tools": tools, "response_format": response_format})
    turns = _order_results(_fuse_user_turns([_read_turn(place, message, texts) for place, message in placed]))
    drop = drop_thinking and not any(turn.has_tools for turn in turns)
    if thinking and drop:
        last = _last_user(turns)
        turns = [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last]
    pieces: list[Piece] = [(BOS, True)]
    if thinking:
        pieces.append((texts.efforts[effort or texts.default_effort], True))
    end: PromptEnd = "closed"
    last = _last_user(turns)
    for i, turn in enumerate(turns):
        follower = turns[i + 1] if i + 1 < len(turns) else None
        open_think = thinking and (not drop or i >= last)
        answers_task = i > 0 and turns[i - 1].task is not None
        written, end = _render_turn(turn, follower, open_think, answers_task)
        _check_encodable(turn.place, written)
        pieces += written
    return Prompt(tuple(piece for piece in pieces if piece[0]), end)


def encode_fim(prefix: str, suffix: str) -> Prompt:
    """The fill-in-the-middle prompt in prefix-suffix-middle order (spec 7.2)."""
    pieces = ((BOS + FIM_BEGIN, True), (prefix, False), (FIM_HOLE, True), (suffix, False), (FIM_END, True))
    return Prompt(pieces, "content")


def _add_request_keys(placed: list[tuple[str, Message]], keys: Mapping[str, Any]) -> list[tuple[str, Message]]:
    """Moves the keys of the whole request into its first system message, or into a new one at the front."""
    keys = {key: value for key, value in keys.items() if value}
    for i, (place, message) in enumerate(placed):
        if keys and isinstance(message, Mapping) and message.get("role") == "system":
            for key in keys:
                if message.get(key):
                    raise ChatError(f"{place} defines {key} and so does the request; give {key} in one place")
            return [*placed[:i], (place, {**message, **keys}), *placed[i + 1 :]]
    return [("the request", {"role": "system", **keys}), *placed] if keys else placed


def _read_turn(place: str, message: Message, texts: PromptTexts) -> _Turn:
    role: Any = message.get("role") if isinstance(message, Mapping) else None
    if role not in _ROLE_KEYS:
        raise ChatError(f"{place} has role {role!r}; take one of {', '.join(_ROLE_KEYS)}")
    for key, value in message.items():
        if value is None:
            continue  # says nothing, and clients send many of them
        if key not in _COMMON_KEYS | _ROLE_KEYS[role]:
            raise ChatError(f"{place} ({role}) has the key {key!r}, which this role does not take; leave it out")
        expected, words = _KEY_TYPES.get(key, (object, ""))
        if not isinstance(value, expected):
            raise ChatError(f"{place} has a {key} of type {type(value).__name__}; give {words}")
    content = message.get("content")
    if content is None and role not in _MAY_LACK_CONTENT:
        raise ChatError(f"{place} ({role}) has no content; give a string or a list of text parts")
    text = _read_text(place, content)
    task = message.get("task")
    tasks = {"title"} if role == "assistant" else TASKS.keys() - {"title"}
    if task is not None and task not in tasks:
        raise ChatError(f"{place} ({role}) has the task {task!r}; take one of {', '.join(sorted(tasks))}")
    if role == "tool":
        return _Turn(place, "user", (_Block(text, is_result=True, call_id=message.get("tool_call_id")),))
    if role == "assistant":
        reasoning = message.get("reasoning_content") or ""
        calls = tuple(_read_call(f"{place}.tool_calls[{i}]", c) for i, c in enumerate(message.get("tool_calls") or ()))
        prefix, sampled = bool(message.get("prefix")), message.get(SAMPLED_KEY)
        return _Turn(place, role, (_Block(text),), (), False, reasoning, calls, task, prefix, sampled)
    sections: list[Piece] = []
    if message.get("tools"):
        schemas = "\n".join(_read_tool(f"{place}.tools[{i}]", tool) for i, tool in enumerate(message["tools"]))
        sections += [("\n\n", True), *fill_template(texts.tools, schemas)]
    if message.get("response_format"):
        sections += [("\n\n", True), *fill_template(texts.response_format, _json(message["response_format"]))]
    return _Turn(place, role, (_Block(text),), tuple(sections), bool(message.get("tools")), task=task)


def _read_text(place: str, content: Any) -> str:
    """Content as one string; text parts are blocks and blocks are joined by a blank line."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ChatError(f"{place} has content of type {type(content).__name__}; give a string or a list of text parts")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(f"{place}.content[{i}] is not a text part; DeepSeek-V4 reads only text, as type 'text'")
    return "\n\n".join(part["text"] for part in content)


def _read_tool(place: str, tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatError(f"{place} is not a function tool; give type 'function' and a function object with a name")
    return _json(function)


def _read_call(place: str, call: Any) -> _Call:
    function = (
        call.get("function") if isinstance(call, Mapping) and call.get("type", "function") == "function" else None
    )
    name = function.get("name") if isinstance(function, Mapping) else None
    call_id = call.get("id") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not isinstance(call_id, str | None):
        raise ChatError(f"{place} is not a function call; give type 'function' and a function with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:  # an empty string is how many clients spell a call without arguments
            arguments = json.loads(arguments or "{}", parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ChatError(
                f"{place} ({name}) has arguments that are not JSON ({error}); send a JSON object"
            ) from error
    if not isinstance(arguments, Mapping):
        raise ChatError(f"{place} ({name}) has arguments that are no JSON object; send an object of named arguments")
    for word in (name, *arguments):
        if '"' in word or "\n" in word or not word:
            raise ChatError(f"{place} has the name {word!r}, which a DSML tag cannot hold; use no quotes or line ends")
    return _Call(name, arguments, call_id)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _fuse_user_turns(turns: Sequence[_Turn]) -> list[_Turn]:
    fused: list[list[_Turn]] = []
    for turn in turns:
        if fused and fused[-1][-1].role == turn.role == "user" and fused[-1][-1].task is None:
            fused[-1].append(turn)
        else:
            fused.append([turn])
    return [_join_turns(run) for run in fused]


def _join_turns(run: Sequence[_Turn]) -> _Turn:
    blocks = tuple(block for turn in run for block in turn.blocks)
    return run[0] if len(run) == 1 else replace(run[0], blocks=blocks, task=run[-1].task)


def _order_results(turns: Sequence[_Turn]) -> list[_Turn]:
    """Puts the tool results of each turn in the order of the calls they answer; unknown ids come first."""
    ordered: list[_Turn] = []
    place_of: dict[str | None, int] = {}
    for turn in turns:
        if turn.calls:
            place_of = {call.call_id: i for i, call in enumerate(turn.calls) if call.call_id is not None}
        results = iter(sorted((b for b in turn.blocks if b.is_result), key=lambda b: place_of.get(b.call_id, -1)))
        ordered.append(replace(turn, blocks=tuple(next(results) if b.is_result else b for b in turn.blocks)))
    return ordered


def _last_user(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _render_turn(turn: _Turn, follower: _Turn | None, think: bool, answers_task: bool) -> tuple[list[Piece], PromptEnd]:
    """Pieces of one turn and of the transition after it; `think` says whether its think span is written out."""
    if turn.task is not None and follower is not None and follower.role != "assistant":
        raise ChatError(f"{turn.place} has a task but is followed by {follower.role}; let an assistant message follow")
    if turn.role == "assistant":
        return _render_assistant(turn, follower, think and not answers_task)
    pieces: list[Piece] = []
    if turn.role in ("user", "developer"):
        pieces.append((USER, True))
    elif turn.role == "latest_reminder":
        pieces.append((LATEST_REMINDER, True))
    for i, block in enumerate(turn.blocks):
        pieces.append(("\n\n" if i else "", True))
        pieces += [("<tool_result>", True)] * block.is_result
        pieces.append((block.text, False))
        pieces += [("</tool_result>", True)] * block.is_result
    pieces += turn.sections
    hands_over = follower is None or follower.role in ("assistant", "latest_reminder")
    if turn.role not in ("user", "developer") or not hands_over:
        return pieces, "closed"
    if turn.task in (None, "action"):
        pieces.append((ASSISTANT + (THINK_OPEN if think else THINK_CLOSE), True))
    if turn.task is not None:
        return [*pieces, (TASKS[turn.task], True)], "task"
    return pieces, "thinking" if think else "content"


def _render_assistant(turn: _Turn, follower: _Turn | None, think: bool) -> tuple[list[Piece], PromptEnd]:
    content = turn.blocks[0].text
    if turn.prefix and (follower is not None or turn.calls or turn.task):
        raise ChatError(f"{turn.place} has prefix but is not a plain last message; only a last text can be continued")
    made = None if turn.prefix else turn.sampled
    reasoning: Piece = (turn.reasoning, False) if made is None else (made.reasoning, made.reasoning_ids)
    pieces: list[Piece] = [reasoning] if think else []
    if turn.prefix and think and not content:
        return pieces, "thinking"  # the think span stays open, so that a prefix can also continue reasoning
    if think:
        pieces.append((THINK_CLOSE, True))
    pieces.append((content, False) if made is None else (made.answer, made.answer_ids))
    if turn.prefix:
        return pieces, "content"
    if turn.calls and made is None:
        pieces += _render_calls(turn.calls)
    pieces.append((EOS, True))
    if turn.task is not None:
        return [*pieces, (TASKS[turn.task], True)], "task"
    return pieces, "closed"


def _render_calls(calls: Sequence[_Call]) -> list[Piece]:
    pieces: list[Piece] = [(f"\n\n<{DSML}tool_calls>\n", True)]
    for call in calls:
        pieces += [(f'<{DSML}invoke name="', True), (call.name, False), ('">\n', True)]
        for name, value in call.arguments.items():
            is_text = isinstance(value, str)
            pieces += [(f'<{DSML}parameter name="', True), (name, False)]
            pieces.append((f'" string="{"true" if is_text else "false"}">', True))
            pieces += [(value if is_text else _json(value), False), (f"</{DSML}parameter>\n", True)]
        pieces.append((f"</{DSML}invoke>\n", True))
    return [*pieces, (f"</{DSML}tool_calls>", True)]


def _check_encodable(place: str, pieces: Sequence[Piece]) -> None:
    try:
        "".join(text for text, _ in pieces).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ChatError(f"{place} holds half of a surrogate pair, which is no character; send whole ones") from error
