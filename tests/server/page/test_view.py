"""How the page shows and is used: text that stays text, themes, keyboard, names, narrow windows, pictures."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from tests.server.page.conftest import EVIL, RICH, Open, ask, last

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
STATUS: dict[str, Any] = {
    "model": "scripted", "version": "1.2.3", "uptime_s": 3700, "running": 3, "waiting": 2, "max_concurrent": 8,
    "tokens_per_second": 41.5, "prefill_tokens_per_second": 900.0, "draft_acceptance": 0.5,
    "cache": {"used_bytes": 2**30, "total_bytes": 2**32, "hit_rate": 0.9, "reasons": {"first_seen": 7}},
    "history": [
        {"t": 1000 + 5 * i, "running": i % 4, "waiting": i % 3, "tokens_per_second": i, "hit_rate": 0.5}
        for i in range(99)
    ],
    "spend": {"price_list": "list", "today": 0.25, "total": 3.5, "by_day": [{"day": "2026-01-01", "cost": 0.25}]},
}  # fmt: skip
# Ratio of luminances of text to what lies behind it, for every element that has text of its own.
CONTRAST = """() => {
  const light = (c) => { const v = c / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const rgb = (text) => { const m = text.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1]; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (el) => { for (; el; el = el.parentElement) {
    const c = rgb(getComputedStyle(el).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  return [...document.body.querySelectorAll("*")].filter((el) => el.checkVisibility({ opacityProperty: true }) &&
      [...el.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && !el.closest("svg, .sr")).map((el) => {
    const [a, b] = [luminance(rgb(getComputedStyle(el).color)), luminance(behind(el))];
    return [el.className || el.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; })
    .filter(([, r]) => r < 4.5);
}"""
CONTROLS = {"button", "link", "textbox", "searchbox", "combobox", "radio", "checkbox", "spinbutton", "meter", "dialog"}


def nameless(page: Any) -> list[str]:
    """Controls, pictures and regions to which the browser's accessibility tree gives no name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = [(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"] and "role" in n]
    assert sum(role in CONTROLS for role, _ in roles) > 5
    return [role for role, name in roles if role in CONTROLS | {"img", "region", "navigation", "main"} and not name]


def wide(page: Any) -> int:
    return int(page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"))


def test_markdown_becomes_elements(visit: Open) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = ask(page, "rich").locator(".md")
    for selector, words in {
        "h4": "Depths", "strong": "strong", "em": "soft", "p > code": "code", "ol > li > ul > li": "inner",
        "th.right": "Metres", "td.right": "4000", "blockquote": "quoted", "pre .keyword >> nth=0": "def",
    }.items():  # fmt: skip
        expect(text.locator(selector)).to_have_text(words)
    expect(text.locator("a")).to_have_count(1)
    link = text.locator("a")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == ("https://example.org/x", "noopener noreferrer")
    expect(text.locator("p").first).to_contain_text("[no link](javascript:alert(1))")
    text.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("def dive(n):")


def test_markup_in_an_answer_stays_text(visit: Open) -> None:
    page = visit()
    text = ask(page, "evil").locator(".md")
    expect(text.locator("p").first).to_have_text(
        "<img src=x onerror=alert(1)><script>alert(2)</script> [x](javascript:alert(3)) <b>bold</b>"
    )
    expect(text.locator("p").last).to_have_text("<svg onload=alert(4)>")
    assert text.locator("img, script, svg, b, a").count() == 0
    page.reload()
    expect(page.locator(".answer strong")).to_have_text("<b>bold</b>")
    assert page.evaluate("try { document.body.innerHTML = '<p>'; 'set' } catch (e) { e.name }") == "TypeError"


def test_a_text_that_grows_is_shown_as_when_it_came_whole(visit: Open) -> None:
    page = visit()
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    pieces = [
        *RICH.split("\n"),
        *EVIL.split("\n"),
        "",
        "",
        "- a",
        "  - b",
        "1. c",
        "10. d",
        "***",
        "```",
        "~~~",
        "> q",
        "| a | b |",
        "|---|---|",
        "# h",
        "x\\*y",
        "*",
        "`",
    ]
    cases = []
    for _ in range(150):
        text = "\n".join(dice.choices(pieces, k=dice.randrange(1, 25)))
        cases.append([text, sorted(dice.sample(range(len(text) + 1), min(len(text), dice.randrange(1, 40))))])
    differ = page.evaluate(
        """async (cases) => {
          const { Markdown } = await import("./page/markdown.js");
          const shown = (text, cuts) => {
            const root = document.createElement("div"), markdown = new Markdown(root);
            for (const cut of [...cuts, text.length]) markdown.update(text.slice(0, cut));
            return root.innerHTML;
          };
          return cases.filter(([text, cuts]) => shown(text, cuts) !== shown(text, []));
        }""",
        cases,
    )
    assert differ == []


def test_a_hundred_thousand_characters_do_not_hold_the_window_up(visit: Open) -> None:
    page = visit()
    spent = page.evaluate(
        """async (text) => {
          const { Markdown } = await import("./page/markdown.js");
          const root = document.getElementById("thread"), markdown = new Markdown(root), costs = [];
          for (let end = 500; end < text.length; end += 500) {
            const begun = performance.now();
            markdown.update(text.slice(0, end));
            root.getBoundingClientRect();
            costs.push(performance.now() - begun);
          }
          return costs.sort((a, b) => a - b)[Math.floor(costs.length * 0.9)];
        }""",
        (RICH * 1000)[:100_000],
    )
    assert spent < 50


def test_colours_follow_the_system_until_chosen_and_can_be_read(visit: Open) -> None:
    shade = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/))"
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        assert (page.evaluate(shade) > 128) == (scheme == "light")
        ask(page, "rich")
        assert page.evaluate(CONTRAST) == []
        page.get_by_role("button", name="Settings").click()
        assert page.evaluate(CONTRAST) == []
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Theme: as the system").click()
        assert page.evaluate(shade) > 128
        page.get_by_role("button", name="Theme: light").click()
        page.reload()
        assert page.evaluate(shade) < 128


def test_everything_can_be_done_from_the_keyboard(visit: Open) -> None:
    page = visit()
    focused = "document.activeElement.id || document.activeElement.ariaLabel"
    assert page.evaluate(focused) == "prompt"
    page.keyboard.type("for ever")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_label("off", exact=True)).to_be_checked()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "send"
    page.keyboard.press("Enter")
    expect(page.locator(".md")).to_contain_text("aaa")
    page.keyboard.press("Escape")
    expect(last(page).locator(".foot")).to_contain_text("stopped")
    page.focus("#prompt")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == "Edit message"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "Edit"
    page.keyboard.press("Control+k")
    assert page.evaluate(focused) == "search"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "Title"
    page.keyboard.type("renamed")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("renamed")
    page.keyboard.press("Alt+n")
    expect(page.locator("#welcome")).to_be_visible()
    assert page.evaluate(focused) == "prompt"


def test_a_telephone_shows_all_of_it_without_scrolling_sideways(visit: Open) -> None:
    page = visit(**PHONE)
    page.route("**/status", lambda route: route.fulfill(json=STATUS))
    assert wide(page) == 360
    page.fill("#prompt", "rich " + "x" * 200)
    page.press("#prompt", "Enter")  # starts a line here
    page.get_by_role("button", name="Send").click()
    last(page)
    assert wide(page) == 360
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator("#talks a")).to_be_in_viewport()
    assert page.evaluate("document.getElementById('page').inert")
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    assert wide(page) == 360
    expect(page.get_by_role("button", name="Save")).to_be_in_viewport()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("link", name="Status").click()
    expect(page.locator(".tile")).to_have_count(4)
    expect(page.locator("#side")).to_be_hidden()
    assert wide(page) == 360


def test_a_narrow_window_with_a_mouse_keeps_no_room_for_hidden_buttons(visit: Open) -> None:
    page = visit(viewport={"width": 420, "height": 740})
    ask(page, "plain " + "words " * 60)
    said, text = page.locator(".said").bounding_box(), page.locator(".answer .md").bounding_box()
    assert text["y"] - said["y"] - said["height"] < 40
    page.locator(".user").hover()
    buttons = page.locator(".user .actions").bounding_box()
    assert said["y"] + said["height"] <= buttons["y"] and buttons["y"] + buttons["height"] <= text["y"]
    page.locator(".user").get_by_role("button", name="Edit", exact=True).click()
    expect(page.get_by_label("Edit message")).to_be_focused()


def test_every_control_has_a_name_and_every_id_is_one(visit: Open) -> None:
    page = visit()
    page.set_input_files("#picker", {"name": "deep.txt", "mimeType": "", "buffer": b"deep"})
    ask(page, "rich")
    ask(page, "rain?")
    assert nameless(page) == []
    page.get_by_role("button", name="Settings").click()
    assert nameless(page) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((el) => el.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("[document.documentElement.lang, document.querySelectorAll('h1').length]") == ["en", 1]
    assert page.evaluate("document.querySelectorAll('[aria-live]').length") == 1


def test_the_status_is_drawn_and_lives_without_parts_of_it(visit: Open) -> None:
    page = visit()
    told = [STATUS, {}]
    page.route("**/status", lambda route: route.fulfill(json=told[0]))
    page.get_by_role("link", name="Status").click()
    tiles = page.locator(".tile")
    expect(tiles).to_have_count(4)
    expect(tiles.nth(0)).to_contain_text("3 running2 requests waiting · room for 8")
    expect(tiles.nth(1)).to_contain_text("41.5 tokens/s writtenreading 900 tokens/s · 50 % of drafts kept")
    expect(tiles.nth(2)).to_contain_text("$0.2500 today$3.50 in all · prices: list")
    expect(tiles.nth(3)).to_contain_text("90 % of prompt tokens found1.0 GiB of 4.0 GiB in use")
    expect(tiles.nth(3)).to_contain_text("first seen")
    expect(page.locator("#status-facts")).to_have_text("scripted · Hadal 1.2.3 · up for 1 h 1 min")
    pictures = page.get_by_role("img", name=re.compile("15 minutes|Spend"))
    expect(pictures).to_have_count(4)
    assert nameless(page) == []
    del told[0]
    expect(tiles.nth(1)).to_contain_text("Nothing to draw yet", timeout=5000)
    page.get_by_role("link", name="Hadal").click()
    expect(page.locator("#chat")).to_be_visible()


def test_the_servers_own_status_is_drawn(visit: Open) -> None:
    page = visit("/#status")
    expect(page.locator(".tile").first).to_contain_text("0 running")
    assert not page.locator("#status-error").is_visible()


@pytest.mark.parametrize("where", ["headers", "stream"])
def test_events_are_read_wherever_they_are_cut(visit: Open, where: str) -> None:
    page = visit()
    ending = "\r\n" if where == "headers" else "\n"
    events = ending.join([": keep-alive", "", 'data: {"a":', 'data: "Grüße 👋"}', "", "data:[DONE]", "", ""])
    read = page.evaluate(
        """async (text) => {
          const { events } = await import("./page/api.js");
          const bytes = new TextEncoder().encode(text), out = new Set();
          for (let cut = 1; cut < bytes.length; cut++) {
            const parts = [bytes.slice(0, cut), bytes.slice(cut)];
            const stream = new ReadableStream({ pull: (c) => (parts.length ? c.enqueue(parts.shift()) : c.close()) });
            const got = [];
            for await (const data of events(stream)) got.push(data);
            out.add(JSON.stringify(got));
          }
          return [...out];
        }""",
        events,
    )
    assert [json.loads(each) for each in read] == [['{"a":\n"Grüße 👋"}', "[DONE]"]]
