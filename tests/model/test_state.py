"""States of models that run in torch: lossless packing, forgetting, copies, bytes, pages shared and given back."""

from __future__ import annotations

import gc
import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.config import preset
from hadal.kernels import Numerics
from hadal.kernels.pages import PAGE_TOKENS, PagePool
from hadal.kernels.stored import RowForm, Shelf, StoredRows
from hadal.model import Model, SequenceState
from hadal.model.state import fresh_state, plan_state
from hadal.quant import fake_quant_fp4, fake_quant_fp8

CONFIG = preset("nano").replace(
    vocab_size=97, hidden_size=64, moe_intermediate_size=32, num_attention_heads=2, head_dim=96, qk_rope_head_dim=32,
    q_lora_rank=32, o_lora_rank=32, index_n_heads=4, index_head_dim=64, index_topk=8, sliding_window=16,
    n_routed_experts=3, num_experts_per_tok=2, num_hidden_layers=5, compress_ratios=(0, 4, 16, 4, 48, 0),
)  # fmt: skip


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["float32", "quantised"])
def model(request: pytest.FixtureRequest) -> Model:
    made = Model(CONFIG, Numerics(fake_quant=request.param == "quantised"))
    made.init_weights(torch.Generator().manual_seed(11))
    return made


def ids(seed: int, count: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def fed(model: Model, *parts: Tensor) -> SequenceState:
    state = model.new_state()
    for part in parts:
        model.logits(part, state)
    return state


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


FORMS = [
    RowForm("plain", 40, torch.bfloat16), RowForm("plain", 40, torch.float32),
    RowForm("fp8", 512, torch.bfloat16, 64), RowForm("fp8", 96, torch.bfloat16, 32),
    RowForm("fp8", 72, torch.float32, 8), RowForm("fp4", 128, torch.bfloat16), RowForm("fp4", 16, torch.float32),
]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMS), st.integers(0, 10**6), st.integers(1, 20), st.integers(-40, 30), st.floats(0, 12))
def test_packing_loses_no_bit(form: RowForm, seed: int, count: int, exponent: int, spread: float) -> None:
    """Of fake-quantised values of any size, groups of zeros, negative zeros and rows of one repeated value."""
    x = random(seed, count, form.dim) * torch.exp2((random(seed + 1, count, form.dim) * spread).round() + exponent)
    x[0] = -0.0
    x[-1] = 2.0**exponent
    rows = x.to(form.dtype)
    if form.kind == "fp8":
        rows[:, : -form.rotary] = fake_quant_fp8(rows[:, : -form.rotary], 64)
    elif form.kind == "fp4":
        rows = fake_quant_fp4(rows)
    packed = form.pack(rows)
    assert packed.dtype == torch.uint8 and packed.shape == (count, form.nbytes)
    assert torch.equal(bits(form.unpack(packed)), bits(rows))


def test_rows_of_the_official_cache_have_its_bytes() -> None:
    assert RowForm("fp8", 512, torch.bfloat16, 64).nbytes == 584
    assert RowForm("fp4", 128, torch.bfloat16).nbytes == 68
    row = torch.zeros(1, 512, dtype=torch.bfloat16)
    row[0, 64:69] = torch.tensor([1.0, -1.5, 448.0, 0.5, 2.0**-6])
    row[0, 448], row[0, 511] = 3.25, -0.1
    packed = RowForm("fp8", 512, torch.bfloat16, 64).pack(row)[0].tolist()
    assert packed[64:69] == [0x38, 0xBC, 0x7E, 0x30, 0x08]
    assert packed[448:450] == [0x50, 0x40]  # 3.25 in BF16, the low byte first
    assert packed[576:] == [1, 127, 1, 1, 1, 1, 1, 0]  # 2^(byte - 127); a group of zeros has the smallest scale
    key = torch.zeros(1, 128, dtype=torch.bfloat16)
    key[0, :3], key[0, 96] = torch.tensor([6.0, -0.5, 1.5]), 24.0
    assert RowForm("fp4", 128, torch.bfloat16).pack(key)[0, [0, 1, 48, 64, 67]].tolist() == [0x97, 0x03, 0x07, 127, 129]


@pytest.mark.parametrize("ratio", [4, 7, 16, 128, 300])
@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_stored_rows_are_read_as_they_were_appended(ratio: int, sizes: list[int]) -> None:
    """Also where blocks reach over the border of a page."""
    pool = PagePool(4000)
    shelf = Shelf(RowForm("plain", 8, torch.float32), 24, ratio)
    pages = [pool.take() for _ in range(-(-sum(sizes) // PAGE_TOKENS))]
    rows = random(1, sum(sizes) // ratio, 8)
    stored = StoredRows(pages, shelf, 0)
    for end in accumulate(sizes):
        new = rows[stored.count : end // ratio]
        stored = stored.append(new)
        if pages:
            assert torch.equal(stored.read(), rows[: end // ratio])
    assert shelf.offset + shelf.nbytes <= pool.page_bytes


def test_a_state_takes_the_bytes_of_the_formula() -> None:
    """584 bytes per compressed entry, 68 per index key, and a home that does not grow."""
    for name, per_token in (("flash", 21 * 163 + 20 * 4.5625), ("pro", 30 * 163 + 31 * 4.5625)):
        plan = plan_state(preset(name), Numerics(torch.bfloat16, fake_quant=True))
        assert plan.page_bytes == PAGE_TOKENS * per_token
        tails = sum((8 + 16) * 2 * 2 * (512 + 128) * 4 if r == 4 else (128 + 16) * 2 * 512 * 4 for r in ratios(name))
        windows = len(plan.layers) * (128 + 16) * 512 * 2
        assert plan.home_bytes == tails + windows


def ratios(name: str) -> list[int]:
    return [r for r in preset(name).compress_ratios if r]


def test_a_sequence_holds_its_home_and_its_pages(model: Model) -> None:
    home = model.new_state().nbytes()
    assert home == model.home_bytes
    for count in (1, 128, 129, 500):
        state = fed(model, *ids(1, count).split(64))
        assert state.nbytes() == home + math.ceil(count / PAGE_TOKENS) * model.pool.page_bytes
        assert model.pool.live == len(state.pages) == math.ceil(count / PAGE_TOKENS)
        del state
    assert model.pool.live == 0


def test_copies_share_full_pages_and_go_their_own_way(model: Model) -> None:
    state = fed(model, ids(1, 300))
    copy = state.clone()
    assert [a is b for a, b in zip(state.pages, copy.pages, strict=True)] == [True, True, False]
    assert model.pool.live == 4
    kept = [page.bytes.clone() for page in copy.pages], copy.dump()
    model.logits(ids(2, 200), state)
    assert all(torch.equal(a, page.bytes) for a, page in zip(kept[0], copy.pages, strict=True))
    assert copy.dump() == kept[1] and copy.position == 300
    assert torch.equal(model.logits(ids(3, 150), copy), model.logits(ids(3, 150), fed(model, ids(1, 300))))
    del state, copy
    gc.collect()
    assert model.pool.live == 0


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 40))
def test_forgotten_tokens_leave_no_trace(model: Model, start: int, forgotten: int, follow: int) -> None:
    """To the bit where the model's sums are the same, whatever shares the last page."""
    state = fed(model, ids(1, start))
    model.logits(ids(2, forgotten), state)
    copy = state.clone()
    before = [page.bytes.clone() for page in copy.pages]
    state.rewind(forgotten)
    assert state.position == start and len(state.pages) == math.ceil(start / PAGE_TOKENS)
    plain = fed(model, ids(1, start))
    assert torch.equal(model.logits(ids(3, follow), state), model.logits(ids(3, follow), plain))
    assert all(torch.equal(a, page.bytes) for a, page in zip(before, copy.pages, strict=True))


def test_a_state_stays_near_the_furthest_token_it_saw(model: Model) -> None:
    begin, end = ids(1, 140).split((124, 16))
    state = fed(model, begin, end)
    assert state.rewindable == 8
    state.rewind(8)
    state.rewind(8)
    assert state.position == 124 and state.rewindable == state.clone().rewindable == 0
    with pytest.raises(AssertionError):
        state.rewind(1)
    follow = model.logits(ids(2, 1), state)
    assert state.rewindable == 1
    assert torch.equal(follow, model.logits(ids(2, 1), fed(model, begin)))
    first = fed(model, ids(1, 3))
    assert first.rewindable == 3
    first.rewind(3)
    assert first.position == 0 and not first.pages


def test_a_state_goes_through_bytes(model: Model) -> None:
    state = fed(model, ids(1, 200), ids(2, 7))
    state.rewind(5)
    pages = [model.pool.copy(page) for page in state.pages]
    restored = model.restore_state(state.dump(), pages)
    assert (restored.position, restored.rewindable) == (202, state.rewindable)
    assert restored.dump() == state.dump()
    assert torch.equal(model.logits(ids(3, 60), restored), model.logits(ids(3, 60), state))


def test_a_state_made_for_inference_serves_everywhere(model: Model) -> None:
    with torch.inference_mode():
        state = fed(model, ids(1, 150)).clone()
    logits = model.logits(ids(2, 3), state)
    assert torch.equal(logits, model.logits(ids(2, 3), fed(model, ids(1, 150))))


def test_draft_windows_forget_too(model: Model) -> None:
    def follow(state: SequenceState, tokens: Tensor) -> Tensor:
        x, _ = model.streams(tokens, [len(tokens)], [state])
        return model.mtp_logits(x, torch.roll(tokens, -1), [len(tokens)], [state])

    state, plain = model.new_state(), model.new_state()
    follow(state, ids(1, 60))
    follow(state, ids(2, 6))
    state.rewind(6)
    follow(plain, ids(1, 60))
    assert torch.equal(follow(state, ids(3, 30)), follow(plain, ids(3, 30)))


def test_a_state_key_names_weights_and_numerics(model: Model) -> None:
    other = Model(CONFIG, model.numerics)
    assert model.state_key == model.state_key != other.state_key  # unnamed weights are nobody else's
    other = Model(CONFIG, model.numerics)
    other.identity = model.identity
    assert model.state_key == other.state_key
    plain = Model(CONFIG, Numerics(torch.bfloat16))
    plain.identity = model.identity
    assert plain.state_key != model.state_key


def test_a_model_without_compression_has_states_too() -> None:
    config = CONFIG.replace(num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0)
    plan = plan_state(config, Numerics())
    state = fresh_state(plan, PagePool(plan.page_bytes), torch.device("cpu"))
    state.extend(300)
    assert len(state.pages) == 3
