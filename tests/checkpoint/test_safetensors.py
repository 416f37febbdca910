from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hadal.checkpoint.safetensors import CheckpointError, FileWriter, MappedFiles, dtype_tag, read_header

NUMBERS = [
    torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32,
    torch.uint32, torch.float32, torch.float64, torch.int64, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu,
]  # fmt: skip


def one_of_each() -> dict[str, torch.Tensor]:
    tensors = {}
    for i, dtype in enumerate(NUMBERS):
        raw = torch.arange(3 * dtype.itemsize, dtype=torch.uint8)
        raw = raw % 2 if dtype == torch.bool else raw
        tensors[f"t{(7 * i) % 16:02d}.{'x' * i}"] = raw.view(dtype)
        tensors[f"u{i}"] = raw.clone().view(dtype).view(1, 3)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["scalar"] = torch.tensor(1.5)
    return tensors


def write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    announced = [(name, dtype_tag(t), tuple(t.shape)) for name, t in tensors.items()]
    with FileWriter(file, announced, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def raw_file(file: Path, header: object, payload: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return file


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_writer_gives_the_bytes_of_the_reference_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = one_of_each()
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    write(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_equal_what_the_reference_library_loads(tmp_path: Path) -> None:
    save_file(one_of_each(), tmp_path / "f")
    theirs, files = load_file(tmp_path / "f"), MappedFiles()
    entries = read_header(tmp_path / "f").entries
    assert entries.keys() == theirs.keys()
    for name, entry in entries.items():
        view = files.view(entry)
        assert view.dtype == theirs[name].dtype and view.shape == theirs[name].shape
        assert torch.equal(view.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8))


def test_views_share_the_mapping_and_never_write_to_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8)}, tmp_path / "f")
    before, files = (tmp_path / "f").read_bytes(), MappedFiles()
    entry = read_header(tmp_path / "f").entries["a"]
    first, second = files.view(entry), files.view(entry)
    first.fill_(1)
    assert first.data_ptr() == second.data_ptr() and second.sum() == 8
    assert (tmp_path / "f").read_bytes() == before


@pytest.mark.filterwarnings("error")
def test_views_that_are_read_only_can_be_forgotten(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1 << 18)}, tmp_path / "f")
    files = MappedFiles(writable=False)
    view = files.view(read_header(tmp_path / "f").entries["a"])

    def resident() -> int:
        parts = Path("/proc/self/smaps").read_text().split(str(tmp_path))[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in parts)

    for _ in range(2):
        assert view.equal(torch.arange(1 << 18)) and resident() >= 2048
        files.forget()
        assert resident() == 0


def test_unaligned_tensors_are_readable(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "f": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    file = raw_file(tmp_path / "f", header, b"\1\2\3" + struct.pack("<2f", 1.5, -2.0))
    view = MappedFiles().view(read_header(file).entries["f"])
    assert view.tolist() == [1.5, -2.0] and view.data_ptr() % 4 == 0


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), FileWriter(tmp_path / "f", [("a", "F32", (2,))]):
        raise RuntimeError
    with pytest.raises(AssertionError, match="never written"), FileWriter(tmp_path / "f", [("a", "F32", (2,))]):
        pass
    assert not (tmp_path / "f").exists()


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    save_file({"alpha": torch.ones(5), "beta": torch.ones(3, dtype=torch.int8)}, tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    for length in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut"):
            read_header(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated: tensor beta"):
        read_header(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="1 bytes after its last tensor"):
        read_header(tmp_path / "cut")


def entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 8)}, "tensor b overlaps"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, "tensor b leaves a gap"),
        ({"a": entry(0, 8, shape=[9])}, "gives tensor a 8 bytes, but U8 \\[9\\] needs 9"),
        ({"a": entry(0, 8, dtype="F4")}, "stores tensor a as 'F4'"),
        ({"a": entry(0, 8, shape=[-1, -8])}, "tensor a the shape"),
        ({"a": entry(0, 8, shape=["8"])}, "tensor a the shape"),
        ({"a": {"dtype": "U8"}}, "describes tensor a without"),
        ({"a": 3}, "describes tensor a without"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[1, 2]  ", "not a JSON object"),
        (b"\xff\xfe\x00\x00", "damaged header"),
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(raw_file(tmp_path / "f", header, bytes(8)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_header_escapes_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "good").exists():
        save_file({"alpha": torch.ones(2, 3), "beta": torch.ones(3, dtype=torch.int8)}, tmp_path / "good")
    content = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "bad").write_bytes(content)
    try:
        header = read_header(tmp_path / "bad")
    except CheckpointError as error:
        assert "bad" in str(error)
    else:
        files = MappedFiles()
        assert sum(files.view(e).nbytes for e in header.entries.values()) <= 27
