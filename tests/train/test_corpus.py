"""The corpus readers, the split and the generators' answers."""

import json
import lzma
import re
from pathlib import Path
from random import Random

import pytest

from hadal.train.corpus import CorpusError, Document, generate_documents, is_held_out, read_attributions, read_corpus
from hadal.train.stories import generate_story

CORPUS = Path(__file__).parents[2] / "corpus"


def write(path: Path, text: str) -> None:
    path.write_bytes(lzma.compress(text.encode()))


def test_the_starter_corpus_is_read_whole_and_small():
    documents = read_corpus(CORPUS)
    counts = {name: len(listed) for name, listed in documents.items()}
    assert counts["stories"] == counts["stories-chat"] == 704
    assert counts["gsm8k"] == 7473 and counts["books-children"] == 56 and counts["tldr-pages-en"] == 7424
    assert counts["tools"] == 300 and counts["persona"] > 990
    assert sum(p.stat().st_size for p in CORPUS.iterdir()) < 10e6
    assert len(read_attributions(CORPUS)) == 704


def test_every_chat_ends_with_the_assistant_and_starts_with_someone_else():
    for listed in read_corpus(CORPUS).values():
        for document in listed:
            if document.messages:
                assert document.messages[-1]["role"] == "assistant"
                assert document.messages[0]["role"] in ("system", "user")


def test_gsm8k_carries_no_calculator_marks_and_half_of_it_thinks():
    documents = read_corpus(CORPUS)["gsm8k"]
    texts = [json.dumps(d.messages) for d in documents]
    assert not any("<<" in t or "####" in t for t in texts)
    assert sum(d.thinking for d in documents) == pytest.approx(len(documents) / 2, abs=1)


def test_a_story_and_its_chat_are_on_the_same_side_of_the_split():
    documents = read_corpus(CORPUS)
    sides = [[is_held_out(d, 0.03) for d in documents[name]] for name in ("stories", "stories-chat")]
    assert sides[0] == sides[1] and 5 < sum(sides[0]) < 50


def test_the_split_takes_the_fraction_it_is_told():
    documents = [Document("s", str(i)) for i in range(4000)]
    for fraction in (0.0, 0.03, 0.5, 1.0):
        share = sum(is_held_out(d, fraction) for d in documents) / 4000
        assert share == pytest.approx(fraction, abs=0.02)


def test_any_jsonl_with_text_is_prose(tmp_path):
    text = '{"text": "one\\u2028two"}\n{"text": "three", "title": "t"}\n'
    write(tmp_path / "mine.jsonl.xz", text)
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "NOTES.md").write_text("not a document")
    documents = read_corpus(tmp_path)
    assert documents.keys() == {"mine", "plain"}
    assert [[d.text for d in listed] for listed in documents.values()] == [["one\u2028two", "three"]] * 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.xz", '{"text": 1}\n', "text"),
        ("a.jsonl.xz", "not json\n", "line 1"),
        ("a.tar.xz", "x", "known corpus file"),
        ("made-chats.jsonl.xz", '{"text": "x"}', "rename"),
        ("mine.jsonl.xz", "[1]", "another shape"),
        ("stories-simple.jsonl.xz", '{"title": "x"}', "another shape"),
        ("gsm8k-train.jsonl.xz", '{"question": "x", "answer": 3}', "another shape"),
        ("spc_valid.csv.xz", "a,b\n1,2\n", "another shape"),
        ("glaive_toolcall_en_demo.json.xz", "{", "another shape"),
        ("glaive_toolcall_en_demo.json.xz", '[{"tools": "[]", "conversations": [{"from": "x"}]}]', "another shape"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    write(tmp_path / name, content)
    with pytest.raises(CorpusError, match=words) as caught:
        read_corpus(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_truncated_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(CorpusError, match="corpus"):
        read_corpus(tmp_path)
    write(tmp_path / "stories-simple.jsonl.xz", '{"title": "x", "text": "y"}')
    with pytest.raises(CorpusError, match="another shape"):
        read_attributions(tmp_path)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 100)[:-20])
    with pytest.raises(CorpusError, match="not a readable text file"):
        read_corpus(tmp_path)


def test_stories_are_reproducible_and_leave_no_slot_open():
    first = [generate_story(Random(s)).text for s in range(300)]
    assert first == [generate_story(Random(s)).text for s in range(300)]
    assert len(set(first)) == 300
    assert not any("{" in t or " a orange" in t or " a owl" in t or "  " in t.replace("\n", "") for t in first)


def test_generated_sums_are_right():
    signs = {"plus": "+", "minus": "-", "times": "*"}
    checked = 0
    for document in generate_documents(0, 4000, 11)["made-chats"]:
        for question, answer in zip(document.messages, document.messages[1:], strict=False):
            found = re.search(r"(\d+) (plus|minus|times|[-+*]) (\d+)", str(question["content"]))
            if question["role"] != "user" or not found:
                continue
            a, sign, b = found.groups()
            want = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[signs.get(sign, sign)]
            assert re.findall(r"-?\d+", answer["content"])[-1] == str(want)
            for left, op, right, result in re.findall(
                r"(\d+) ([-+*]) (\d+) = (\d+)", answer.get("reasoning_content", "")
            ):
                value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[op]
                assert value == int(result)
            checked += 1
    assert checked > 500


def test_thinking_chats_reason_before_their_last_answer_only():
    documents = generate_documents(0, 1000, 2)["made-chats"]
    assert 0.4 < sum(d.thinking for d in documents) / 1000 < 0.6
    for document in documents:
        places = [i for i, m in enumerate(document.messages) if "reasoning_content" in m]
        assert places == ([len(document.messages) - 1] if document.thinking else [])
