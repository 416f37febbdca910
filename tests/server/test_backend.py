"""The thread that steps an LLM for the event loop: hand-over, leaving, closing, and steps that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.engine import EngineBusy, SamplingParams
from hadal.llm import Delta, ToolCall
from hadal.server.ask import Ask
from hadal.server.backend import LocalBackend, Ticket, join, prepare
from hadal.text.tokens import DSML
from tests.fakes import scripted_llm

ENDLESS = SamplingParams(max_tokens=100_000, temperature=0.0)


def ask(llm: Any, text: str, **options: Any) -> Any:
    return llm.prepare_chat([{"role": "user", "content": text}], ENDLESS, **options)


async def rest(ticket: Ticket) -> list[Delta]:
    deltas = []
    while ticket.open:
        parts = await ticket.take(5)
        assert parts, "nothing came"
        deltas += [delta for _, delta in parts]
    return deltas


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


@pytest.mark.parametrize("parallel", [True, False])
def test_an_ask_may_want_one_call_at_most(parallel: bool) -> None:
    llm = scripted_llm({})
    tools = ({"type": "function", "function": {"name": "f"}},)
    messages = ({"role": "user", "content": "x"},)
    (made,) = prepare(llm, Ask("m", messages, tools=tools, parallel_tool_calls=parallel), "")
    call = f'<{DSML}invoke name="f">\n</{DSML}invoke>\n'
    ids = llm.tokenizer.encode(f"</think>\n\n<{DSML}tool_calls>\n{call}{call}</{DSML}tool_calls>")
    assert made.request.constraint is not None
    assert (made.request.constraint.allowed([], ids) == len(ids)) is parallel


def test_closing_tells_every_answer_under_way() -> None:
    async def scenario() -> None:
        llm = scripted_llm({}, context=200_000, max_concurrent=1)
        backend = LocalBackend(llm)
        backend.start()
        ran, queued = backend.open(ask(llm, "endless")), backend.open(ask(llm, "endless"))
        assert await ran.take(5)
        await asyncio.to_thread(backend.close)
        for ticket in (ran, queued):
            assert (await rest(ticket))[-1].finish_reason == "abort"
            ticket.close()
        assert backend.load.waiting == 0 and not llm.busy

    run(scenario())


def test_leaving_a_ticket_early_frees_the_engine_within_a_step() -> None:
    async def scenario() -> None:
        llm = scripted_llm({}, context=200_000)
        backend = LocalBackend(llm)
        backend.start()
        ticket = backend.open(ask(llm, "endless"))
        assert await ticket.take(5)
        ticket.close()
        left = llm.engine.stats.steps
        while llm.busy:
            await asyncio.sleep(0.001)
        # One step may have been under way, and one more begun, before the thread looked.
        assert llm.engine.stats.steps <= left + 2
        backend.close()

    run(scenario())


def test_a_failed_step_ends_what_ran_and_leaves_what_waited() -> None:
    async def scenario() -> None:
        llm = scripted_llm({"plain": "yes"}, max_concurrent=1)
        backend = LocalBackend(llm)
        crashes = backend.open(ask(llm, "<crash>", thinking=False))
        waits = backend.open(ask(llm, "plain", thinking=False))
        backend.start()
        assert (await rest(crashes))[-1].finish_reason == "error"
        told = await rest(waits)
        assert "".join(delta.text for delta in told) == "yes" and told[-1].finish_reason == "stop"
        backend.close()

    run(scenario())


def test_a_step_that_fails_before_anything_ran_ends_all() -> None:
    async def scenario() -> None:
        llm = scripted_llm({}, max_concurrent=1)
        llm.engine._model.new_state = lambda: 1 / 0  # type: ignore[method-assign]
        backend = LocalBackend(llm)
        ticket = backend.open(ask(llm, "x"))
        backend.start()
        assert (await rest(ticket))[-1].finish_reason == "error"
        backend.close()
        assert not llm.busy

    run(scenario())


def test_silence_gives_nothing_after_the_timeout() -> None:
    async def scenario() -> None:
        llm = scripted_llm({})
        ticket = LocalBackend(llm).open(ask(llm, "x"))  # not started: nothing will come
        assert await ticket.take(0.01) == []

    run(scenario())


def test_the_queue_is_bounded_before_anything_is_handed_over() -> None:
    async def scenario() -> None:
        llm = scripted_llm({}, max_concurrent=2, max_waiting=1)
        backend = LocalBackend(llm)
        tickets = [backend.open(ask(llm, "x")) for _ in range(3)]
        assert backend.load.full
        with pytest.raises(EngineBusy, match="3 answers"):
            backend.open(ask(llm, "x"))
        tickets[0].close()
        assert not backend.load.full
        backend.open(ask(llm, "x"))

    run(scenario())


def test_the_predicted_wait_grows_with_the_queue_and_the_length_of_answers() -> None:
    async def scenario() -> None:
        llm = scripted_llm({"plain": "yes"}, max_concurrent=2)
        backend = LocalBackend(llm)
        backend.start()
        assert backend.load.wait == 0
        ticket = backend.open(ask(llm, "plain"))
        await rest(ticket)
        ticket.close()
        await asyncio.to_thread(backend.close)
        waits = []
        for _ in range(6):
            waits.append(backend.load.wait)
            backend.open(ask(llm, "plain"))
        assert waits[0] == waits[1] == 0 < waits[2] < waits[3] < waits[5]

    run(scenario())


CALLS = (ToolCall("call_1", "f", "{}"),)
TOKENS = [((), 0), ((1,), 0), ((2,), 1), ((3, 4), 0), ((5, 6), 1), ((7, 8), 2)]  # and how many of them reason
pieces = st.builds(
    lambda text, reasoning, calls, tokens: Delta(text, reasoning, calls, tokens[0], reasons=tokens[1]),
    st.sampled_from(["", "a", "bc"]),
    st.sampled_from(["", "x", "yz"]),
    st.sampled_from([(), CALLS]),
    st.sampled_from(TOKENS),
)


@given(st.lists(pieces, max_size=6))
def test_deltas_that_travel_together_tell_what_they_told_apart(deltas: list[Delta]) -> None:
    ticket = Ticket([], lambda _: None)
    for delta in deltas:
        ticket.put(0, delta)

    def told(parts: list[Delta]) -> list[Any]:
        """What a reader sees in order, a token or character at a time."""
        shown: list[Any] = []
        for part in parts:
            shown += [("r", c) for c in part.reasoning] + [("t", c) for c in part.text] + list(part.tool_calls)
        return shown

    merged = [delta for _, delta in ticket._parts]
    assert told(merged) == told(deltas)

    def reasoned(parts: list[Delta]) -> list[Any]:
        return [(i, n < part.reasons) for part in parts for n, i in enumerate(part.token_ids)]

    assert reasoned(merged) == reasoned(deltas)


def test_a_delta_with_text_behind_calls_is_not_joined() -> None:
    assert join(Delta(tool_calls=CALLS), Delta(text="after")) is None
    joined = join(Delta(text="a"), Delta(text="b", finish_reason="stop"))
    assert joined is not None and joined.text == "ab" and joined.finish_reason == "stop"
