"""Lines of batches: junk of every kind is told apart from requests, and what was written survives broken ends."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hadal.server import lines
from hadal.server.errors import APIError
from hadal.server.lines import Made, check, line_id, numbered, read_line

URL = "/v1/chat/completions"
GOOD = {"custom_id": "a", "method": "POST", "url": URL, "body": {"x": 1}}
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
plain = st.binary(max_size=40).map(lambda b: b.replace(b"\n", b""))
nearly = st.fixed_dictionaries(
    {}, optional={name: st.just(value) | json_values for name, value in GOOD.items()} | {"more": json_values}
)


@given(st.binary() | nearly.map(lambda v: json.dumps(v).encode()) | json_values.map(lambda v: json.dumps(v).encode()))
@example(b'{"custom_id":"\\ud800","method":"POST","url":"/v1/chat/completions","body":{}}')
@example(b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"x":1e999}}')
@example(b"[" * 5000)
@settings(deadline=None)
def test_junk_is_an_error_that_says_so_and_nothing_else(raw: bytes) -> None:
    try:
        line = read_line(raw, URL, 10_000)
    except APIError as error:
        assert error.status in (400, 422) and error.message and error.code
    else:
        assert line.url == URL and line.method == "POST" and 0 < len(line.custom_id) <= 512


@given(st.lists(plain, max_size=12), st.integers(1, 30), st.booleans())
@settings(deadline=None)
def test_lines_keep_their_numbers_whatever_their_length(parts: list[bytes], limit: int, ends: bool) -> None:
    data = b"\n".join(parts) + (b"\n" if ends else b"")
    got = dict(numbered(io.BytesIO(data), limit))
    wanted = {}
    for number, part in enumerate(parts, 1):
        bare = part.removeprefix(b"\xef\xbb\xbf") if number == 1 else part
        if len(part) <= limit and bare.strip():
            wanted[number] = bare
    assert {n: raw.rstrip(b"\n") for n, raw in got.items() if len(raw.rstrip(b"\n")) <= limit and n in wanted} == wanted
    assert all(len(raw) <= limit + 1 for raw in got.values())


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes_can_be_checked(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk"
    path.write_bytes(data)
    total, errors = check(path, URL, 100)
    assert (total == 0) == bool(errors) and len(errors) <= 100


def test_long_and_many_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"x" * 5000 + b"\n" + json.dumps(GOOD).encode())
    assert [(e["code"], e["line"]) for e in check(path, URL, 200)[1]] == [("line_too_long", 1)]
    path.write_bytes(b"junk\n" * 500)
    assert [e["line"] for e in check(path, URL, 200)[1]] == list(range(1, 101))
    monkeypatch.setattr(lines, "MOST_LINES", 3)
    path.write_bytes(b"".join(json.dumps(GOOD | {"custom_id": str(i)}).encode() + b"\n" for i in range(9)))
    assert [(e["code"], e["line"]) for e in check(path, URL, 200)[1]] == [("too_many_lines", 4)]


def paths(folder: Path) -> dict[str, Path]:
    return {"output": folder / "made" / "out", "error": folder / "made" / "err"}


@given(st.lists(st.text(max_size=5), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=60)
def test_whatever_end_a_crash_cuts_off_whole_lines_stay(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("crash")
    made = Made(paths(folder))
    for i, text in enumerate(texts):
        made.append("output", line_id("b", i), {"custom_id": text}, sync=False)
        made.append("output", line_id("b", i), {"custom_id": "again"}, sync=False)
    made.close()
    path = paths(folder)["output"]
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut] + data.draw(st.sampled_from([b"", b"\x00" * 20, b"{}\n", b"7\n"])))
    again = Made(paths(folder))
    complete = whole[:cut].count(b"\n")
    assert again.counts == {"output": complete, "error": 0}
    assert again.done == {line_id("b", i) for i in range(complete)}
    for i, text in enumerate(texts):
        again.append("output", line_id("b", i), {"custom_id": text})
    assert again.close() == {"output": len(whole)}
    assert path.read_bytes() == whole and not paths(folder)["error"].exists()


def test_a_line_that_the_disk_does_not_take_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(paths(tmp_path))
    made.append("output", "1", {"a": 1})

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(lines.os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            made.append("output", "2", {"a": 2})
    assert made.done == {"1"} and made.counts["output"] == 1
    made.append("output", "3", {"a": "\ud800"})
    made.close()
    got = [json.loads(line) for line in paths(tmp_path)["output"].read_bytes().splitlines()]
    assert [line["id"] for line in got] == ["batch_req_1", "batch_req_3"]
