"""Writing checkpoints: official layout (FP4/FP8/BF16) or Hugging Face names, one tensor at a time.

`save_model` writes a model, `convert` in its own module writes a checkpoint; both describe their weights by a function
from an official tensor to its value. What was loaded quantised and has not changed is written back with its own bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hadal.checkpoint.hf import Place, hf_config, hf_place
from hadal.checkpoint.load import source_of
from hadal.checkpoint.names import TensorSpec, shard_plan, tensor_table
from hadal.checkpoint.safetensors import CheckpointError, FileWriter
from hadal.checkpoint.source import INDEX_FILE, Checkpoint, read_config, read_json
from hadal.config import ModelConfig, WeightFormat
from hadal.model import Model
from hadal.quant import PackedWeight, fp4_to_fp8, quantise_fp4, quantise_fp8

Quantise = Literal["fp4", "fp8"] | None
Weight = Tensor | PackedWeight

_COMPANIONS = [
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "encoding/encoding_dsv4.py", "LICENSE",
    "README.md", "MODEL_CARD.md", "CREDITS.md",
]  # fmt: skip
_TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


@dataclass(frozen=True)
class _Target:
    """Formats of a checkpoint about to be written. `exact` keeps FP32 what BF16 cannot hold."""

    config: ModelConfig
    expert_format: WeightFormat
    dense_format: WeightFormat
    exact: bool

    def table(self) -> Iterator[TensorSpec]:
        return tensor_table(self.config, expert_format=self.expert_format, dense_format=self.dense_format)

    def format(self, spec: TensorSpec) -> WeightFormat:
        formats: dict[str, WeightFormat] = {"dense": self.dense_format, "expert": self.expert_format}
        return formats.get(spec.family, "bf16")


def save_model(model: Model, path: str | Path, *, quantize: Quantise = None) -> None:
    """Write `model` to directory `path` in the official layout.

    `quantize` "fp4" gives FP4 experts and FP8 dense matrices, "fp8" FP8 for both, everything else in its official type.
    Without it nothing is lost: weights from an FP4/FP8 checkpoint keep their format (and their bytes when unchanged),
    others are stored in BF16 where that is exact and in FP32 where not. Raises QuantError for weights not finite.
    """
    source = source_of(model)
    expert: WeightFormat = quantize or (source.expert_format if source else "bf16")
    dense: WeightFormat = "fp8" if quantize else (source.dense_format if source else "bf16")
    target = target_of(model.config, expert, dense, exact=quantize is None)

    def value(spec: TensorSpec) -> Weight:
        held = _held(model, spec)
        if source is None or isinstance(held, PackedWeight) or target.format(spec) == "bf16":
            return held
        stored = source.weight(spec) if target.format(spec) == _source_format(source, spec) else None
        return stored if isinstance(stored, PackedWeight) and _same_bits(stored, held) else held

    write_official(path, target, value, source)


def target_of(config: ModelConfig, expert: WeightFormat, dense: WeightFormat, *, exact: bool) -> _Target:
    """What to write; the configuration is brought in line with the formats."""
    if config.dense_format != dense:
        config = config.replace(quantization=dense == "fp8")
    if config.expert_format != expert:
        config = config.replace(expert_dtype=None if expert == "bf16" else expert)
    return _Target(config, expert, dense, exact)


def write_official(
    path: str | Path, target: _Target, value: Callable[[TensorSpec], Weight], source: Checkpoint | None
) -> None:
    """Write shards, index, config and the source's companion files; `value` gives the weight of every "weight" spec."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = [spec for spec in target.table() if spec.role == "weight"]
    stored = {spec.name: _stored_dtype(spec, target, value) for spec in weights if target.format(spec) == "bf16"}
    tensors = {spec.name: (spec.name, stored.get(spec.name, spec.dtype), spec.shape) for spec in target.table()}
    weight_map: dict[str, str] = {}
    total = 0
    for file, metadata, names, keep_order in _layout(target, tensors, source):
        inside = set(names)
        with FileWriter(path / file, [tensors[n] for n in names], metadata=metadata, sort=not keep_order) as writer:
            for spec in weights:
                if not inside.isdisjoint((spec.name, spec.scale_name)):  # shards may part a weight from its scale
                    for part, tensor in _encode(spec, target.format(spec), value(spec), stored.get(spec.name)):
                        if part in inside:
                            writer.write(part, tensor)
        weight_map |= dict.fromkeys(names, file)
        total += writer.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(path / INDEX_FILE, index, source.path / INDEX_FILE if source else None)
    if source and (source.path / "config.json").exists() and read_config(source.path) == target.config:
        _copy(source.path / "config.json", path / "config.json")
    else:
        _write_json(path / "config.json", target.config.to_dict(), None)
    copy_companions(source, path)


def write_hf(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's trunk in transformers' names and stacks, dequantised; the draft head has no place there."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = checkpoint.config.without_draft()
    places: dict[str, Place] = {}
    groups: dict[int, dict[str, tuple[str, str, tuple[int, ...]]]] = {}
    for spec in tensor_table(config, expert_format="bf16", dense_format="bf16"):
        place = places[spec.name] = hf_place(spec, config)
        dtype = checkpoint.entries[spec.name].dtype
        dtype = "I64" if spec.dtype == "I64" else "F32" if dtype == "F32" else "BF16"
        group = groups.setdefault(spec.group, {})
        earlier = group.get(place.name, (place.name, dtype, place.shape))[1]
        group[place.name] = (place.name, max(dtype, earlier), place.shape)  # one FP32 expert makes its stack FP32
    weight_map: dict[str, str] = {}
    total = 0
    weights = {spec.name: spec for spec in checkpoint.table if spec.role == "weight" and spec.name in places}
    for number, (group_index, tensors) in enumerate(groups.items(), 1):
        file = _file_name(number, len(groups))
        with FileWriter(path / file, tensors.values(), metadata={"format": "pt"}) as writer:
            for spec in (spec for spec in weights.values() if spec.group == group_index):
                place = places[spec.name]
                dense = _dense(checkpoint.weight(spec), _TORCH[tensors[place.name][1]], spec)
                writer.write(place.name, dense, place.element)
        weight_map |= dict.fromkeys(tensors, file)
        total += writer.nbytes
    _write_json(
        path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, None
    )
    _write_json(path / "config.json", hf_config(config), None)
    copy_companions(checkpoint, path)


def copy_companions(source: Checkpoint | None, path: Path) -> None:
    """Copy tokenizer, generation settings, prompt texts and card next to the weights, where the source has them."""
    for name in _COMPANIONS if source else []:
        assert source is not None
        if (source.path / name).exists():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(source.path / name, path / name)


def _layout(
    target: _Target, tensors: dict[str, tuple[str, str, tuple[int, ...]]], source: Checkpoint | None
) -> Iterator[tuple[str, dict[str, str] | None, list[str], bool]]:
    """Files to write: name, metadata, tensor names, whether their order is binding. The source's own, if it fits."""
    if source is not None:
        held = {e.name: (e.name, e.dtype, e.shape) for h in source.headers.values() for e in h.entries.values()}
        if held == tensors:
            for file, header in source.headers.items():
                yield file, header.metadata, list(header.entries), True
            return
    shards = shard_plan(target.table())
    for number, names in enumerate(shards, 1):
        yield _file_name(number, len(shards)), None, names, False


def _encode(spec: TensorSpec, form: WeightFormat, weight: Weight, dtype: str | None) -> list[tuple[str, Tensor]]:
    """A weight as the tensors that store it."""
    if form == "bf16":
        assert dtype is not None
        return [(spec.name, (weight.dense() if isinstance(weight, PackedWeight) else weight).to(_TORCH[dtype]))]
    packed = pack(weight, form)
    codes = packed.codes.view(torch.int8) if form == "fp4" else packed.codes
    return [(spec.name, codes), (spec.scale_name, packed.scales)]


def pack(weight: Weight, form: WeightFormat) -> PackedWeight:
    """The weight in a quantised format: as it is, losslessly from FP4 to FP8, else rounded."""
    if isinstance(weight, PackedWeight):
        if weight.format == form:
            return weight
        if form == "fp8":
            return fp4_to_fp8(weight)
        weight = weight.dense()
    return quantise_fp4(weight) if form == "fp4" else quantise_fp8(weight)


def _stored_dtype(spec: TensorSpec, target: _Target, value: Callable[[TensorSpec], Weight]) -> str:
    if spec.dtype != "BF16" or not target.exact:
        return spec.dtype
    weight = value(spec)
    values = weight.dense() if isinstance(weight, PackedWeight) else weight.detach()
    return "BF16" if _fits_bf16(values) else "F32"


def _fits_bf16(values: Tensor) -> bool:
    return values.dtype == torch.bfloat16 or torch.equal(values.bfloat16().float(), values)


def _dense(weight: Weight, dtype: torch.dtype, spec: TensorSpec) -> Tensor:
    values = weight.dense() if isinstance(weight, PackedWeight) else weight
    if dtype == torch.bfloat16 and not _fits_bf16(values):
        raise CheckpointError(
            f"tensor {spec.name} does not fit BF16 exactly; keep this checkpoint in the official layout"
        )
    return values.to(dtype)


def _held(model: Model, spec: TensorSpec) -> Weight:
    owner, _, name = spec.parameter.rpartition(".")
    held = getattr(model.get_submodule(owner), name)
    weight: Weight = held if spec.expert is None else held[spec.expert]
    return weight if isinstance(weight, PackedWeight) else weight.detach()


def _same_bits(stored: PackedWeight, held: Tensor) -> bool:
    expected = stored.dense(held.dtype)
    integer = torch.int16 if held.dtype == torch.bfloat16 else torch.int32
    return torch.equal(expected.view(integer), held.cpu().contiguous().view(integer))


def _source_format(source: Checkpoint, spec: TensorSpec) -> WeightFormat:
    return source.expert_format if spec.family == "expert" else source.dense_format


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_json(file: Path, content: dict[str, Any], like: Path | None) -> None:
    """Write JSON, with the formatting of `like` when that file holds the same content."""
    if like is not None and like.exists() and read_json(like) == content:
        _copy(like, file)
    else:
        file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and source.samefile(target)):
        shutil.copyfile(source, target)
