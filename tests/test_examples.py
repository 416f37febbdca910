"""Each example runs against the embedded model from beginning to end and prints what it promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from hadal.llm import LLM
from tests.server.conftest import running

ROOT = Path(__file__).parent.parent
# Its arguments, the library it needs, and what it must print.
EXAMPLES: dict[str, tuple[list[str], str, list[str]]] = {
    "openai_sdk.py": (
        [],
        "openai",
        [r"\[\d+ tokens in, \d+ out\]", r"(call: temperature|without a call)", r"form: \{"],
    ),
    "anthropic_sdk.py": ([], "anthropic", [r"tokens out", r"(call: find_order \{'number'|without a call)"]),
    "responses.py": ([], "openai", [r"\[response\.\w+\]", r"(cached: \d+ of \d+|without a call)"]),
    "langchain_tools.py": ([], "langchain_openai", [r"mood: (glad|sad|angry)", r"call: \{'article'.* of "]),
    "rag.py": (
        ["docs", "How are keys made?", "What does a drain do?"],
        "openai",
        [r"How are keys made\?", r"sources: ", r"cached: [1-9]\d+ of"],
    ),
    "summarise.py": (
        ["corpus/README.md", "What is it?"],
        "openai",
        [r"corpus/README.md: \d+ tokens", r"cached: [1-9]"],
    ),
    "code_question.py": (
        ["hadal/text", "What is it?", "And who?"],
        "openai",
        [r"[1-9]\d* of \d+ files", r"cached: \d+"],
    ),
    "support_bot.py": ([], "openai", [r"customer: Thank you!\n", r'(find_order \{"number": "A\d{4}"\}|bot: )']),
    "legal_review.py": ([], "openai", [r"clause 4: (low|medium|high)", r"4 clauses: [1-9]\d+ of \d+ tokens"]),
    "agent_sessions.py": (["3", "2"], "openai", [r"request 4: ", r"3 agents, 2 turns: [1-9]"]),
    "batch.py": ([], "openai", [r"completed", r"(good|bad|neither)\s+My cat likes it\."]),
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(LLM("nano")) as server:
        yield server.url


def run(url: str, command: list[str]) -> str:
    settings = {"HADAL_URL": url, "BUDGET": "3000", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_example_is_tried_here_and_told_in_the_readme() -> None:
    there = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")}
    assert there == {*EXAMPLES, "curl.sh"}
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert {name for name in there if f"| {name} |" not in readme} == set()


@pytest.mark.parametrize("name", [*EXAMPLES])
def test_an_example_runs_to_its_end(url: str, name: str) -> None:
    arguments, library, expected = EXAMPLES[name]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    told = run(url, [sys.executable, f"examples/{name}", *arguments])
    assert [pattern for pattern in expected if not re.search(pattern, told)] == [], told[-2000:]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_chats_fills_a_gap_and_fetches_a_batch(url: str) -> None:
    told = run(url, ["sh", "examples/curl.sh"])
    for pattern in (r'"chat\.completion"', r"data: \[DONE\]", r'"text_completion"', r'"type":"message"', r'"sum-3"'):
        assert re.search(pattern, told), told[-2000:]
