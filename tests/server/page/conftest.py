"""A real Chromium before a real server around a scripted model: fixtures and steps for the tests of the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hadal.text.tokens import DSML
from tests.fakes import scripted_llm
from tests.server.conftest import running

RICH = """## Depths

Text with **strong**, *soft* and `code`, [a link](https://example.org/x), [no link](javascript:alert(1)).

1. one
2. two
   - inner

| Zone | Metres |
|:-----|-------:|
| abyss | 4000 |

> quoted

```python
def dive(n):  # a comment that is long enough to need more room than a telephone has to offer on one line
    return "deep"
```
"""
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script> [x](javascript:alert(3)) **<b>bold</b>**"
EVIL += "\n\n<svg onload=alert(4)>"
CITY = f'<{DSML}parameter name="city" string="true">Bergen</{DSML}parameter>\n'
CALLS = "".join(f'<{DSML}invoke name="{name}">\n{CITY}</{DSML}invoke>\n' for name in ("forecast", "tide"))
SCRIPT: dict[str, str | None] = {
    "greet": "because they met</think>Grüße, 世界 👋!",
    "plain": "</think>one. two. three.",
    "rich": "</think>" + RICH,
    "evil": "</think>" + EVIL,
    "rain?": f"I must look</think>Let me see.\n\n<{DSML}tool_calls>\n{CALLS}</{DSML}tool_calls>",
    "dry all day": "</think>No rain today.",
    "broken": None,
}
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        try:
            it = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield it
        it.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(scripted_llm(SCRIPT, context=8192, max_concurrent=4)) as server:
        yield server.url


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Open]:
    """Opens the page in a browser of its own; in the end nothing may have gone wrong in a script."""
    contexts, wrong = [], []

    def open_page(path: str = "/", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        context.set_default_timeout(8000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.sent = []
        page.on("request", lambda r: r.url.endswith("/chat/completions") and page.sent.append(r.post_data_json))
        page.goto(url + path)
        page.locator("#model option").first.wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def ask(page: Any, text: str, *, wait: bool = True) -> Any:
    """The newest answer, once it is complete."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    return last(page) if wait else page.locator(".answer").last


def last(page: Any) -> Any:
    page.locator(".answer .actions").last.wait_for()
    page.locator("#send").wait_for()
    return page.locator(".answer").last
