"""Packing, tokenised stores, target flags and the sampler's resume."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hadal.text import Tokenizer, tokens, train_tokenizer
from hadal.train.corpus import Document, generate_documents
from hadal.train.data import Mix, Sampler, build_store, pack, tokenise
from hadal.train.pretrain import render_ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = generate_documents(50, 200, 7)
    texts = [d.text for d in made["made-stories"]] + [str(m["content"]) for d in made["made-chats"] for m in d.messages]
    return train_tokenizer(texts, 420)


def prose(tokenizer: Tokenizer, text: str, context: int, fim: Random | None = None):
    return tokenise(Document("s", text, text), tokenizer, lambda d: [], context, fim)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(0, 1000))
def test_packs_hold_every_piece_once_and_never_overflow(lengths, seed):
    order = list(range(len(lengths)))
    Random(seed).shuffle(order)
    packs = pack(lengths, 50, order)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in p) <= 50 for p in packs)
    # two packs that would fit into one cannot both be left over
    totals = sorted(sum(lengths[i] for i in p) for p in packs)
    assert len(totals) < 2 or totals[0] + totals[1] > 50


def test_a_piece_goes_where_it_leaves_the_least_room():
    assert pack([6, 7, 3], 10, [0, 1, 2]) == [[0], [1, 2]]


def test_short_prose_is_one_piece_from_bos_to_eos(tokenizer):
    [(ids, flags)] = prose(tokenizer, "Once upon a time there was a little fox.", 200)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and all(flags)
    assert tokenizer.decode(ids[1:-1]) == "Once upon a time there was a little fox."


def test_control_tokens_in_prose_stay_plain_text(tokenizer):
    [(ids, _)] = prose(tokenizer, f"a {tokens.USER} b and some more words to be long enough", 200)
    assert tokenizer.token_id(tokens.USER) not in ids


def test_a_long_document_is_cut_without_loss(tokenizer):
    text = "The little fox went home. " * 60
    pieces = prose(tokenizer, text, 64)
    joined = [i for ids, _ in pieces for i in ids]
    assert all(len(ids) <= 64 for ids, _ in pieces) and len(pieces) > 3
    whole = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert joined == whole[: len(joined)] and len(whole) - len(joined) < 16


def test_fill_in_the_middle_can_be_put_back_together(tokenizer):
    text = "The brave mouse lived in a forest with his mother and a big red hat."
    for seed in range(20):
        [(ids, flags)] = prose(tokenizer, text, 200, Random(seed))
        begin, hole, end = (
            ids.index(tokenizer.token_id(t)) for t in (tokens.FIM_BEGIN, tokens.FIM_HOLE, tokens.FIM_END)
        )
        assert ids[0] == tokenizer.bos_id and begin == 1 and ids[-1] == tokenizer.eos_id and len(flags) == len(ids)
        prefix, suffix, middle = ids[begin + 1 : hole], ids[hole + 1 : end], ids[end + 1 : -1]
        assert tokenizer.decode(prefix + middle + suffix) == text


def test_only_the_answer_is_learned_when_the_prompt_is_not(tokenizer):
    messages = ({"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "The answer is 2."})
    document = Document("c", "k", "", messages, learn_prompt=False)
    [(ids, flags)] = tokenise(document, tokenizer, lambda d: render_ids(d, tokenizer), 200, None)
    learned = [i for i, flag in zip(ids, flags, strict=True) if flag]
    assert tokenizer.decode(learned) == "The answer is 2." + tokens.EOS


def test_reasoning_is_learned_but_not_the_opening_think(tokenizer):
    answer = {"role": "assistant", "content": "2", "reasoning_content": "1 + 1 = 2."}
    document = Document("c", "k", "", ({"role": "user", "content": "1 + 1?"}, answer), True, learn_prompt=False)
    [(ids, flags)] = tokenise(document, tokenizer, lambda d: render_ids(d, tokenizer), 200, None)
    learned = [i for i, flag in zip(ids, flags, strict=True) if flag]
    assert tokenizer.decode(learned) == f"1 + 1 = 2.{tokens.THINK_CLOSE}2{tokens.EOS}"


def make_stores(tokenizer: Tokenizer, folder):
    made = generate_documents(60, 120, 3)
    return {
        name: build_store(folder / name, docs, tokenizer, lambda d: render_ids(d, tokenizer), context=700)
        for name, docs in made.items()
    }


def test_a_store_is_reused_only_for_the_same_input(tokenizer, tmp_path):
    documents = generate_documents(5, 0, 1)["made-stories"]
    first = build_store(tmp_path / "s", documents, tokenizer, lambda d: [], context=256)
    stamp = (tmp_path / "s.ids").stat().st_mtime_ns
    again = build_store(tmp_path / "s", documents, tokenizer, lambda d: [], context=256)
    assert (tmp_path / "s.ids").stat().st_mtime_ns == stamp
    assert torch.equal(first.ids.to(torch.int64), again.ids.to(torch.int64)) and first.offsets == again.offsets
    other = build_store(tmp_path / "s", documents[:3], tokenizer, lambda d: [], context=256)
    assert len(other) == 3


def test_a_store_is_built_anew_for_another_tokenizer_or_rendering(tokenizer, tmp_path):
    documents = [Document("c", "k", "", ({"role": "user", "content": "Hello you"},), learn_prompt=True)]
    other = Tokenizer(tokenizer.source + "\n")
    sizes = []
    for reader, ids in ((tokenizer, [1, 2]), (tokenizer, [1, 2, 3]), (other, [1, 2, 3, 4])):
        store = build_store(tmp_path / "s", documents, reader, lambda d, ids=ids: ids, context=256)
        sizes.append(store.offsets[-1])
    assert sizes == [2, 3, 4]


def test_the_sampler_follows_the_mix_and_resumes_exactly(tokenizer, tmp_path):
    stores = make_stores(tokenizer, tmp_path)
    mixes = (Mix(0.0, {"made-stories": 1.0}), Mix(0.5, {"made-stories": 0.25, "made-chats": 0.75}))
    sampler = Sampler(stores, mixes, 700, seed=5)
    sampler.draw(0.0, 3)
    assert "made-chats" not in sampler.epochs()
    for _ in range(10):
        sampler.draw(0.6, 4)
    drawn = {n: int(e[0]) * len(sampler._packs[n]) + int(e[1]) for n, e in sampler.state_dict().items()}
    assert drawn["made-chats"] == pytest.approx(30, abs=1)
    state = sampler.state_dict()
    want = [sampler.draw(0.7, 2) for _ in range(30)]  # long enough to pass an epoch's end
    fresh = Sampler(stores, mixes, 700, seed=5)
    fresh.load_state_dict(state)
    for batch in want:
        got = fresh.draw(0.7, 2)
        assert torch.equal(got.ids_T, batch.ids_T) and got.cu_seqlens == batch.cu_seqlens


def test_a_batch_is_whole_documents_end_to_end(tokenizer, tmp_path):
    batch = Sampler(make_stores(tokenizer, tmp_path), (Mix(0, {"made-stories": 1.0}),), 700).draw(0, 2)
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.ids_T) == len(batch.counted_T)
    for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        assert batch.ids_T[start] == tokenizer.bos_id and batch.ids_T[end - 1] == tokenizer.eos_id
