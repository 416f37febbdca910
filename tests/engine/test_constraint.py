from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.engine import Engine, Request, SamplingParams
from hadal.engine.constraint import ConstraintError, forbid
from tests.engine.fake_model import FakeDrafter, FakeModel
from tests.engine.test_engine import run

VOCABULARY, EOS = 50, 1


def packed(ids: Sequence[int], size: int = VOCABULARY) -> np.ndarray:
    bits = np.zeros(size, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little")


class Hashed:
    """Allows a third of the ids, by a checksum of the answer so far; all of them where that leaves none."""

    def __init__(self, dead_end: int = 1000) -> None:
        self.dead_end = dead_end  # answers of that length cannot go on
        self.known: list[int] = []

    def copy(self) -> Hashed:
        return Hashed(self.dead_end)

    def ids(self, outputs: Sequence[int]) -> list[int]:
        return [i for i in range(VOCABULARY) if zlib.crc32(repr((*outputs, i)).encode()) % 3 == 0]

    def allowed(self, output_ids: Sequence[int], drafts: Sequence[int]) -> int:
        for n, draft in enumerate(drafts):
            ids = self.ids([*output_ids, *drafts[:n]])
            if draft == EOS or (ids and draft not in ids):
                return n
        return len(drafts)

    def masks(self, output_ids: Sequence[int], drafts: Sequence[int]) -> list[np.ndarray | None]:
        assert list(output_ids[: len(self.known)]) == self.known, "the output only grows"
        assert self.allowed(output_ids, drafts) == len(drafts), "what is forbidden is not computed"
        self.known = list(output_ids)
        if len(output_ids) >= self.dead_end:
            raise ConstraintError("there is no way on")
        found = [self.ids([*output_ids, *drafts[:n]]) for n in range(len(drafts) + 1)]
        return [packed(ids) if ids else None for ids in found]


def expected(model: FakeModel, prompt: list[int], count: int) -> list[int]:
    """What greedy decoding under `Hashed` must give, found without the engine."""
    made: list[int] = []
    while len(made) < count and made[-1:] != [EOS]:
        row = model.row(prompt + made).tolist()
        made.append(max(Hashed().ids(made) or range(VOCABULARY), key=row.__getitem__))
    return made


def add(engine: Engine, prompt: list[int], constraint: Hashed | None, count: int = 12, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=count, temperature=0.0)
    request = engine.prepare(prompt, params, constraint=constraint, priority=priority)
    engine.submit(request)
    return request


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_limits_hold_in_any_company_with_drafts_and_after_preemption(seed: int) -> None:
    rng = random.Random(seed)
    model = FakeModel(VOCABULARY, context=400)
    options = model.limit_pages(rng.choice([3, 5, 100]), rng.choice([1, 2, 4]))
    if rng.random() < 0.7:
        model.drafter = FakeDrafter(model, rng.randrange(1, 5), wrong_in=rng.randrange(1, 8))
    engine = Engine(model, token_budget=rng.choice([4, 20, 200]), prefix_cache=rng.random() < 0.5, **options)
    requests = []
    for _ in range(6):
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, 150))]
        constraint = Hashed() if rng.random() < 0.7 else None
        requests.append(add(engine, prompt, constraint, rng.randrange(1, 40), rng.randrange(2)))
        for _ in range(rng.randrange(4)):
            engine.step()
    run(engine)
    for r in requests:
        prompt = list(r.prompt_ids)
        made = model.greedy(prompt, r.limit) if r.constraint is None else expected(model, prompt, r.limit)
        assert r.output_ids == made, f"seed {seed}"
        assert r.finish_reason == ("stop" if made[-1] == EOS else "length") and r.error is None


def test_a_preempted_request_goes_on_within_its_limits() -> None:
    model = FakeModel(VOCABULARY, context=400)
    engine = Engine(model, prefix_cache=False, max_concurrent=1)
    first = add(engine, [5, 6], Hashed(), 40)
    for _ in range(4):
        engine.step()
    second = add(engine, [9], Hashed(), 40, priority=1)
    run(engine)
    assert engine.stats.preemptions == 1
    assert [r.output_ids for r in (first, second)] == [expected(model, p, 40) for p in ([5, 6], [9])]


def test_what_cannot_go_on_fails_alone() -> None:
    model = FakeModel(VOCABULARY)
    engine = Engine(model)
    stuck, free, held = add(engine, [7], Hashed(dead_end=3)), add(engine, [8], None), add(engine, [9], Hashed())
    run(engine)
    assert (stuck.finish_reason, stuck.error, stuck.stuck) == ("error", "there is no way on", True)
    assert stuck.output_ids == expected(model, [7], 3)
    assert free.output_ids == model.greedy([8], 12) and held.output_ids == expected(model, [9], 12)
    assert engine.check() == []


def test_log_probabilities_are_those_among_the_allowed_tokens() -> None:
    model = FakeModel(VOCABULARY)
    engine = Engine(model)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    request = engine.prepare([7], params, constraint=Hashed())
    engine.submit(request)
    run(engine)
    row, ids = model.row([7]), Hashed().ids([])
    scores = row[ids].log_softmax(0).tolist()
    assert request.logprobs[0].keys() == set(sorted(ids, key=lambda i: -float(row[i]))[:20])
    for i, score in zip(ids, scores, strict=True):
        assert math.isclose(request.logprobs[0][i].logprob, score, abs_tol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(0, 12), st.integers(0, 2**32))
def test_forbid_writes_minus_infinity_where_no_bit_is_set(width: int, padding: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(4, width + padding)).astype(np.float32))
    rows = [r for r in range(4) if rng.random() < 0.6] or [2]
    kept = {r: [i for i in range(width) if rng.random() < 0.5] for r in rows}
    found = logits.clone()
    forbid(found, [(r, packed(kept[r], width)) for r in rows])
    for r in range(4):
        for i in range(width):
            gone = r in kept and i not in kept[r]
            assert float(found[r, i]) == (-math.inf if gone else float(logits[r, i]))
