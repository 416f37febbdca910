"""Checkpoint: an opened model directory whose headers have all been checked; the only way the room reads weights.

Every naming is brought to official names here, on header level: a Hugging Face expert stack is split into the byte
ranges of its experts, so that the rest of the room sees official tensors only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hadal.checkpoint.hf import HF_PROBE, SAVED_PROBE, hf_place, official_config, saved_name
from hadal.checkpoint.names import (
    DENSE_PROBE,
    DRAFT_PREFIX,
    DTYPE_BYTES,
    EXPERT_PROBE,
    IGNORABLE,
    TensorSpec,
    tensor_table,
)
from hadal.checkpoint.safetensors import CheckpointError, Entry, Header, MappedFiles, read_header
from hadal.config import ConfigError, ModelConfig, WeightFormat
from hadal.quant import PackedWeight

INDEX_FILE = "model.safetensors.index.json"
Naming = Literal["official", "hf", "hf-saved"]

_FLOATS = ("BF16", "F32")


@dataclass(frozen=True)
class Checkpoint:
    """A checked directory. `config` tells what the files hold: formats as found, no draft head where none is stored."""

    path: Path
    config: ModelConfig
    naming: Naming
    expert_format: WeightFormat
    dense_format: WeightFormat
    headers: dict[str, Header]  # by file name
    entries: dict[str, Entry]  # by official tensor name
    files: MappedFiles = field(default_factory=MappedFiles, repr=False)

    @cached_property
    def table(self) -> tuple[TensorSpec, ...]:
        """The tensors of the checkpoint in official order."""
        formats: dict[str, Any] = {"expert_format": self.expert_format, "dense_format": self.dense_format}
        return tuple(tensor_table(self.config, **formats))

    def weight(self, spec: TensorSpec, *, check_scales: bool = True) -> Tensor | PackedWeight:
        """The weight `spec` as stored, without a copy; CheckpointError when a scale is NaN or an expert unknown."""
        assert spec.role == "weight", spec.name
        stored = self.files.view(self.entries[spec.name])
        if spec.dtype == "I64":
            self._check_experts(spec, stored)
        if spec.dtype not in ("I8", "F8_E4M3"):
            return stored
        entry = self.entries[spec.scale_name]
        scales = self.files.view(entry)
        if check_scales and int(scales.view(torch.uint8).max()) == 255:
            raise CheckpointError(f"{entry.file}: scale {spec.scale_name} holds NaN (byte 255); fetch the file again")
        if spec.dtype == "I8":
            return PackedWeight("fp4", stored.view(torch.uint8), scales, spec.matrix_shape)
        return PackedWeight("fp8", stored, scales, spec.matrix_shape)

    def identity(self) -> str:
        """Tells these files from others and from later versions of themselves, without reading a weight."""
        files = {header.file for header in self.headers.values()}
        found = [(f, f.stat()) for f in files]
        facts = sorted((str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for f, s in found)
        return repr(facts)

    def _check_experts(self, spec: TensorSpec, ids: Tensor) -> None:
        count = self.config.n_routed_experts
        for expert in (int(ids.min()), int(ids.max())):
            if not 0 <= expert < count:
                raise CheckpointError(
                    f"{self.entries[spec.name].file}: tensor {spec.name} names expert {expert}, but the model has "
                    f"{count}; fetch the file again or check config.json"
                )

    def by_parameter(self) -> Iterator[tuple[str, list[TensorSpec]]]:
        """Each model parameter with the weights that fill it (several for stacked experts), one group at a time."""
        group: dict[str, list[TensorSpec]] = {}
        current = 0
        for spec in self.table:
            if spec.group != current:
                yield from group.items()
                group, current = {}, spec.group
            if spec.role == "weight":
                group.setdefault(spec.parameter, []).append(spec)
        yield from group.items()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory in official or Hugging Face naming and check every header against its configuration.

    Raises CheckpointError (or ConfigError) with one sentence about the first fault; no weight has been read by then.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the folder that holds config.json and the shards")
    config = read_config(path)
    headers = _read_headers(path)
    stored = {name: entry for header in headers.values() for name, entry in header.entries.items()}
    naming, entries = _official_entries(config, stored)
    config = _match_draft(config, entries, path)
    dense = _format(entries, DENSE_PROBE, config.hidden_size)
    expert = _format(entries, EXPERT_PROBE, config.hidden_size)
    if config.dense_format != dense:
        config = config.replace(quantization=dense == "fp8")
    if config.expert_format != expert:
        config = config.replace(expert_dtype=None if expert == "bf16" else expert)
    checkpoint = Checkpoint(path, config, naming, expert, dense, headers, entries)
    _check_table(checkpoint)
    return checkpoint


def read_config(path: Path) -> ModelConfig:
    """The configuration of a model directory: config.json, or else inference/config.json, in any of the known forms."""
    file = path / "config.json"
    if not file.exists() and (path / "inference" / "config.json").exists():
        file = path / "inference" / "config.json"
    if not file.exists():
        raise CheckpointError(f"{path} has no config.json; copy the official one there")
    return parse_config(read_json(file), file)


def parse_config(raw: dict[str, Any], file: Path) -> ModelConfig:
    """The configuration in a JSON object read from `file`; CheckpointError or ConfigError when it holds none."""
    try:
        return ModelConfig.from_dict(official_config(raw))
    except (ConfigError, CheckpointError):
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"{file} has a value of the wrong kind ({error}); copy the official config.json there"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is anything else."""
    try:
        raw = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a JSON {type(raw).__name__}, not an object; fetch the file again")
    return raw


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name of an index; CheckpointError when the file is no index."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{file} has no `weight_map` from tensor names to file names; fetch the file again")
    return weight_map


def _read_headers(path: Path) -> dict[str, Header]:
    index = path / INDEX_FILE
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path} holds no .safetensors files; download the model's shards there")
        headers = {file.name: read_header(file) for file in files}
        _check_twice(headers)
        return headers
    weight_map = read_index(index)
    headers = {}
    for name, file_name in sorted(weight_map.items(), key=lambda item: item[1]):
        if file_name not in headers:
            file = path / file_name
            if Path(file_name).name != file_name or not file.is_file():
                raise CheckpointError(f"shard {file} with tensor {name} is missing; download it again")
            headers[file_name] = read_header(file)
        if name not in headers[file_name].entries:
            raise CheckpointError(
                f"{path / file_name} lacks tensor {name}, which the index places there; fetch it again"
            )
    _check_twice(headers)
    return headers


def _check_twice(headers: dict[str, Header]) -> None:
    seen: dict[str, Path] = {}
    for header in headers.values():
        for name in header.entries:
            if name in seen:
                raise CheckpointError(
                    f"tensor {name} is in both {seen[name]} and {header.file}; remove one of the files"
                )
            seen[name] = header.file


def _official_entries(config: ModelConfig, stored: dict[str, Entry]) -> tuple[Naming, dict[str, Entry]]:
    """Rename and split entries of other namings; names that the model does not have stay, to be reported."""
    if any(HF_PROBE.match(name) for name in stored):
        return "hf", _split_stacks(config, stored)
    if not any(SAVED_PROBE.match(name) for name in stored):
        return "official", stored
    names = {saved_name(s.name): s.name for s in tensor_table(config, expert_format="bf16", dense_format="bf16")}
    return "hf-saved", {names.get(name, name): entry for name, entry in stored.items()}


def _split_stacks(config: ModelConfig, stored: dict[str, Entry]) -> dict[str, Entry]:
    left = dict(stored)
    out = {}
    for spec in tensor_table(config.without_draft(), expert_format="bf16", dense_format="bf16"):
        place = hf_place(spec, config)
        entry = stored.get(place.name)
        if entry is None:
            raise CheckpointError(f"tensor {place.name} is missing from the checkpoint; fetch the shard that holds it")
        left.pop(place.name, None)
        if entry.shape != place.shape:
            raise CheckpointError(_wrong(entry, f"shape {list(entry.shape)}", f"{list(place.shape)}"))
        offset = entry.offset + place.element * DTYPE_BYTES[entry.dtype]
        out[spec.name] = dataclasses.replace(entry, name=spec.name, shape=spec.shape, offset=offset)
    return out | left


def _match_draft(config: ModelConfig, entries: dict[str, Entry], path: Path) -> ModelConfig:
    stages = {name.split(".")[1] for name in entries if name.startswith(DRAFT_PREFIX)}
    if not stages and config.draft_stages:
        return config.without_draft()
    if len(stages) > config.draft_stages:
        raise CheckpointError(
            f"{path} holds {len(stages)} draft stages ({DRAFT_PREFIX}*), its config announces {config.draft_stages}; "
            "use the config.json of the same release"
        )
    return config


def _format(entries: dict[str, Entry], probe: str, columns: int) -> WeightFormat:
    """The format of a family of matrices, told by one of them; both probes have `hidden_size` columns."""
    entry = entries.get(probe)
    if entry is None:
        raise CheckpointError(f"tensor {probe} is missing from the checkpoint; fetch the shard that holds it")
    if entry.dtype == "I8" and entry.shape[-1] * 2 == columns:
        return "fp4"
    if entry.dtype == "F8_E4M3":
        return "fp8"
    if entry.dtype in _FLOATS:
        return "bf16"
    raise CheckpointError(_wrong(entry, f"{entry.dtype} {list(entry.shape)}", "FP4 (I8), F8_E4M3, BF16 or F32"))


def _check_table(checkpoint: Checkpoint) -> None:
    entries = checkpoint.entries
    expected = set()
    for spec in checkpoint.table:
        expected.add(spec.name)
        entry = entries.get(spec.name)
        if entry is None:
            raise CheckpointError(
                f"tensor {spec.name} is missing from {checkpoint.path}; fetch its shard or check config.json"
            )
        allowed = _FLOATS if spec.dtype in _FLOATS else ("I64", "I32") if spec.dtype == "I64" else (spec.dtype,)
        if entry.dtype not in allowed:
            raise CheckpointError(_wrong(entry, f"dtype {entry.dtype}", " or ".join(allowed)))
        if entry.shape != spec.shape:
            raise CheckpointError(_wrong(entry, f"shape {list(entry.shape)}", f"{list(spec.shape)}"))
    unexpected = [name for name in entries if name not in expected and not IGNORABLE.fullmatch(name)]
    if unexpected:
        entry = entries[min(unexpected)]
        raise CheckpointError(
            f"{entry.file} holds tensor {entry.name}, which this model does not have; check config.json"
        )


def _wrong(entry: Entry, found: str, wanted: str) -> str:
    return f"{entry.file}: tensor {entry.name} has {found}, but config.json asks for {wanted}; use files of one release"
