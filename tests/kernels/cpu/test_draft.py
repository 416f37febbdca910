"""Draft heads on the emitted kernels: their own kernels, the MTP block's error and bits, and speculation."""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.checkpoint import load_model, locate_model, source_of
from hadal.kernels.cpu import draft
from hadal.kernels.cpu.layout import STEP
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.reference.dense import rms_norm
from hadal.model import Model
from hadal.model.drafter import DraftSpan
from hadal.text import Tokenizer
from tests.kernels.cpu.harness import Kernels, Step, address, instruction_sets, shapes
from tests.kernels.cpu.models import model_on, same_bits, tokens, write_tiny
from tests.model.test_drafter import Recorder, check_speculation, feed

ISAS = pytest.mark.parametrize("isa", instruction_sets())
SIZES = shapes(hidden=160)
BEST, *OTHERS = instruction_sets()


@functools.cache
def compiled(isa: str) -> Kernels:
    def emit(module: KernelModule) -> None:
        draft.emit_tap(module, SIZES)
        draft.emit_draft(module, SIZES)

    return Kernels(isa, emit)


def random(*shape: int, seed: int = 31) -> Tensor:
    print(f"seed {seed}")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@ISAS
def test_inputs_of_the_block_are_normed_and_joined(isa: str) -> None:
    d, n, rows = SIZES.hidden, SIZES.streams, 5
    sources, ids = np.array([6, 0, 3, 3, 1]), np.array([4, 19, 0, 4, 7])
    streams, table = 3 * random(7, n * d), random(20, d, seed=32).bfloat16()
    hnorm, enorm = random(d, seed=33), random(d, seed=34)
    normed, embedded = torch.zeros(rows * n + 1, d + 32).bfloat16(), torch.zeros(rows + 1, d + 32).bfloat16()
    step = Step([], [])
    for name, word in dict(rows=rows, sources=address(sources), ids=address(ids)).items():
        step.words[STEP.index(name)] = word
    compiled(isa).run(
        "draft_inputs", step.words, 2, streams=address(streams), stream_stride=n * d * 4, hnorm=address(hnorm),
        out=address(normed), out_stride=2 * (d + 32), table=address(table), enorm=address(enorm),
        embedded=address(embedded), embedded_stride=2 * (d + 32),
    )  # fmt: skip
    chosen = rms_norm(streams.view(7, n, d)[sources], hnorm, SIZES.norm_eps).view(-1, d)
    torch.testing.assert_close(normed[:-1, :d].float(), chosen, rtol=2**-8, atol=1e-6)
    token = rms_norm(table.float()[ids], enorm, SIZES.norm_eps)
    torch.testing.assert_close(embedded[:-1, :d].float(), token, rtol=2**-8, atol=1e-6)
    assert not normed[-1].any() and not embedded[-1].any()

    values, embedding = random(rows * n, d, seed=35), random(rows, d, seed=36)
    compiled(isa).run(
        "draft_join", step.words, 3, streams=address(streams), stream_stride=n * d * 4, values=address(values),
        value_stride=4 * d, embedded=address(embedding), embedded_stride=4 * d,
    )  # fmt: skip
    assert torch.equal(streams[:rows].view(rows, n, d), values.view(rows, n, d) + embedding[:, None])


@ISAS
def test_a_tap_is_the_mean_of_the_streams(isa: str) -> None:
    streams, out = random(6, SIZES.streams, SIZES.hidden), torch.zeros(6, 2 * SIZES.hidden)
    step = Step([], [])
    step.words[STEP.index("rows")] = 5
    compiled(isa).run(
        "tap", step.words, 2, streams=address(streams), stream_stride=4 * SIZES.streams * SIZES.hidden,
        out=address(out), out_stride=8 * SIZES.hidden,
    )  # fmt: skip
    torch.testing.assert_close(out[:5, : SIZES.hidden], streams[:5].mean(1), rtol=1e-6, atol=1e-6)
    assert not out[5].any() and not out[:, SIZES.hidden :].any()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"nano": "nano"} | {kind: write_tiny(folder / kind, kind) for kind in ("fp4", "bf16", "fp8")}


@pytest.fixture(scope="module", params=[f"{BEST}-nano", f"{BEST}-bf16", *(f"{isa}-fp4" for isa in OTHERS[:1])])
def model(request: pytest.FixtureRequest, checkpoints: dict[str, str | Path]) -> Model:
    isa, kind = request.param.split("-")
    return model_on(isa, checkpoints[kind])


@pytest.mark.parametrize("isa", instruction_sets()[:2])
def test_errors_of_mtp_logits_stay_below_those_of_the_official_quantisers(isa: str) -> None:
    folder = locate_model("nano")
    ids = Tokenizer.from_directory(folder).encode((folder / "MODEL_CARD.md").read_text("utf-8"))[:401]
    exact, official = (load_model("nano", "cpu", "float32", q, backend="reference") for q in (False, True))
    ours = model_on(isa, "nano")
    assert ours.runner is not None

    def mtp_logits(model: Model) -> Tensor:
        state = model.new_state()
        x, _ = model.streams(ids[:-1], [400], [state])
        return model.mtp_logits(x, torch.tensor(ids[1:]), [400], [state])

    found, wanted, rounded = (mtp_logits(m) for m in (ours, exact, official))
    assert relative(found, wanted) < relative(rounded, wanted)
    # Drafts read a coarser copy of the head, and mostly agree all the same.
    drafted = []
    state, recorder = ours.new_state(), Recorder()
    for i in range(200):
        drafted += feed(ours, state, ids[i : i + 2], 64, 1, recorder)
    right = wanted[:200].argmax(-1)
    assert float((torch.tensor(drafted) == right).float().mean()) > 0.85
    assert relative(torch.cat([logits for logits, _, _ in recorder.calls]), wanted[:200]) < 0.25


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def test_mtp_streams_do_not_depend_on_company_or_cuts(model: Model) -> None:
    runner = model.runner
    assert runner is not None
    a, b = tokens(model, 1, 301), tokens(model, 2, 41)

    def run(cuts: list[tuple[int, int]]) -> list[Tensor]:
        """The streams of both sequences, fed to these ends together."""
        states: list[Any] = [model.new_state(), model.new_state()]
        begun = (0, 0)
        parts: list[list[Tensor]] = [[], []]
        for ends in cuts:
            pairs = zip((a, b), begun, ends, strict=True)
            spans = [(s, ids[i : j + 1], j - i) for s, (ids, i, j) in enumerate(pairs) if j > i]
            lengths, taking = [n for _, _, n in spans], [states[s] for s, _, _ in spans]
            x, _ = model.streams(torch.cat([ids[:-1] for _, ids, _ in spans]), lengths, taking)
            out = runner.mtp_streams(x, torch.cat([ids[1:] for _, ids, _ in spans]).tolist(), lengths, taking)
            for (s, _, _), part in zip(spans, out.split(lengths), strict=True):
                parts[s].append(part)
            begun = ends
        return [torch.cat(p) for p in parts]

    whole = run([(300, 0), (300, 40)])
    single = [(290, 33), *((290 + i, 40) for i in range(1, 11))]
    for cuts in ([(300, 40)], [(1, 40), (34, 40), (100, 40), (300, 40)], single):
        for found, wanted in zip(run(cuts), whole, strict=True):
            assert same_bits(found, wanted)


def test_drafts_do_not_depend_on_company_or_history(model: Model) -> None:
    """Draft after draft, alone and fed in pieces, or together and at once after a long prompt."""
    assert model.drafter is not None
    prompts = [tokens(model, seed, 75 + 10 * seed).tolist() for seed in range(3)]
    window = model.config.sliding_window
    alone = []
    for prompt in prompts:
        state, recorder = model.new_state(), Recorder()
        for begin, end in pairwise([0, 40, 41, 43, 70, 71, len(prompt) - 1]):
            recorder.calls.clear()
            feed(model, state, prompt[begin : end + 1], window, 3, recorder)
        alone.append([logits for logits, _, _ in recorder.calls])
    states = [model.new_state() for _ in prompts]
    lengths = [len(p) - 1 for p in prompts]
    model.advance([t for p in prompts[:2] for t in p[:-1]], lengths[:2], states[:2], [0, 0])
    model.drafter.draft([DraftSpan(i, lengths[i], prompts[i][-window:], i) for i in (0, 1)], Recorder())
    for i in (0, 1):  # some rows are rejected, and come again
        states[i].rewind(3)
    rows = [p[-4:-1] for p in prompts[:2]] + [prompts[2][:-1]]
    model.advance([t for r in rows for t in r], [3, 3, lengths[2]], states, [1, 0, 0])
    recorder = Recorder()
    spans = [DraftSpan(i, len(r), prompts[i][1:][-min(len(r), window) :], 3) for i, r in enumerate(rows)]
    model.drafter.draft(spans, recorder)
    for ahead, (logits, which, _) in enumerate(recorder.calls):
        assert which == [0, 1, 2]
        for i in which:
            assert same_bits(logits[i], alone[i][ahead][0])


def test_a_state_that_was_never_fed_to_the_draft_head_drafts_all_the_same(model: Model) -> None:
    ids = tokens(model, 9, 400).tolist()
    state, recorder = model.new_state(), Recorder()
    model.logits(ids[:-2], state)
    assert len(feed(model, state, ids[-2:], 64, 4, recorder)) == 4
    assert all(logits.isfinite().all() for logits, _, _ in recorder.calls)


def test_speculation_leaves_every_token_as_it_is(model: Model) -> None:
    check_speculation(model, [tokens(model, seed, 20 + 60 * seed).tolist() for seed in range(3)], 60, seed=2)


def test_dspark_speculates_behind_a_runner(checkpoints: dict[str, str | Path]) -> None:
    model = model_on(BEST, checkpoints["fp8"])
    assert model.config.draft == "dspark" and source_of(model) is not None
    check_speculation(model, [tokens(model, seed, 30 + seed).tolist() for seed in range(2)], 30, seed=3)


def test_a_step_takes_fewer_rows_behind_long_contexts(model: Model) -> None:
    assert model.runner is not None
    most = model.step_rows(1)
    assert most == model.runner.max_rows
    assert 1 <= model.step_rows(1 << 20) < most
    ids = tokens(model, 5, most).tolist()
    found = model.advance(ids, [most], [model.new_state()], [2])
    assert same_bits(found, model.logits(ids)[-2:])
