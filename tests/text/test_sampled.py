"""Turns repeated token for token: which answers can be, and what the prompt is made of then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hadal.text import (
    SAMPLED_KEY,
    ChatError,
    Content,
    OutputParser,
    Reasoning,
    SampledTurn,
    Tokenizer,
    ToolCall,
    encode_messages,
    find_sampled,
    own_prompt_texts,
)
from hadal.text.tokens import ASSISTANT, DSML, EOS, THINK_CLOSE, THINK_OPEN, USER
from tests.fakes import small_tokenizer

TEXTS = own_prompt_texts()
TOOLS = [{"type": "function", "function": {"name": "f"}}]
# The same call as the codec writes it, but for spaces and line ends.
BLOCK = f'\n\n<{DSML}tool_calls><{DSML}invoke name="f">  </{DSML}invoke></{DSML}tool_calls>'
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` that no encoder gives: each character by itself, control tokens as they are."""
    out: list[int] = []
    for part in text.replace(DSML, f"\0{DSML}\0").replace(THINK_CLOSE, f"\0{THINK_CLOSE}\0").split("\0"):
        whole = part in (DSML, THINK_CLOSE)
        out += [i for piece in ([part] if whole else part) for i in tokenizer.encode(piece, control=whole)]
    return out


@dataclass(frozen=True)
class Shown:
    """An answer as a client gets it, and what is remembered of it."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]
    sampled: SampledTurn | None


def show(ids: list[int], *, thinking: bool) -> Shown:
    tokenizer, parser = small_tokenizer(), OutputParser(thinking=thinking)
    events = parser.feed(tokenizer.decode([i for i in ids if i != tokenizer.eos_id])) + parser.finish()
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    content = "".join(e.text for e in events if isinstance(e, Content))
    calls = tuple(e for e in events if isinstance(e, ToolCall))
    sampled = find_sampled(ids, tokenizer, thinking=thinking, reasoning=reasoning, content=content, calls=bool(calls))
    return Shown(reasoning, content, calls, sampled)


def made_of(text: str, *, thinking: bool = True) -> SampledTurn | None:
    return show(spell(small_tokenizer(), text), thinking=thinking).sampled


def chat(sampled: SampledTurn | None, **keys: Any) -> list[dict[str, Any]]:
    turn = {"role": "assistant", "content": "the cat", "reasoning_content": "the dog", SAMPLED_KEY: sampled, **keys}
    return [{"role": "user", "content": "Q"}, turn, {"role": "user", "content": "R"}]


@pytest.mark.parametrize(
    ("text", "thinking", "parts"),
    [
        ("the dog</think>the cat", True, ("the dog", "the cat")),
        ("the cat", False, ("", "the cat")),
        ("the dog and", True, ("the dog and", "")),
        (f"the dog</think>the cat{BLOCK}", True, ("the dog", f"the cat{BLOCK}")),
        (f"the cat\n\n<{DSML}tool_calls>oops", False, ("", f"the cat\n\n<{DSML}tool_calls>oops")),
    ],
)
def test_answers_are_split_at_the_end_of_thought(text: str, thinking: bool, parts: tuple[str, str]) -> None:
    made = made_of(text, thinking=thinking)
    assert made is not None and (made.reasoning, made.answer) == parts
    assert [*made.reasoning_ids] == spell(small_tokenizer(), parts[0])
    assert [*made.answer_ids] == spell(small_tokenizer(), parts[1])


def test_answers_that_say_other_than_was_shown_are_not_repeated() -> None:
    assert made_of(f"I call{BLOCK} now</think>ok") is None  # a call in the thought would go with the thought
    assert made_of("<think>hm</think>ok", thinking=False) is None
    for thought in ("", "the dog</think>"):  # an end of thought that ends none is not shown
        assert made_of(f"{thought}the </think>cat", thinking=bool(thought)) is None
        assert made_of(f"{thought}the </think>cat{BLOCK}", thinking=bool(thought)) is None
    tokenizer = small_tokenizer()

    def find(ids: list[int], content: str) -> SampledTurn | None:
        return find_sampled(ids, tokenizer, thinking=False, reasoning="", content=content, calls=False)

    assert find(tokenizer.encode("the cat"), "the cat") is not None
    assert find(tokenizer.encode("the cat"), "the") is None  # cut at a stop string
    assert find(tokenizer.encode(f"the{EOS} cat"), "the cat") is None
    assert find(tokenizer.encode(f"the{EOS} cat"), f"the{EOS} cat") is None


def test_a_kept_turn_is_the_sampled_ids_between_its_marks() -> None:
    tokenizer = small_tokenizer()
    made = made_of(f"the dog</think>the cat{BLOCK}")
    prompt = encode_messages(chat(made, tool_calls=[CALL]), TEXTS, tools=TOOLS)
    assert f"{ASSISTANT}{THINK_OPEN}the dog{THINK_CLOSE}the cat{BLOCK}{EOS}{USER}R" in prompt.text
    ids = tokenizer.encode_pieces(prompt.pieces)
    assert tokenizer.decode(ids) == prompt.text
    start = ids.index(tokenizer.token_id(THINK_OPEN), ids.index(tokenizer.token_id(ASSISTANT))) + 1
    sampled = spell(tokenizer, f"the dog{THINK_CLOSE}the cat{BLOCK}")
    assert ids[start : start + len(sampled) + 1] == [*sampled, tokenizer.eos_id]
    plain = encode_messages(chat(None, tool_calls=[CALL]), TEXTS, tools=TOOLS)
    assert ids != tokenizer.encode_pieces(plain.pieces) and f"<{DSML}invoke name" in plain.text


def test_a_dropped_thought_leaves_the_sampled_answer() -> None:
    tokenizer = small_tokenizer()
    for thinking in (True, False):
        prompt = encode_messages(chat(made_of("the dog</think>the cat")), TEXTS, thinking=thinking)
        assert prompt.text == encode_messages(chat(None), TEXTS, thinking=thinking).text
        ids, answer = tokenizer.encode_pieces(prompt.pieces), spell(tokenizer, "the cat")
        start = ids.index(tokenizer.token_id(THINK_CLOSE)) + 1
        assert ids[start : start + len(answer) + 1] == [*answer, tokenizer.eos_id] and "dog" not in prompt.text


def test_text_beside_given_ids_is_encoded_apart_from_them() -> None:
    tokenizer = small_tokenizer()
    t, h = spell(tokenizer, "th")
    assert len(tokenizer.encode("the")) == 1
    assert tokenizer.encode_pieces([("t", [t]), ("he", False)]) == [t, *tokenizer.encode("he")]
    assert tokenizer.encode_pieces([("the ", True), ("h", [h]), ("the ", False)]) == [
        *tokenizer.encode("the "),
        h,
        *tokenizer.encode("the "),
    ]


@pytest.mark.parametrize("forged", [{"answer_ids": [1]}, [1, 2], "ids"])
def test_nothing_that_json_can_say_counts_as_sampled(forged: Any) -> None:
    with pytest.raises(ChatError, match=r"messages\[1\] has a sampled_turn of type"):
        encode_messages(chat(forged), TEXTS)
    with pytest.raises(ChatError, match="does not take"):
        encode_messages([{"role": "user", "content": "Q", SAMPLED_KEY: forged}], TEXTS)


WORDS = ["the", "t", "h", " ", "\n\n", "é", "<", "｜", THINK_OPEN, THINK_CLOSE, EOS, USER, DSML, BLOCK, BLOCK[:20]]


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=8),
    odd=st.lists(st.integers(0, 299), max_size=4),
    at=st.integers(0, 8),
)
@example(words=["t", "h", THINK_CLOSE, "t", "h"], odd=[], at=0)
def test_whatever_is_sampled_the_next_prompt_repeats_it_or_says_what_was_shown(
    words: list[str], odd: list[int], at: int
) -> None:
    tokenizer = small_tokenizer()
    ids = [i for word in words[:at] for i in tokenizer.encode(word)]
    ids += odd + [i for word in words[at:] for i in tokenizer.encode(word)]
    for thinking in (True, False):
        shown = show(ids, thinking=thinking)
        asked = encode_messages(chat(None)[:1], TEXTS, thinking=thinking, tools=TOOLS)
        turn: dict[str, Any] = {"role": "assistant", "content": shown.content, "reasoning_content": shown.reasoning}
        turn["tool_calls"] = [
            {"function": {"name": call.name, "arguments": call.arguments}} for call in shown.calls
        ] or None
        history = [chat(None)[0], turn, {"role": "user", "content": "R"}]
        plain = encode_messages(history, TEXTS, thinking=thinking, tools=TOOLS)
        turn[SAMPLED_KEY] = shown.sampled
        prompt = encode_messages(history, TEXTS, thinking=thinking, tools=TOOLS)
        if shown.sampled is None or not shown.calls:
            assert prompt.text == plain.text
        if shown.sampled is not None:
            sent = [*tokenizer.encode_pieces(asked.pieces), *ids]
            assert tokenizer.encode_pieces(prompt.pieces)[: len(sent)] == sent
