"""Real models under the engine: whatever happens to a request on its way, it says what a single forward says.

Requests share prefixes, are cut into chunks, verified in drafts, preempted, aborted, evicted, and found again in memory
and on disk, with repeated tokens that make index scores tie. Afterwards one forward over prompt and answer, on a fresh
state, must give each chosen token and each of its log-probabilities, bit by bit.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hadal.checkpoint import load_model
from hadal.engine import Engine, Request, SamplingParams
from hadal.engine.sampler import Draw, Sampler
from hadal.model import Model
from tests.kernels.cpu.models import write_tiny

MODES = {"fast": ("auto", False), "faithful": ("bfloat16", True)}
LONGEST = {"fast-nano": 1400, "fast-fp8": 700, "faithful-fp8": 200}  # tokens of a prompt; faithful mode takes its time
REQUESTS = 24  # of one story at most


@pytest.fixture(scope="module", params=["fast-nano", "fast-fp8", "faithful-fp8"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, int]:
    """A model and the longest prompt of its stories."""
    mode, kind = request.param.split("-")
    dtype, fake_quant = MODES[mode]
    path = "nano" if kind == "nano" else write_tiny(tmp_path_factory.mktemp("model") / kind, kind)
    return load_model(path, device="cpu", dtype=dtype, fake_quant=fake_quant), LONGEST[request.param]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Story:
    """One random run: requests come, go and are disturbed."""

    def __init__(self, model: Model, longest: int, seed: int, folder: Path) -> None:
        self.model, self.longest, self.rng, self.folder = model, longest, random.Random(seed), folder
        self.requests: list[Request] = []
        vocabulary = model.config.vocab_size
        self.stems = [[self.rng.randrange(2, vocabulary) for _ in range(n)] for n in (40, 300, 700)]
        self.stems.append([7] * 400)  # ties
        self.engine = self.open()

    def open(self) -> Engine:
        rng = self.rng
        plenty = 64 << 20
        homes = rng.choice([1, 2, 5])
        tight = homes * self.model.home_bytes + rng.choice([12, 20, 60]) * self.model.pool.page_bytes
        return Engine(
            self.model,
            max_concurrent=homes,
            token_budget=rng.choice([3, 17, 64, 300]),
            cache_memory=max(rng.choice([plenty, tight]), 1 << 20),
            prefix_folder=rng.choice([self.folder, None]),
            snapshot_every=rng.choice([128, 256, 8192]),
            speculation=rng.choice([None, 0, 1, 3]),
        )

    def prompt(self) -> list[int]:
        rng = self.rng
        if self.requests and rng.random() < 0.4:  # the next turn of a conversation, or the same again
            before = rng.choice(self.requests).token_ids
            ids = before[: rng.randrange(1, len(before) + 1)] if rng.random() < 0.5 else list(before)
        else:
            stem = rng.choice(self.stems)
            ids = stem[: rng.randrange(1, len(stem) + 1)]
        return ids + [rng.randrange(2, self.model.config.vocab_size) for _ in range(rng.choice([0, 0, 1, 5, 40]))]

    def submit(self) -> None:
        rng = self.rng
        prompt, n = self.prompt()[: self.longest], rng.choice([1, 1, 1, 2])
        params = SamplingParams(
            max_tokens=rng.choice([1, 4, 12, 24]),
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 40]),
            seed=rng.randrange(100),
            logprobs=3,
            ignore_eos=True,
        )
        options = {"priority": rng.choice([0, 0, 1]), "tenant": rng.choice(["", "", "else"])}
        if len(prompt) + 32 >= self.engine.plan.tokens:
            return
        first = self.engine.prepare(prompt, params, **options)
        group = [first] + [self.engine.prepare(prompt, params, stream=i, leader=first, **options) for i in range(1, n)]
        for request in group:
            self.engine.submit(request)
        self.requests += group

    def disturb(self) -> None:
        rng, engine = self.rng, self.engine
        what = rng.choice(["abort", "shrink", "threads", "reopen", "none", "none"])
        if what == "abort" and self.requests:
            engine.abort(rng.choice(self.requests))
        elif what == "shrink" and engine.store is not None:
            engine.store.shrink(rng.choice([1, 5, 1000]))
        elif what == "threads":
            torch.set_num_threads(rng.choice([1, 2]))
        elif what == "reopen" and not engine.busy:
            engine.close()
            self.engine = self.open()

    def run(self) -> None:
        for _ in range(self.rng.randrange(4, 14)):
            for _ in range(self.rng.choice([0, 1, 3])):
                if len(self.requests) < REQUESTS:
                    self.submit()
            for _ in range(self.rng.choice([1, 4, 30])):
                if self.engine.busy:
                    self.engine.step()
                    assert self.engine.check() == []
            self.disturb()
        for _ in range(20_000):
            if not self.engine.busy:
                break
            self.engine.step()
        assert not self.engine.busy and self.engine.check() == []

    def verify(self) -> None:
        sampler = Sampler(self.model.config.vocab_size)
        for r in self.requests:
            assert r.error is None
            assert r.finish_reason == "abort" or len(r.output_ids) == r.limit
            if not r.output_ids:
                continue
            first = len(r.prompt_ids) - 1
            rows = self.model.logits(r.token_ids[:-1])[first:]
            draws = [Draw(r.params, r.seed, r.stream, i, True) for i in range(len(rows))]
            alone = [sampler.choose(row.unsqueeze(0), [draw])[0] for row, draw in zip(rows, draws, strict=True)]
            assert r.output_ids == [choice.token_id for choice in alone]
            assert r.logprobs == [choice.logprobs for choice in alone]
            if r.params.temperature == 0:
                assert r.output_ids == rows.argmax(-1).tolist()


def play(model: Model, longest: int, seed: int, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pages = model.pool.live
    story = Story(model, longest, seed, folder)
    try:
        story.run()
    finally:
        story.engine.close()
    story.verify()
    assert model.pool.live == pages, "pages are left behind"


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_on_its_way_a_request_says_what_one_forward_says(
    told: tuple[Model, int], tmp_path: Path, seed: int
) -> None:
    play(*told, seed, tmp_path / "prefixes")


@pytest.mark.slow
def test_half_an_hour_of_stories(told: tuple[Model, int], tmp_path: Path) -> None:
    minutes = float(os.environ.get("HADAL_STORY_MINUTES", "10"))  # of each of the three models
    end, seed = time.monotonic() + 60 * minutes, random.SystemRandom().randrange(2**32)
    while time.monotonic() < end:
        seed += 1
        print(f"seed {seed}")
        play(*told, seed, tmp_path / "prefixes")
