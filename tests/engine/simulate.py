"""Random lives of requests in an engine over a `FakeModel`, with few pages and slots, and what must come of them."""

from __future__ import annotations

import random
from pathlib import Path

from hadal.engine import Engine, Request, SamplingParams
from hadal.engine.sampler import Draw, Sampler
from tests.engine.fake_model import FakeDrafter, FakeModel

CONTEXT = 1100


class Life:
    """One random run: requests share prefixes, come, go, and are cut, preempted, drafted, found again and aborted."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng, self.folder = random.Random(seed), folder
        self.model = FakeModel(vocab_size=40, context=CONTEXT)
        if self.rng.random() < 0.7:
            self.model.drafter = FakeDrafter(self.model, most=self.rng.choice([1, 5]))
        self.requests: list[Request] = []
        self.stems = [[self.rng.randrange(2, 40) for _ in range(n)] for n in (20, 128, 300, 600)]
        self.preemptions = self.hits = 0
        self.engine = self.open()

    def open(self) -> Engine:
        rng = self.rng
        return Engine(
            self.model,
            token_budget=rng.choice([1, 5, 40, 300]),
            prefix_cache=rng.random() < 0.8,
            prefix_folder=rng.choice([self.folder, None]),
            snapshot_every=rng.choice([128, 256, 8192]),
            speculation=rng.choice([None, 0, 2]),
            **self.model.limit_pages(rng.choice([2, 4, 7, 100]), rng.choice([1, 2, 4, 8])),
        )

    def prompt(self) -> list[int]:
        rng = self.rng
        if self.requests and rng.random() < 0.4:  # the next turn of a conversation, or a part of one
            ids = list(rng.choice(self.requests).token_ids)
            ids = ids[: rng.randrange(1, len(ids) + 1)] if rng.random() < 0.5 else ids
        else:
            stem = rng.choice(self.stems)
            ids = stem[: rng.randrange(1, len(stem) + 1)]
        return ids + [rng.randrange(2, 40) for _ in range(rng.choice([0, 0, 1, 30]))]

    def submit(self) -> None:
        rng = self.rng
        params = SamplingParams(
            max_tokens=rng.choice([1, 3, 12, 60, 150]),
            temperature=rng.choice([0.0, 0.7]),
            seed=rng.randrange(100),
            logprobs=rng.choice([None, 2]),
            ignore_eos=rng.random() < 0.5,
        )
        about = {"priority": rng.choice([0, 0, 0, 1, -1]), "tenant": rng.choice(["", "", "else"])}
        prompt = self.prompt()[: min(CONTEXT, self.engine.plan.tokens) - 1]
        group = [self.engine.prepare(prompt, params, **about)]
        if rng.random() < 0.2:
            group.append(self.engine.prepare(prompt, params, stream=1, leader=group[0], **about))
        for request in group:
            self.engine.submit(request)
        self.requests += group

    def step(self) -> None:
        if self.engine.busy:
            self.engine.step()
            assert self.engine.check() == []

    def disturb(self) -> None:
        what = self.rng.choice(["abort", "shrink", "reopen", "nothing"])
        if what == "abort" and self.requests:
            self.engine.abort(self.rng.choice(self.requests))
        elif what == "shrink" and self.engine.store is not None:
            self.engine.store.shrink(self.rng.choice([1, 3, 1000]))
        elif what == "reopen" and not self.engine.busy:
            self.close()
            self.engine = self.open()

    def close(self) -> None:
        self.engine.close()
        assert self.model.pool.live == 0, "pages are left behind"
        self.preemptions += self.engine.stats.preemptions

    def run(self) -> None:
        for _ in range(self.rng.randrange(3, 12)):
            for _ in range(self.rng.choice([0, 1, 4])):
                self.submit()
            for _ in range(self.rng.choice([1, 5, 40])):
                self.step()
            self.disturb()
        work = sum(len(r.prompt_ids) + r.limit for r in self.requests)
        for _ in range(100 + 4 * work):
            if not self.engine.busy:
                break
            self.step()
        assert not self.engine.busy, "somebody starves"
        self.close()

    def verify(self) -> None:
        """Every token is what its request's own ids give, computed without engine, pages or drafts."""
        sampler = Sampler(self.model.config.vocab_size)
        for r in self.requests:
            assert r.error is None and r.state is None
            assert r.token_ids == [*r.prompt_ids, *r.output_ids]
            ended = r.output_ids[-1:] == [self.model.config.eos_token_id] and not r.params.ignore_eos
            assert r.finish_reason == "abort" or r.finish_reason == ("stop" if ended else "length")
            assert r.finish_reason != "length" or len(r.output_ids) == r.limit
            for n, token in enumerate(r.output_ids):
                row = self.model.row(r.token_ids[: len(r.prompt_ids) + n])
                draw = Draw(r.params, r.seed, r.stream, n, r.params.logprobs is not None)
                (choice,) = sampler.choose(row.unsqueeze(0), [draw])
                assert token == choice.token_id
                assert r.params.logprobs is None or r.logprobs[n] == choice.logprobs
                assert n == len(r.output_ids) - 1 or token != self.model.config.eos_token_id or r.params.ignore_eos
