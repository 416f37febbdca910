"""Remembered turns: whose they are, when they are put back, and that the next prompt then goes on where they ended."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import pytest

from hadal.engine import SamplingParams
from hadal.llm import LLM, CompletionOutput, Generation, ToolCall
from hadal.server.memory import HistoryError, TurnMemory
from hadal.text import SAMPLED_KEY, SampledTurn
from hadal.text.tokens import DSML
from tests.fakes import scripted_llm

Chat = list[dict[str, Any]]
QUESTION: Chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = ToolCall("call_1", "weather", '{"city": "Ys", "days": [1, 2]}')


def output(text: str = "OK", reasoning: str | None = "hm", calls: tuple[ToolCall, ...] = ()) -> CompletionOutput:
    return CompletionOutput(0, text, [], reasoning, list(calls), None, "tool_calls" if calls else "stop")


def sampled(text: str = "OK", reasoning: str = "hm") -> SampledTurn:
    return SampledTurn(reasoning, [1] * len(reasoning), text, [2] * len(text))


def reply(text: Any = "OK", calls: tuple[ToolCall, ...] = (), **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": [call.to_dict() for call in calls] or None, **keys}


def known(*, calls: tuple[ToolCall, ...] = (), **options: Any) -> TurnMemory:
    memory = TurnMemory(**options)
    memory.remember("a", QUESTION, output(calls=calls), sampled())
    return memory


def last(memory: TurnMemory, messages: Chat, tenant: str = "a", **options: Any) -> dict[str, Any]:
    """The last assistant message as it is recalled."""
    recalled = memory.recall(tenant, [*messages, {"role": "user", "content": "and?"}], **options)
    assert len(recalled) == len(messages) + 1
    return dict(recalled[-2])


def test_a_turn_comes_back_with_its_reasoning_and_its_tokens() -> None:
    memory = known()
    back = last(memory, [*QUESTION, reply()])
    assert back["reasoning_content"] == "hm" and [*back[SAMPLED_KEY].answer_ids] == [2, 2]
    assert (memory.replayed, memory.repaired, memory.unknown) == (1, 1, 0)
    assert last(memory, [*QUESTION, reply(reasoning_content="hm")])[SAMPLED_KEY] is back[SAMPLED_KEY]
    assert last(memory, [*QUESTION, reply(reasoning_content="")])["reasoning_content"] == "hm"
    assert (memory.replayed, memory.repaired, memory.unknown) == (3, 2, 0)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Q"}, reply()],
        [*QUESTION, reply("OK!")],
        [QUESTION[1], QUESTION[0], reply()],
        [QUESTION[0], {"role": "developer", "content": "Q"}, reply()],
        [{"role": "system", "content": "SQ"}, {"role": "user", "content": ""}, reply()],
        [*QUESTION, reply(), {"role": "user", "content": "Q"}, reply()],
        [*QUESTION, reply(calls=(CALL,))],
    ],
)
def test_the_same_words_elsewhere_are_not_that_turn(messages: Chat) -> None:
    memory = known()
    assert last(memory, messages) == messages[-1] and memory.unknown >= 1


def test_another_tenant_finds_nothing() -> None:
    memory = known(calls=(CALL,))
    message = reply(calls=(CALL,))
    assert last(memory, [*QUESTION, message], tenant="b") == message
    assert SAMPLED_KEY in last(memory, [*QUESTION, message])


def test_text_parts_and_reasoning_on_the_way_do_not_hide_a_turn() -> None:
    memory = known()
    parts: Chat = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in QUESTION]
    first = [*parts, reply([{"type": "text", "text": "OK"}], reasoning_content="changed")]
    memory.remember("a", [*first, QUESTION[1]], output("yes"), sampled("yes"))
    assert SAMPLED_KEY in last(memory, [*QUESTION, reply(), QUESTION[1], reply("yes")])


def test_a_turn_is_found_by_the_id_of_a_call_in_a_conversation_that_changed() -> None:
    memory = known(calls=(CALL,))
    same = ToolCall("call_1", "weather", '{"days":[1,2],"city":"Ys"}')
    elsewhere: Chat = [{"role": "user", "content": "another"}]
    back = last(memory, [*elsewhere, reply(calls=(same,))])
    assert back["reasoning_content"] == "hm" and SAMPLED_KEY in back


@pytest.mark.parametrize(
    "message",
    [
        reply("Ok", (CALL,)),
        reply(None, (CALL,)),
        reply(calls=(CALL, CALL)),
        reply(calls=(ToolCall("call_1", "weather", '{"city": "Ys", "days": [1, 3]}'),)),
        reply(calls=(ToolCall("call_1", "weather", '{"city": "Ys", "days": [true, 2]}'),)),
        reply(calls=(ToolCall("call_1", "climate", CALL.arguments),)),
        reply(calls=(ToolCall("call_1", "weather", "{"),)),
        reply(calls=(CALL,), reasoning_content="other"),
    ],
)
def test_a_turn_that_was_changed_is_not_said_in_the_old_tokens(message: dict[str, Any]) -> None:
    memory = known(calls=(CALL,))
    back = last(memory, [*QUESTION, message])
    assert SAMPLED_KEY not in back and memory.replayed == 0
    assert back["reasoning_content"] == message.get("reasoning_content", "hm")


def test_calls_without_arguments_may_be_spelled_in_two_ways() -> None:
    memory = known(calls=(ToolCall("call_1", "now", "{}"),))
    assert SAMPLED_KEY in last(memory, [*QUESTION, reply(calls=(ToolCall("call_1", "now", ""),))])


def test_without_thinking_nothing_is_repaired() -> None:
    back = last(known(), [*QUESTION, reply()], thinking=False)
    assert "reasoning_content" not in back and SAMPLED_KEY in back


def test_strict_history_insists_on_reasoning_while_thinking_with_tools() -> None:
    memory = known(calls=(CALL,))
    bare = [*QUESTION, reply(calls=(CALL,))]
    with pytest.raises(HistoryError, match=r"messages\[2\] \(assistant\) has no reasoning_content"):
        last(memory, bare, tools=True, strict=True)
    with pytest.raises(HistoryError):
        last(memory, bare, tools=True, strict=True, synthetic=True)  # it was made here, so its reasoning is missing
    for options in ({"tools": True}, {"strict": True}, {"tools": True, "strict": True, "thinking": False}):
        assert SAMPLED_KEY in last(memory, bare, **options)
    full = [*QUESTION, reply(calls=(CALL,), reasoning_content="")]
    assert last(memory, full, tools=True, strict=True)["reasoning_content"] == "hm"


def test_calls_never_made_here_are_taken_where_the_api_takes_them() -> None:
    memory = TurnMemory()
    invented = [*QUESTION, reply(calls=(CALL,))]
    assert last(memory, invented, tools=True) == invented[-1]
    assert last(memory, invented, tools=True, strict=True, synthetic=True) == invented[-1]
    with pytest.raises(HistoryError, match="reasoning_content"):
        last(memory, invented, tools=True, strict=True)
    with pytest.raises(HistoryError, match="reasoning_content"):
        last(memory, [*QUESTION, reply("no call")], tools=True, strict=True, synthetic=True)


def test_a_turn_without_reasoning_has_none_to_send_back() -> None:
    memory = TurnMemory()
    memory.remember("a", QUESTION, output(reasoning=""), sampled(reasoning=""))
    bare = [*QUESTION, reply()]
    for synthetic in (True, False):
        assert SAMPLED_KEY in last(memory, bare, tools=True, strict=True, synthetic=synthetic)


def test_answers_that_were_broken_off_or_begun_by_the_client_are_not_kept() -> None:
    memory = TurnMemory()
    for reason in ("abort", "error", None):
        memory.remember("a", QUESTION, CompletionOutput(0, "OK", [], None, [], None, reason))  # type: ignore[arg-type]
    begun = {"role": "assistant", "content": "O", "prefix": True}
    memory.remember("a", [*QUESTION, begun], output("K"))
    assert memory.nbytes == 0
    assert memory.recall("a", [*QUESTION, begun], tools=True, strict=True) == [*QUESTION, begun]


def test_what_was_used_last_is_kept_within_the_limit() -> None:
    memory = TurnMemory(limit_bytes=40_000)
    chats: list[Chat] = [[{"role": "user", "content": f"Q{i}"}] for i in range(40)]
    for i, chat in enumerate(chats):
        memory.remember("a", chat, output("x" * 1000), sampled("x" * 1000))
        assert 0 < memory.nbytes <= 40_000
        assert SAMPLED_KEY in last(memory, [*chats[0], reply("x" * 1000)]), i
    found = [SAMPLED_KEY in last(memory, [*chat, reply("x" * 1000)]) for chat in chats]
    assert found[0] and found[-1] and not found[1] and sum(found) < 10
    held = memory.nbytes
    memory.remember("a", QUESTION, output("x" * 50_000))
    assert memory.nbytes == held and SAMPLED_KEY in last(memory, [*chats[-1], reply("x" * 1000)])


def test_the_same_answer_again_takes_no_more_room() -> None:
    memory = known()
    held = memory.nbytes
    for _ in range(5):
        memory.remember("a", QUESTION, output(), sampled())
    assert memory.nbytes == held


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": "assistant"},
        {"role": "assistant", "content": 5, "tool_calls": 3},
        {"role": "assistant", "content": [{"type": "image"}, 7], "tool_calls": [1, {"function": 2}, {"id": 4}]},
        {"role": "assistant", "content": [], "tool_calls": [{"id": [], "function": {"arguments": {1, 2}}}]},
        {"role": "assistant", "content": "\ud800", "reasoning_content": 3},
        "text",
        None,
    ],
)
def test_messages_of_any_shape_pass_unchanged(message: Any) -> None:
    assert known().recall("a", [message, *QUESTION], tools=True) == [message, *QUESTION]


def test_many_threads_may_use_it_at_once() -> None:
    memory, errors = TurnMemory(limit_bytes=20_000), list[BaseException]()

    def work(tenant: str) -> None:
        try:
            for i in range(200):
                call = ToolCall(f"call_{tenant}{i}", "f", "{}")
                memory.remember(tenant, QUESTION, output(calls=(call,)), sampled())
                last(memory, [*QUESTION, reply(calls=(call,))], tenant)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == [] and 0 < memory.nbytes <= 20_000


def test_a_conversation_of_a_million_tokens_is_looked_up_in_a_fraction_of_a_second() -> None:
    memory = TurnMemory()
    chat: Chat = [message for i in range(500) for message in ({"role": "user", "content": "x" * 8000}, reply(f"{i}"))]
    begun = time.perf_counter()
    assert memory.recall("a", chat) == chat
    assert time.perf_counter() - begun < 1.0


def ask(llm: LLM, memory: TurnMemory, messages: Chat, params: SamplingParams, **options: Any) -> Generation:
    """One request as the service makes it."""
    thinking, tools = options.get("thinking", True), bool(options.get("tools"))
    recalled = memory.recall("a", messages, thinking=thinking, tools=tools)
    (generation,) = llm.prepare_chat(recalled, params, **options)
    llm.submit(generation)
    while llm.busy:
        llm.step()
    memory.remember("a", messages, generation.output(), generation.sampled)
    return generation


def answered(messages: Chat, generation: Generation) -> Chat:
    """What a client that forgets the reasoning has after an answer."""
    made = generation.output()
    return [*messages, reply(made.text, tuple(made.tool_calls))]


# Calls as no codec writes them: no line ends, spaces within JSON.
# Rendering the call again would write 10.0, so only what was sampled is the same text.
SPELLED = (
    f'<{DSML}tool_calls>\n<{DSML}invoke name="weather">\n<{DSML}parameter name="days" string="false">[1.0e1]'
    f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
)


@pytest.mark.parametrize("thinking", [True, False])
def test_after_tool_calls_the_next_prompt_goes_on_where_the_answer_ended(thinking: bool) -> None:
    thought = "I must look</think>" if thinking else ""
    llm = scripted_llm({"question": f"{thought}Let me see.{SPELLED}", "sunny": "fine</think>It is sunny."})
    memory, params = TurnMemory(), SamplingParams(max_tokens=400, temperature=0.0)
    messages: Chat = [{"role": "user", "content": "a question"}]
    first = ask(llm, memory, messages, params, thinking=thinking, tools=TOOLS)
    (call,) = first.output().tool_calls
    assert first.finish_reason == "tool_calls" and call.id.startswith("call_") and len(call.id) == 37
    messages = [*answered(messages, first), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = ask(llm, memory, messages, params, thinking=thinking, tools=TOOLS)
    before = (*first.request.prompt_ids, *first.request.output_ids)
    assert second.request.prompt_ids[: len(before)] == before
    assert second.request.cached_tokens == len(before) - 1  # the end of the sequence was chosen but not computed
    assert SPELLED in (second.prompt or "") and (memory.replayed, memory.unknown) == (1, 0)


def conversation(llm: LLM, memory: TurnMemory, **options: Any) -> list[int]:
    """Three turns of answers drawn at random and cut by the limit: how much of the turn before each later prompt lost.

    The client sends the reasoning back.
    """
    messages: Chat = [{"role": "system", "content": f"{uuid.uuid4()} You tell stories. " * 4}]  # so none is known
    before: tuple[int, ...] = ()
    lost = []
    for turn in range(3):
        messages = [*messages, {"role": "user", "content": f"Tell me story {turn} of a fish in the deep sea."}]
        params = SamplingParams(max_tokens=40, temperature=1.5, seed=turn)
        made = ask(llm, memory, messages, params, **options)
        if turn:
            lost.append(len(before) - (made.request.cached_tokens or 0))
            assert lost[-1] > 1 or made.request.prompt_ids[: len(before)] == before
        before = (*made.request.prompt_ids, *made.request.output_ids)
        messages = answered(messages, made)
        messages[-1]["reasoning_content"] = made.output().reasoning
    return lost


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM("nano", device="cpu")


@pytest.mark.parametrize(
    "options", [{"thinking": True, "tools": TOOLS}, {"thinking": False, "tools": TOOLS}, {"thinking": False}]
)
def test_the_embedded_model_finds_its_own_answers_again(nano: LLM, options: dict[str, Any]) -> None:
    memory = TurnMemory()
    assert conversation(nano, memory, **options) == [1, 1]  # the last token was chosen but not computed
    assert (memory.replayed, memory.unknown) == (3, 0)


def test_without_their_tokens_answers_are_lost_though_the_text_is_the_same(nano: LLM) -> None:
    assert max(conversation(nano, TurnMemory(limit_bytes=0), thinking=True, tools=TOOLS)) > 5
