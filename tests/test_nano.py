"""The embedded model as it is shipped: small enough, and it answers through every door."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import openai
import pytest

from hadal.engine import SamplingParams
from hadal.llm import LLM
from tests.server.conftest import running

FOLDER = Path(str(importlib.resources.files("hadal").joinpath("assets", "nano")))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="this installation has no embedded model")
QUESTION: Any = [{"role": "user", "content": "Tell me a short story about a fish."}]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM("nano", device="cpu")


def test_the_model_file_stays_small() -> None:
    (file,) = FOLDER.glob("*.safetensors")
    assert 0 < file.stat().st_size <= 12 * 10**6


@pytest.mark.parametrize("thinking", [True, False])
def test_it_answers_a_chat(nano: LLM, thinking: bool) -> None:
    (made,) = nano.chat(QUESTION, GREEDY, thinking=thinking)[0].outputs
    assert made.finish_reason in ("stop", "length") and made.error is None
    assert (made.text + (made.reasoning or "")).strip()


def test_it_answers_over_http_as_it_does_in_the_library(nano: LLM) -> None:
    (made,) = nano.chat(QUESTION, GREEDY)[0].outputs
    with running(nano) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=60) as client:
        chunks = list(
            client.chat.completions.create(
                model="nano", messages=QUESTION, temperature=0, max_tokens=GREEDY.max_tokens, stream=True
            )
        )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == made.text
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == (made.reasoning or "")
    assert chunks[-1].choices[0].finish_reason == made.finish_reason


def test_its_neighbours_do_not_change_an_answer(nano: LLM) -> None:
    prompts = ["Once upon a time", "The sea is deep and " * 12, "def"]
    together = [output.outputs[0].token_ids for output in nano.generate(prompts, GREEDY)]
    assert together == [nano.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    assert len(together[0]) > 1
