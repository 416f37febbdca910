"""What one does on the page, in a real Chromium: asking, stopping, editing, tools, settings, files, errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.server.page.conftest import Open, ask, last

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def test_an_answer_has_its_thinking_folded_and_tells_what_it_took(visit: Open) -> None:
    page = visit()
    answer = ask(page, "greet")
    expect(answer.locator(".md")).to_have_text("Grüße, 世界 👋!")
    thinking = answer.locator("details")
    assert thinking.get_attribute("open") is None
    expect(thinking.locator("summary")).to_contain_text("Thought for")
    thinking.locator("summary").click()
    expect(thinking.locator(".thoughts")).to_have_text("because they met")
    took = answer.locator(".foot p").inner_text()
    assert re.search(r"\d+ tokens · first after \d\.\d\d s · .*\w+ of \d+ read from cache · (< )?\$0", took)
    second = ask(page, "plain")
    expect(second.locator(".md")).to_have_text("one. two. three.")
    roles = [message["role"] for message in page.sent[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and page.sent[1]["messages"][1]["reasoning_content"]


def test_an_answer_appears_while_it_is_written_and_stops_when_told(visit: Open) -> None:
    page = visit()
    page.get_by_label("off", exact=True).check()
    answer = ask(page, "for ever", wait=False)
    expect(answer.locator(".md")).to_contain_text("aaaa")
    expect(answer.locator(".foot")).to_contain_text("tokens/s")
    expect(page.locator("#live")).to_have_text("The model is answering.")
    page.get_by_role("button", name="Stop").click()
    expect(last(page).locator(".foot")).to_contain_text(re.compile(r"stopped.*[\d.]+ tokens/s"))
    expect(page.get_by_role("meter")).to_have_attribute("aria-valuetext", re.compile(r"^[1-9]"))  # though no usage came
    assert page.sent[0]["thinking"] == {"type": "disabled"} and "reasoning_effort" not in page.sent[0]
    expect(page.locator("#live")).to_contain_text("The answer is complete")


def test_an_answer_that_comes_in_one_piece_tells_no_rate(visit: Open) -> None:
    page = visit()
    events = [{"choices": [{"delta": {"content": "all "}}]}, {"choices": [{"delta": {"content": "at once"}}]}]
    counts = {"prompt_tokens": 9, "completion_tokens": 2000, "prompt_cache_hit_tokens": 0}
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, {"choices": [], "usage": counts}])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body + "data: [DONE]\n\n"))
    took = ask(page, "greet").locator(".foot p")
    expect(took).to_have_text(re.compile(r"2,000 tokens · first after \d\.\d\d s · none of 9 read from cache"))


def test_answering_again_and_editing_make_versions(visit: Open) -> None:
    page = visit()
    ask(page, "the cat and the dog " * 40 + "greet")
    page.get_by_role("button", name="Answer again").click()
    expect(last(page).locator(".versions")).to_contain_text("2 / 2")
    expect(page.locator(".answer .foot")).to_contain_text(re.compile(r"\b\d+ of \d+ read from cache"))
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_label("Edit message").fill("plain")
    page.get_by_label("Edit message").press("Enter")
    expect(last(page).locator(".md")).to_have_text("one. two. three.")
    assert [message["content"] for message in page.sent[-1]["messages"]] == ["plain"]
    page.locator(".user").hover()
    page.locator(".user").get_by_role("button", name="Previous version").click()
    expect(page.locator(".answer .md")).to_have_text("Grüße, 世界 👋!")
    page.get_by_role("button", name="Delete from here on").last.click()
    expect(page.locator(".answer .versions")).to_have_count(0)  # the other of the two answers
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".answer .versions")).to_contain_text("2 / 2")


def test_conversations_outlive_a_reload_and_can_be_found_renamed_and_brought_back(visit: Open) -> None:
    page = visit()
    ask(page, "greet")
    page.reload()
    expect(page.locator(".answer .md")).to_have_text("Grüße, 世界 👋!")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "plain")
    rows = page.locator("#talks li")
    expect(rows).to_have_count(2)
    page.get_by_label("Search conversations").fill("世界")
    expect(rows).to_have_count(1)
    rows.hover()
    page.get_by_role("button", name="Rename greet").click()
    page.get_by_label("Title").fill("World")
    page.get_by_label("Title").press("Enter")
    expect(rows).to_have_text(["World"])
    rows.hover()
    page.get_by_role("button", name="Delete World").click()
    expect(rows).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    page.get_by_label("Search conversations").fill("")
    expect(rows).to_have_count(2)
    page.get_by_role("button", name="Settings").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export all").click()
    held = json.loads(Path(saved.value.path()).read_text("utf-8"))
    assert sorted(talk["title"] for talk in held["talks"]) == ["World", "plain"]
    held["talks"][0]["nodes"]["x"] = {"id": "x", "parent": "x", "role": "user", "content": ""}
    fresh = visit()
    fresh.set_input_files("#import-file", {"name": "a", "mimeType": "", "buffer": json.dumps(held).encode()})
    expect(fresh.locator("#talks li")).to_have_count(1)
    expect(fresh.locator("#notice")).to_contain_text("1 conversation read, 1 left out")


def test_a_tool_call_is_shown_and_its_result_goes_back(visit: Open) -> None:
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools, as JSON").fill("{not")
    expect(page.locator("#tools-wrong")).to_contain_text("These are no tools")
    tools = [{"name": name, "parameters": {"type": "object"}} for name in ("forecast", "tide")]
    page.get_by_label("Tools, as JSON").fill(json.dumps(tools))
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#instructed")).to_have_text("tools")
    answer = ask(page, "rain?")
    expect(answer.locator(".call pre").first).to_have_text(re.compile(r'"city": "Bergen"'))
    expect(page.get_by_label("Result of forecast")).to_be_focused()
    page.fill("#prompt", "and now")
    page.press("#prompt", "Enter")
    expect(page.locator("#notice")).to_contain_text("give it first")
    page.get_by_label("Result of tide").fill("low, and dry all day")
    page.get_by_label("Result of forecast").fill("no rain")
    page.get_by_role("button", name="Give result").first.click()
    expect(page.get_by_label("Result of tide")).to_be_focused()
    page.get_by_role("button", name="Give result").click()
    expect(page.locator(".answer .md").last).to_have_text("No rain today.")
    made, *given = page.sent[-1]["messages"][-3:]
    ids = [call["id"] for call in made["tool_calls"]]
    assert [message["tool_call_id"] for message in given] == ids and len(page.sent) == 2
    assert [message["content"] for message in given] == ["no rain", "low, and dry all day"]
    assert page.sent[-1]["tools"][0]["function"]["name"] == "forecast"


def test_settings_files_and_effort_reach_the_server(visit: Open) -> None:
    page = visit()
    expect(page.locator("#instructed")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("Be brief.")
    for name, value in {"Temperature": "0.5", "Top-p": "0.9", "Longest answer": "300", "Seed": "7"}.items():
        page.get_by_label(name).fill(value)
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#instructed")).to_have_text("instructed · settings")
    page.get_by_label("max", exact=True).check()
    page.set_input_files("#picker", {"name": "deep.txt", "mimeType": "", "buffer": b"the abyss " * 200})
    expect(page.locator("#files")).to_contain_text(re.compile(r"deep\.txt\s*(≈ )?[\d,]+ tokens"))
    assert int(page.get_by_role("meter").get_attribute("aria-valuenow")) > 300
    page.set_input_files("#picker", {"name": "a.bin", "mimeType": "", "buffer": b"\x00\xff\x00"})
    expect(page.locator("#notice")).to_contain_text("a.bin is not text")
    ask(page, "greet")
    body = page.sent[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.5, 0.9, 300, 7)
    assert body["reasoning_effort"] == "max" and body["messages"][0] == {"role": "system", "content": "Be brief."}
    content = body["messages"][1]["content"]
    assert content.startswith("[file name]: deep.txt\n") and content.endswith("[file content end]\ngreet")
    expect(page.get_by_role("meter")).to_have_attribute("aria-valuetext", re.compile(r"^[1-9][\d,]* of 8,192 tokens$"))


def test_errors_are_told_with_a_way_on(visit: Open) -> None:
    page = visit()
    busy = {"error": {"message": "too many requests run and wait here"}}
    tries: list[dict[str, Any]] = [
        {"status": 429, "headers": {"retry-after": "1"}, "json": busy},
        {"status": 401, "json": {"error": {"message": "no key was sent"}}},
        {"status": 200, "body": 'data: {"choices":[{"delta":{"content":"half"}}]}\n\n'},
        {"status": 200, "body": 'data: {"error":{"message":"the engine failed"}}\n\n'},
    ]
    keys: list[str | None] = []

    def answer(route: Any) -> None:
        keys.append(route.request.headers.get("authorization"))
        route.fulfill(**tries.pop(0)) if tries else route.abort()

    page.route("**/v1/chat/completions", answer)
    ask(page, "greet")
    error = page.get_by_role("alert")
    expect(error).to_contain_text("Too many requests")
    expect(page.get_by_role("meter")).to_have_attribute("aria-valuetext", re.compile(r"^[1-9]\d* of 8,192"))
    error.get_by_role("button").click()  # which waits out the second that the server asks for
    expect(error).to_contain_text("No key was sent")
    error.get_by_role("button", name="Enter a key").click()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Enter")
    expect(error).to_contain_text("The connection ended before the answer did")
    expect(page.locator(".answer .md")).to_have_text("half")
    error.get_by_role("button", name="Retry").click()
    expect(error).to_contain_text("The engine failed")
    error.get_by_role("button", name="Retry").click()
    expect(error).to_contain_text("The server cannot be reached")
    assert keys == [None, None, "Bearer secret", "Bearer secret", "Bearer secret"]
    stored = page.evaluate("[sessionStorage['hadal.key'], localStorage['hadal.key']]")
    assert stored == ["secret", None]
    page.unroute("**/v1/chat/completions")
    error.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer .md")).to_have_text("Grüße, 世界 👋!")
    answer_that_breaks = ask(page, "broken")
    expect(answer_that_breaks.get_by_role("alert")).to_be_visible()
