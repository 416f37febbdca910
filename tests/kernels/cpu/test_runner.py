"""Whole models on the emitted kernels: the same bits in any company, cut and thread count; errors; ways around them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.checkpoint import CheckpointError, load_model, locate_model, source_of
from hadal.kernels.cpu import chosen_kernels, unsupported
from hadal.kernels.cpu.runner import MAX_ROWS
from hadal.kernels.pages import REWIND
from hadal.model import InputError, Model
from hadal.text import Tokenizer
from tests.checkpoint.tiny import random_tensors, tiny_config, write_checkpoint
from tests.kernels.cpu.harness import instruction_sets
from tests.kernels.cpu.models import SIZES, model_on, same_bits, tokens, write_tiny

KINDS = ["nano", "fp4", "fp8", "bf16"]
BEST, *OTHERS = instruction_sets()  # the others take turns: compiling a model's kernels is what takes the time here
CHOICES = [f"{BEST}-{kind}" for kind in KINDS] + [f"{isa}-{KINDS[i % 2]}" for i, isa in enumerate(OTHERS)]
LENGTHS = st.sampled_from([0, 0, 1, 1, 2, 5, 31, 32, 33, 64, 65, 127, 200, MAX_ROWS + 30])

FORGOTTEN = st.sampled_from([0, 0, 0, 1, 2, 5, REWIND])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"nano": "nano"} | {kind: write_tiny(folder / kind, kind) for kind in KINDS[1:]}


@pytest.fixture(scope="module", params=CHOICES)
def model(request: pytest.FixtureRequest, checkpoints: dict[str, str | Path]) -> Model:
    isa, kind = request.param.split("-")
    return model_on(isa, checkpoints[kind])


@pytest.fixture(scope="module")
def best(checkpoints: dict[str, str | Path]) -> Model:
    return model_on(instruction_sets()[0], checkpoints["fp8"])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Slot:
    """A sequence that grows, and the logits it was given."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.state, self.fresh = model, model.new_state(), tokens(model, seed, 1500)
        self.ids, self.rows = self.fresh[:0], []  # type: tuple[Tensor, list[tuple[int, Tensor]]]

    def take(self, count: int) -> Tensor:
        new = self.fresh[:count]
        self.fresh = self.fresh[count:]
        self.ids = torch.cat((self.ids, new))
        return new

    def become_copy_of(self, other: Slot) -> None:
        self.state, self.ids, self.rows = other.state.clone(), other.ids, list(other.rows)

    def forget(self, count: int) -> None:
        self.state.rewind(count)
        self.ids = self.ids[: len(self.ids) - count]
        self.rows = [(end, rows) for end, rows in self.rows if end <= len(self.ids)]

    def sleep(self) -> None:
        """Go through bytes, as a state that is kept on disk does."""
        assert self.model.runner is not None
        pages = [self.model.runner.pool.copy(page) for page in self.state.pages]
        self.state = self.model.runner.restore_state(self.state.dump(), pages)  # type: ignore[assignment]


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.tuples(LENGTHS, LENGTHS, LENGTHS),
            st.booleans(),
            st.sampled_from([None, None, (0, 1), (1, 2)]),
            st.tuples(FORGOTTEN, FORGOTTEN, FORGOTTEN),
            st.booleans(),
        ),
        min_size=2,
        max_size=6,
    )
)
def test_any_interleaving_of_sequences_gives_the_bits_of_each_alone(model: Model, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    slots = [Slot(model, seed) for seed in (11, 12, 13)]
    for lengths, last_only, copied, forgotten, asleep in steps:
        taking = [(slot, n) for slot, n in zip(slots, lengths, strict=True) if n]
        if taking:
            ids = torch.cat([slot.take(n) for slot, n in taking])
            counts = [n for _, n in taking]
            logits = model.logits_ragged(ids, counts, [slot.state for slot, _ in taking], last_only)
            for (slot, _), part in zip(taking, logits.split([1] * len(taking) if last_only else counts), strict=True):
                slot.rows.append((len(slot.ids), part))
        if copied:
            slots[copied[1]].become_copy_of(slots[copied[0]])
        for slot, count in zip(slots, forgotten, strict=True):
            slot.forget(min(count, slot.state.rewindable))
        if asleep:
            slots[0].sleep()
    for slot in slots:
        if len(slot.ids):
            whole = model.logits(slot.ids)
            for end, rows in slot.rows:
                assert same_bits(rows, whole[end - len(rows) : end])


def test_long_calls_are_cut_into_steps_unnoticed(model: Model) -> None:
    ids = tokens(model, 1, 2 * MAX_ROWS + 77)
    whole = model.logits(ids)
    state = model.new_state()
    parts = [model.logits(part, state) for part in ids.split(100)]
    assert same_bits(torch.cat(parts), whole)
    assert state.position == len(ids)
    (last,) = model.logits_ragged(ids, [len(ids)], [model.new_state()])
    assert same_bits(last, whole[-1])


def test_many_sequences_in_one_call_do_not_see_each_other(model: Model) -> None:
    count = MAX_ROWS + 20
    prompts = [tokens(model, seed, 1 + seed % 3) for seed in range(count)]
    together = [model.new_state() for _ in prompts]
    first = model.logits_ragged(torch.cat(prompts), [len(p) for p in prompts], together)
    second = model.logits_ragged(torch.full((count,), 7), [1] * count, together)
    for i in (0, 1, 31, 32, MAX_ROWS // 2, MAX_ROWS - 1, MAX_ROWS, count - 1):
        state = model.new_state()
        assert same_bits(first[i], model.logits(prompts[i], state)[-1])
        assert same_bits(second[i], model.logits([7], state)[0])


@pytest.mark.usefixtures("two_threads")
def test_two_threads_give_the_bits_of_one(model: Model) -> None:
    ids = tokens(model, 3, 140)
    two_whole, state = model.logits(ids), model.new_state()
    two_cut = torch.cat([model.logits(part, state) for part in (ids[:130], *ids[130:].split(1))])
    torch.set_num_threads(1)
    assert same_bits(two_whole, model.logits(ids)) and same_bits(two_cut, two_whole)


def test_streams_and_taps_follow_the_logits_path(best: Model) -> None:
    ids = tokens(best, 4, MAX_ROWS + 60)
    whole_state, cut_state, logits_state = best.new_state(), best.new_state(), best.new_state()
    streams, taps = best.streams(ids, [len(ids)], [whole_state])
    assert taps is not None
    cut = [best.streams(part, [len(part)], [cut_state]) for part in ids.split(90)]
    assert same_bits(torch.cat([c[0] for c in cut]), streams)
    assert same_bits(torch.cat([c[1] for c in cut if c[1] is not None]), taps)
    logits = best.logits(ids, logits_state)
    torch.testing.assert_close(best.head_logits(streams), logits, rtol=0, atol=float(logits.abs().max()) * 2**-6)
    for state in (whole_state, cut_state):
        assert same_bits(best.logits([3, 4, 5], state), best.logits([3, 4, 5], logits_state.clone()))
    # The last tap is the last layer's, the first one that of a layer whose streams no other call returns.
    d = best.config.hidden_size
    assert same_bits(taps[:, d:], streams.mean(1))
    source = source_of(best)
    assert source is not None
    exact, official = (
        load_model(source.path, "cpu", "float32", quantisers, backend="reference") for quantisers in (False, True)
    )
    exact_taps, official_taps = (m.streams(ids, [len(ids)], [m.new_state()])[1] for m in (exact, official))
    assert exact_taps is not None and official_taps is not None
    for part in (slice(0, d), slice(d, None)):
        assert relative(taps[:, part], exact_taps[:, part]) < relative(official_taps[:, part], exact_taps[:, part])


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", instruction_sets()[:2])
def test_errors_stay_below_those_of_the_official_quantisers(isa: str) -> None:
    folder = locate_model("nano")
    text = "A fox crossed the frozen river at dawn. " + (folder / "MODEL_CARD.md").read_text("utf-8")
    ids = Tokenizer.from_directory(folder).encode(text)[:400]
    exact = load_model("nano", "cpu", "float32", False, backend="reference").logits(ids)
    official = load_model("nano", "cpu", "float32", True, backend="reference").logits(ids)
    ours = model_on(isa, "nano").logits(ids)
    assert relative(ours, exact) < relative(official, exact)
    kl = [
        torch.nn.functional.kl_div(x.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
        for x in (ours, official)
    ]
    assert float(kl[0]) < float(kl[1])
    assert float((ours.argmax(-1) == exact.argmax(-1)).float().mean()) > 0.9


def test_a_state_keeps_its_draft_part_and_says_its_size(best: Model) -> None:
    state = best.new_state()
    empty = state.nbytes()
    best.logits(tokens(best, 5, 300), state)
    assert state.nbytes() > empty > 0
    assert len(state.draft) == len(best.new_state().draft) > 0
    assert len(state.clone().draft) == len(state.draft) and state.clone().position == 300


REFUSED = [
    (dict(hidden_size=144), "hidden_size 144"),
    (dict(q_lora_rank=48), "q_lora_rank 48"),
    (dict(head_dim=112, qk_rope_head_dim=48, index_head_dim=64), "head_dim 112"),
    (dict(index_head_dim=16, qk_rope_head_dim=16), "index_head_dim 16"),
    (dict(head_dim=128), "is 96, not a multiple of 64"),
    (dict(sliding_window=48), "sliding_window 48"),
    (dict(hc_mult=2), "hc_mult is 2"),
    (dict(o_lora_rank=16), "o_lora_rank 16"),
    (dict(compress_ratios=(4, 0, 48, 128, 0)), "does not divide 128"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_models_of_other_shapes_are_refused_with_the_reason(changes: dict[str, int], words: str) -> None:
    assert unsupported(tiny_config(**SIZES)) is None
    reason = unsupported(tiny_config(**(SIZES | dict(quantization=False, expert_dtype=None) | changes)))
    assert reason is not None and words in reason and "\n" not in reason


def test_a_model_the_kernels_cannot_run_falls_back_to_torch(tmp_path: Path) -> None:
    config = tiny_config()
    path = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    model = load_model(path, device="cpu")
    assert model.runner is None and model.logits([1, 2, 3]).isfinite().all()
    with pytest.raises(CheckpointError, match=r"head_dim 48 .* must be multiples of 32; use backend 'reference'"):
        load_model(path, device="cpu", backend="cpu")


@pytest.mark.parametrize(
    ("asked", "words"),
    [(dict(dtype="float32"), "float32 has none"), (dict(fake_quant=True), "float32 has none"),
     (dict(weights="dense"), "weights is 'dense'")],
)  # fmt: skip
def test_a_runner_computes_fast_mode_alone(
    checkpoints: dict[str, str | Path], asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_model(checkpoints["fp4"], device="cpu", backend="cpu", **asked)
    assert load_model(checkpoints["fp4"], device="cpu", **asked).runner is None


def test_weights_in_fp32_are_left_to_torch(tmp_path: Path) -> None:
    config = tiny_config(**SIZES, quantization=False, expert_dtype=None)
    tensors = random_tensors(config, "bf16", "bf16")
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    path = write_checkpoint(tmp_path / "model", config, wide)
    assert load_model(path, device="cpu").runner is None
    with pytest.raises(CheckpointError, match="is stored in FP32, and their products take BF16"):
        load_model(path, device="cpu", backend="cpu")


def test_the_kernels_can_be_switched_off() -> None:
    code = (
        "from hadal import load_model; from hadal.kernels.cpu import chosen_kernels; m = load_model('nano', 'cpu');"
        "assert m.runner is None and m.logits([1, 2, 3]).isfinite().all();"
        "assert set(chosen_kernels().values()) == {'plain torch (switched off by HADAL_CPU=none)'}"
    )
    environment = os.environ | {"HADAL_CPU": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_computes_each_part_can_be_asked() -> None:
    chosen = chosen_kernels()
    assert {"lightning indexer", "products with FP4 weights"} <= set(chosen)
    assert not any(name.startswith("plain torch") for name in chosen.values())
    assert len({name.rpartition("(")[2] for name in chosen.values()}) == 1  # all for one reason


def test_a_state_stands_for_one_sequence_of_a_call(model: Model) -> None:
    state = model.new_state()
    with pytest.raises(InputError, match="one state stands for two sequences of the call; clone it"):
        model.logits_ragged([1, 2, 3], [1, 2], [state, state])
    assert state.position == 0


def test_an_interrupted_step_leaves_a_state_that_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during native code is raised when it returns; the step is done by then, and so the state says."""
    assert model.runner is not None
    ids = tokens(model, 6, 90)
    whole = model.logits(ids)
    state, run = model.new_state(), model.runner._team.run_at

    def interrupted(*arguments: Any) -> None:
        run(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.runner._team, "run_at", interrupted)
        model.logits(ids[:70], state)
    assert state.position == 70 and same_bits(model.logits(ids[70:], state), whole[70:])
