"""Drafters of plain models: what they draft, what they remember, and that speculation never changes a token."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hadal.model import Model, Numerics
from hadal.model.drafter import LEAST_SURVIVAL, DraftSpan
from hadal.model.spans import Batch
from tests.model.test_model import CONFIG, build, random_ids

DSPARK = CONFIG.replace(
    compress_ratios=(0, 4, 16, 4, 8, 0, 0, 0), dspark_block_size=4, dspark_noise_token_id=96,
    dspark_target_layer_ids=(1, 2, 4), dspark_markov_rank=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def mtp() -> Model:
    return build(CONFIG)


@pytest.fixture(scope="module")
def dspark() -> Model:
    return build(DSPARK)


@pytest.fixture(scope="module", params=["mtp", "dspark"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def likeliest(logits: Tensor) -> list[int]:
    found: list[int] = logits.argmax(-1).tolist()
    return found


class Recorder:
    """Chooses the likeliest tokens and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, list[int], int]] = []

    def __call__(self, logits: Tensor, spans: list[int], ahead: int) -> list[int]:
        self.calls.append((logits.clone(), spans, ahead))
        return likeliest(logits)


def feed(model: Model, state: Any, ids: Sequence[int], window: int, depth: int, choose: Callable[..., Any]) -> Any:
    """Advance by all but the last of some tokens and draft after the last one."""
    model.advance(list(ids[:-1]), [len(ids) - 1], [state], [0])
    assert model.drafter is not None
    return model.drafter.draft([DraftSpan(0, len(ids) - 1, list(ids[1:])[-window:], depth)], choose)[0]


def speculate(model: Model, prompts: list[list[int]], count: int, guess: Callable[[int, int, int], int | None]) -> Any:
    """Continue prompts greedily, two or more sequences at a time, with drafts which `guess` may replace.

    `guess(sequence, index, token)` is given the drafted token. Returns the tokens and how many drafts stood.
    """
    drafter, window = model.drafter, model.config.sliding_window
    assert drafter is not None
    states = [model.new_state() for _ in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    drafts: list[list[int]] = [[] for _ in prompts]
    todo = [list(p) for p in prompts]
    stood = 0
    while any(len(tokens) < count for tokens in out):
        going = [i for i in range(len(prompts)) if len(out[i]) < count]
        rows = [todo[i] + drafts[i] for i in going]
        wanted = [len(drafts[i]) + 1 for i in going]
        logits = model.advance([t for r in rows for t in r], [len(r) for r in rows], [states[i] for i in going], wanted)
        spans = []
        for s, (i, part) in enumerate(zip(going, logits.split(wanted), strict=True)):
            own = likeliest(part)
            kept = 0
            while kept < len(drafts[i]) and drafts[i][kept] == own[kept]:
                kept += 1
            states[i].rewind(len(drafts[i]) - kept)
            stood += kept
            tokens = todo[i] + own[: kept + 1]
            out[i] += own[: kept + 1]
            todo[i] = own[kept : kept + 1]
            spans.append(DraftSpan(s, len(tokens) - 1, tokens[1:][-window:], (len(out[i]) + i) % (drafter.most + 1)))

        def choose(logits: Tensor, which: list[int], ahead: int, going: list[int] = going) -> list[int]:
            tokens = likeliest(logits)
            guesses = [guess(going[s], len(out[going[s]]) + ahead, t) for s, t in zip(which, tokens, strict=True)]
            return [t if g is None else g for g, t in zip(guesses, tokens, strict=True)]

        for i, found in zip(going, drafter.draft(spans, choose), strict=True):
            drafts[i] = found
    return [tokens[:count] for tokens in out], stood


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    state, ids, out = model.new_state(), prompt, []
    for _ in range(count):
        out += likeliest(model.logits_ragged(ids, [len(ids)], [state]))
        ids = out[-1:]
    return out


def check_speculation(model: Model, prompts: list[list[int]], count: int, seed: int) -> None:
    """Drafts of the head, right ones and wrong ones in any order leave every token as it is."""
    print(f"seed {seed}")
    wanted = [greedy(model, prompt, count + 10) for prompt in prompts]
    dice = random.Random(seed)

    def guess(sequence: int, index: int, token: int) -> int | None:
        right = wanted[sequence][index] if index < count + 10 else token
        return dice.choice([None, right, right, right, right, (right + 1) % model.config.vocab_size])

    found, stood = speculate(model, prompts, count, guess)
    assert found == [tokens[:count] for tokens in wanted]
    assert stood > count // 4


def test_speculation_leaves_every_token_as_it_is(model: Model) -> None:
    check_speculation(model, [random_ids(1, 30).tolist(), random_ids(2, 5).tolist()], 30, seed=1)


def test_an_mtp_draft_follows_its_own_streams_and_choices(mtp: Model) -> None:
    ids = random_ids(4, 40).tolist()
    recorder = Recorder()
    drafts = feed(mtp, mtp.new_state(), ids, 39, 3, recorder)
    x, _ = mtp.streams(ids[:-1], [39], [mtp.new_state()])
    following = ids[1:]
    for ahead, (logits, spans, given) in enumerate(recorder.calls):
        # As one document: the main streams, then those that the block put out itself.
        with torch.no_grad():
            out = mtp.mtp_streams(x, following, Batch.from_documents([0, len(x)], mtp.device))
        torch.testing.assert_close(logits, mtp.mtp_head(out[-1:]), atol=5e-5, rtol=1e-4)
        assert (spans, given) == ([0], ahead) and drafts[ahead] == likeliest(logits)[0]
        x, following = torch.cat((x, out[-1:])), [*following, drafts[ahead]]
    assert len(drafts) == len(recorder.calls) == 3


@pytest.mark.parametrize("window", [16, 60])
def test_the_window_is_all_that_a_draft_head_must_be_given(
    model: Model, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was drafted before, and whether more than the window was remembered or not."""
    monkeypatch.setattr("hadal.model.drafter.LEAST_SURVIVAL", 0.0)
    ids = random_ids(5, 70).tolist()
    often, once = model.new_state(), model.new_state()
    recorders = [Recorder(), Recorder()]
    for begin in range(0, 60, 20):
        feed(model, often, ids[begin : begin + 21], window, 2, Recorder())
    for i in range(60, 69):
        found = feed(model, often, ids[i : i + 2], window, 3, recorders[0] if i == 68 else Recorder())
    assert found == feed(model, once, ids, 60, 3, recorders[1]) and len(found) == 3
    for a, b in zip(recorders[0].calls, recorders[1].calls, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=5e-5, rtol=1e-4)


def test_a_dspark_draft_is_its_block_and_the_markov_chain(dspark: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hadal.model.drafter.LEAST_SURVIVAL", 0.0)
    ids, stage = random_ids(6, 50).tolist(), dspark.dspark_stages[-1]
    recorder = Recorder()
    drafts = feed(dspark, dspark.new_state(), ids, 16, 4, recorder)
    state = dspark.new_state()
    _, taps = dspark.streams(ids[:-1], [49], [state])
    assert taps is not None
    dspark.dspark_remember(taps, [49], [state])
    hidden, base = dspark.dspark_block(ids[-1], state)
    tokens, chances = [ids[-1]], []
    with torch.no_grad():
        for i in range(4):
            chances.append(float(stage.confidence_logit(hidden[i], torch.tensor(tokens[-1])).sigmoid()))
            logits = base[i] + stage.markov_bias(torch.tensor(tokens[-1]))
            torch.testing.assert_close(recorder.calls[i][0][0], logits, atol=5e-5, rtol=1e-4)
            tokens.append(int(logits.argmax()))
    assert drafts == tokens[1:]
    # Cut where all of it is likelier to fail than to stand.
    survival, length = 1.0, 0
    for chance in chances:
        survival *= chance
        if survival < 0.3:
            break
        length += 1
    monkeypatch.setattr("hadal.model.drafter.LEAST_SURVIVAL", 0.3)
    assert 0.3 < LEAST_SURVIVAL < 1
    assert feed(dspark, dspark.new_state(), ids, 16, 4, Recorder()) == tokens[1 : 1 + length]


def test_drafts_of_several_sequences_are_those_of_each_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hadal.model.drafter.LEAST_SURVIVAL", 0.0)
    prompts = [random_ids(seed, 20 + 7 * seed).tolist() for seed in range(3)]
    depths = [2, 0, 3]
    alone = [feed(model, model.new_state(), p, 16, n, Recorder()) for p, n in zip(prompts, depths, strict=True)]
    lengths = [len(p) - 1 for p in prompts]
    states = [model.new_state() for _ in prompts]
    model.advance([t for p in prompts for t in p[:-1]], lengths, states, [1, 0, 2])
    recorder = Recorder()
    spans = [DraftSpan(i, lengths[i], prompts[i][-16:], depths[i]) for i in (2, 0, 1)]
    assert model.drafter is not None
    assert model.drafter.draft(spans, recorder) == [alone[2], alone[0], alone[1]]
    assert [(spans, ahead) for _, spans, ahead in recorder.calls] == [([2, 0], 0), ([2, 0], 1), ([2], 2)]


def test_wanted_rows_are_the_last_of_each_sequence(mtp: Model) -> None:
    a, b, c = random_ids(7, 9).tolist(), random_ids(8, 4).tolist(), random_ids(9, 6).tolist()
    states = [mtp.new_state() for _ in range(3)]
    logits = mtp.advance(a + b + c, [9, 4, 6], states, [2, 0, 6])
    whole = torch.cat([mtp.logits(a)[-2:], mtp.logits(c)])
    torch.testing.assert_close(logits, whole, atol=5e-5, rtol=1e-4)
    assert [s.position for s in states] == [9, 4, 6]


def test_what_a_drafter_needs_keeps_no_sequence_alive(mtp: Model) -> None:
    state = mtp.new_state()
    before = mtp.pool.live
    mtp.advance(random_ids(3, 20).tolist(), [20], [state], [1])
    assert mtp.pool.live == before + 1
    del state
    gc.collect()
    assert mtp.pool.live == before


def test_a_model_without_a_draft_head_has_no_drafter() -> None:
    model = Model(CONFIG.without_draft(), Numerics())
    model.init_weights(torch.Generator().manual_seed(1))
    assert model.drafter is None and model.advance([1, 2, 3], [3], [model.new_state()], [1]).shape == (1, 97)
