"""The engine with the embedded model: many lengths at once, faults of one request, and what a restart leaves."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hadal.checkpoint import load_model, locate_model
from hadal.engine import Engine, Request, RequestError, SamplingParams
from hadal.model import Model


@pytest.fixture(scope="module")
def nano() -> Model:
    return load_model("nano", device="cpu")


def ids(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 7000) for _ in range(count)]


def answer(engine: Engine, *prompts: list[int], **given: object) -> list[Request]:
    params = SamplingParams(**({"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "logprobs": 1} | given))  # type: ignore[arg-type]
    made = [engine.prepare(prompt, params) for prompt in prompts]
    for request in made:
        engine.submit(request)
    while engine.busy:
        engine.step()
    return made


def said(request: Request) -> tuple[list[int], object]:
    return request.output_ids, request.logprobs


def test_sixty_four_requests_of_all_lengths_answer_as_each_alone(nano: Model) -> None:
    rng = random.Random(5)
    lengths = [1, 2, 127, 128, 129, 8000, *(int(8000 ** rng.random()) for _ in range(58))]
    prompts = [ids(i, n) for i, n in enumerate(lengths)]
    pages = nano.pool.live
    engine = Engine(nano, max_concurrent=64)
    together = answer(engine, *prompts)
    assert [r.finish_reason for r in together] == ["length"] * 64
    assert engine.check() == []
    for prompt, request in zip(prompts, together, strict=True):
        (alone,) = answer(Engine(nano, prefix_cache=False, speculation=0), prompt)
        assert said(alone) == said(request)
    engine.close()
    assert nano.pool.live == pages
    assert nano.pool.held_bytes <= (2 << 20) + pages * nano.pool.page_bytes


def poisoned(folder: Path, token: int) -> Model:
    """The embedded model with an embedding of NaN for one token."""
    shutil.copytree(locate_model("nano"), folder)
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        size = int.from_bytes(content[:8], "little")
        place = json.loads(content[8 : 8 + size]).get("embed.weight")
        if place is not None:
            row = 8 + size + place["data_offsets"][0] + token * place["shape"][1] * 2
            content[row : row + 2] = b"\xc0\x7f"
            file.write_bytes(content)
    return load_model(folder, device="cpu")


def test_a_row_of_nan_fails_its_request_and_changes_no_neighbour(tmp_path: Path) -> None:
    poison = 6999
    model = poisoned(tmp_path / "model", poison)
    prompts = [ids(i, 50 + 40 * i) for i in range(4)]
    assert all(poison not in prompt for prompt in prompts)
    expected = [said(r) for r in answer(Engine(model, prefix_cache=False), *prompts)]
    engine = Engine(model)
    for _ in range(2):  # what the first round leaves in shared memory must not reach the second
        bad, *others = answer(engine, [*ids(9, 30), poison, *ids(10, 30)], *prompts)
        assert bad.finish_reason == "error" and "not finite" in (bad.error or "")
        assert [said(r) for r in others] == expected
        engine.store.clear()  # type: ignore[union-attr]
    *others, bad = answer(engine, *prompts, [*ids(9, 30), poison, *ids(10, 30)])
    assert bad.finish_reason == "error" and "not finite" in (bad.error or "")
    assert [said(r) for r in others] == expected
    assert engine.check() == []
    (again,) = answer(engine, [*ids(9, 30), 5])
    assert again.error is None


@pytest.mark.parametrize(
    ("prompt", "words"), [([], "empty"), ([7168], "outside the vocabulary"), ([-1], "outside the vocabulary")]
)
def test_prompts_that_cannot_be_are_refused(nano: Model, prompt: list[int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Engine(nano).prepare(prompt, SamplingParams())


def test_a_prompt_that_can_never_fit_is_refused_with_the_sizes(nano: Model) -> None:
    engine = Engine(nano, cache_memory=8 << 20, max_concurrent=2)
    with pytest.raises(RequestError, match=r"memory holds [\d,]+ .*bytes per token.*cache_memory"):
        engine.prepare([5] * (engine.plan.tokens + 1), SamplingParams())
    with pytest.raises(RequestError, match="too little"):
        Engine(nano, cache_memory=1 << 20, max_concurrent=50)
    request = engine.prepare([5] * 100, SamplingParams(max_tokens=None))
    assert request.limit == engine.plan.tokens - 100


def test_a_conversation_finds_its_last_turn(nano: Model, tmp_path: Path) -> None:
    first = ids(1, 900)
    engine = Engine(nano, prefix_folder=tmp_path)
    (turn,) = answer(engine, first)
    (next_turn,) = answer(engine, turn.token_ids + ids(2, 30))
    assert (next_turn.cache_reason, next_turn.cached_tokens) == ("hit", len(turn.token_ids) - 1)
    engine.close()
    restarted = Engine(nano, prefix_folder=tmp_path)
    (third,) = answer(restarted, next_turn.token_ids + ids(3, 30))
    assert (third.cache_reason, third.cached_tokens) == ("hit", len(next_turn.token_ids) - 1)
    (cold,) = answer(Engine(nano, prefix_cache=False), list(third.prompt_ids))
    assert said(third) == said(cold)
    restarted.close()


KILLED = """
import sys
from tests.engine.test_on_nano import answer, ids, Engine, load_model
import os
write = os.fsync
def slowly(file):
    print("storing", flush=True)
    import time
    time.sleep(60)
os.fsync = slowly
engine = Engine(load_model("nano", device="cpu"), prefix_folder=sys.argv[1])
os.fsync = write
answer(engine, ids(1, 700))
engine.store.flush()
print("stored", flush=True)
os.fsync = slowly
answer(engine, ids(2, 700))
engine.store.flush()
"""


def test_killed_while_it_stores_a_prefix_it_serves_on_and_names_the_torn_one(nano: Model, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stored\n"
    assert process.stdout.readline() == "storing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    engine = Engine(nano, prefix_folder=tmp_path)
    assert engine.store is not None and engine.store.stats()["disk_torn"] == 1
    whole, torn = answer(engine, ids(1, 700)), answer(engine, ids(2, 700))
    assert whole[0].cache_reason == "hit" and torn[0].cache_reason != "hit"
    for request in (*whole, *torn):
        (cold,) = answer(Engine(nano, prefix_cache=False), list(request.prompt_ids))
        assert said(request) == said(cold)
    engine.close()


def test_a_flipped_bit_is_caught_and_counted_and_the_answer_is_the_cold_one(nano: Model, tmp_path: Path) -> None:
    prompt = ids(4, 800)
    engine = Engine(nano, prefix_folder=tmp_path)
    (cold,) = answer(engine, prompt)
    engine.close()
    for file in tmp_path.glob("*.prefix"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    engine = Engine(nano, prefix_folder=tmp_path)
    (request,) = answer(engine, prompt)
    assert request.cache_reason == "corrupt" and said(request) == said(cold)
    assert engine.store is not None and engine.store.stats()["disk_corrupt"] >= 1
    engine.close()
