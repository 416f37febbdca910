from __future__ import annotations

import asyncio

from hadal.engine import SamplingParams
from hadal.server.service import Service
from tests.fakes import scripted_llm

ENDLESS = SamplingParams(max_tokens=100_000, temperature=0.0)


def test_closing_tells_every_answer_under_way() -> None:
    async def scenario() -> None:
        llm = scripted_llm({}, context=200_000, max_concurrent=1)
        service = Service(llm)
        service.start()
        messages = [{"role": "user", "content": "endless"}]
        with (
            service.open(llm.prepare_chat(messages, ENDLESS)[0]) as ran,
            service.open(llm.prepare_chat(messages, ENDLESS)[0]) as queued,
        ):
            assert await ran.next(5) is not None
            await asyncio.to_thread(service.close)
            for ticket in (ran, queued):
                while (delta := await ticket.next(1)) is not None and delta.finish_reason is None:
                    pass
                assert delta is not None and delta.finish_reason == "abort"
        assert service.active == 0 and not llm.busy

    asyncio.run(scenario())


def test_leaving_a_ticket_early_frees_the_engine() -> None:
    async def scenario() -> None:
        llm = scripted_llm({}, context=200_000)
        service = Service(llm)
        service.start()
        with service.open(llm.prepare_chat([{"role": "user", "content": "endless"}], ENDLESS)[0]) as ticket:
            assert await ticket.next(5) is not None
        for _ in range(500):
            if not service.active:
                break
            await asyncio.sleep(0.01)
        assert service.active == 0 and not llm.busy
        service.close()

    asyncio.run(scenario())


def test_a_failed_step_ends_what_ran_and_leaves_what_waited() -> None:
    async def scenario() -> None:
        llm = scripted_llm({"plain": "yes"}, max_concurrent=1)
        service = Service(llm)
        prepared = [
            llm.prepare_chat([{"role": "user", "content": text}], ENDLESS, thinking=False)[0]
            for text in ("<crash>", "plain")
        ]
        with service.open(prepared[0]) as crashes, service.open(prepared[1]) as waits:
            service.start()
            failed = await crashes.next(5)
            assert failed is not None and failed.finish_reason == "error"
            parts = []
            while not parts or parts[-1].finish_reason is None:
                parts.append(await waits.next(5))  # type: ignore[arg-type]
            assert "".join(part.text for part in parts) == "yes" and parts[-1].finish_reason == "stop"
        service.close()

    asyncio.run(scenario())


def test_a_step_that_fails_before_anything_ran_ends_all() -> None:
    async def scenario() -> None:
        llm = scripted_llm({}, max_concurrent=1)
        llm.engine._model.new_state = lambda: 1 / 0  # type: ignore[method-assign]
        service = Service(llm)
        with service.open(llm.prepare_chat([{"role": "user", "content": "x"}], ENDLESS)[0]) as ticket:
            service.start()
            failed = await ticket.next(5)
            assert failed is not None and failed.finish_reason == "error"
        service.close()
        assert not llm.busy

    asyncio.run(scenario())


def test_no_delta_in_time_is_none() -> None:
    async def scenario() -> None:
        llm = scripted_llm({})
        service = Service(llm)  # not started: nothing will come
        ticket = service.open(llm.prepare_chat([{"role": "user", "content": "x"}], ENDLESS)[0])
        assert await ticket.next(0.01) is None

    asyncio.run(scenario())
