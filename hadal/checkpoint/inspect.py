"""inspect: what a checkpoint is, from headers, an index or a configuration alone; behind `hadal inspect`."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hadal.checkpoint.load import locate_model
from hadal.checkpoint.names import DRAFT_PREFIX, EXPERT_PROBE, TensorSpec, shard_plan, tensor_table
from hadal.checkpoint.safetensors import CheckpointError
from hadal.checkpoint.source import INDEX_FILE, open_checkpoint, parse_config, read_config, read_index, read_json
from hadal.config import PRESETS, ModelConfig, preset
from hadal.plan import count

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Inspection:
    """The facts about a checkpoint; None where the given file does not tell.

    Parameters leave the draft head out. `dtypes` counts tensors by stored type. `release` names the published model
    with exactly these tensors and bytes.
    """

    source: str  # "headers", "index" or "config"
    release: str | None
    layers: dict[str, int]  # by kind: swa, csa, hca
    hash_layers: int
    draft: str | None
    draft_stages: int
    expert_format: str | None
    dense_format: str | None
    tensors: int
    shards: int
    dtypes: dict[str, int] | None
    bytes: int | None
    parameters: int | None
    active_parameters: int | None
    draft_parameters: int | None
    kv_bytes_per_token: float | None
    state_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def inspect(path: str | Path) -> Inspection:
    """Describe a model directory, a Hub repository, "nano", or a bare index.json or config.json, reading no weight.

    A directory's headers are checked as `load_model` checks them. Raises CheckpointError or ConfigError.
    """
    file = Path(path)
    if file.is_file():
        raw = read_json(file)
        if "weight_map" in raw:
            return _from_index(file, raw)
        return _from_config(parse_config(raw, file))
    directory = locate_model(path)
    if not any(directory.glob("*.safetensors")):
        if (directory / INDEX_FILE).exists():
            return _from_index(directory / INDEX_FILE, read_json(directory / INDEX_FILE))
        return _from_config(read_config(directory))
    checkpoint = open_checkpoint(directory)
    stored = [entry for header in checkpoint.headers.values() for entry in header.entries.values()]
    formats = (checkpoint.expert_format, checkpoint.dense_format)
    dtypes = dict(Counter(entry.dtype for entry in stored))
    nbytes = sum(entry.nbytes for entry in stored)
    return _describe("headers", checkpoint.config, formats, len(stored), len(checkpoint.headers), dtypes, nbytes)


def _from_config(config: ModelConfig) -> Inspection:
    table = _table(config)
    formats = (config.expert_format, config.dense_format)
    dtypes = dict(Counter(spec.dtype for spec in table))
    return _describe("config", config, formats, len(table), len(shard_plan(table)), dtypes, _total(table))


def _from_index(file: Path, raw: dict[str, Any]) -> Inspection:
    weight_map = read_index(file)
    metadata = {} if raw.get("metadata") is None else raw["metadata"]
    nbytes = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(nbytes, int | None):
        raise CheckpointError(f"{file} gives its `metadata` as {metadata!r:.80}; it must hold `total_size` in bytes")
    shards = len(set(weight_map.values()))
    config = read_config(file.parent) if (file.parent / "config.json").exists() else _published(weight_map, nbytes)
    if config is not None:
        table = _table(config)
        formats = (config.expert_format, config.dense_format)
        if {spec.name for spec in table} == weight_map.keys() and _total(table) == nbytes:
            dtypes = dict(Counter(spec.dtype for spec in table))
            return _describe("index", config, formats, len(table), shards, dtypes, nbytes)
    return _from_names(weight_map, shards, nbytes)


def _from_names(names: Iterable[str], shards: int, nbytes: int | None) -> Inspection:
    """Only what tensor names tell."""
    names = set(names)
    layers = {match[1] for name in names if (match := _LAYER.match(name))}
    if not layers or EXPERT_PROBE not in names:
        raise CheckpointError(f"the index does not list {EXPERT_PROBE}; it is no official V4 index")
    kinds = Counter(_kind(names, layer) for layer in layers)
    stages = {name.split(".")[1] for name in names if name.startswith(DRAFT_PREFIX)}
    draft = "dspark" if f"{DRAFT_PREFIX}0.main_norm.weight" in names else "mtp" if stages else "none"
    hashed = sum(f"layers.{layer}.ffn.gate.tid2eid" in names for layer in layers)
    return Inspection(
        source="index", release=None, layers={kind: kinds[kind] for kind in ("swa", "csa", "hca")}, hash_layers=hashed,
        draft=draft, draft_stages=len(stages), expert_format=None, dense_format=None, tensors=len(names), shards=shards,
        dtypes=None, bytes=nbytes, parameters=None, active_parameters=None, draft_parameters=None,
        kv_bytes_per_token=None, state_bytes=None,
    )  # fmt: skip


def _kind(names: set[str], layer: str) -> str:
    prefix = f"layers.{layer}.attn."
    if f"{prefix}indexer.wq_b.weight" in names:
        return "csa"
    return "hca" if f"{prefix}compressor.wkv.weight" in names else "swa"


def _describe(
    source: str,
    config: ModelConfig,
    formats: tuple[str, str],
    tensors: int,
    shards: int,
    dtypes: dict[str, int],
    nbytes: int,
) -> Inspection:
    kinds = Counter(layer.attention for layer in config.layers)
    counted = count(config)
    return Inspection(
        source=source, release=_release(config, nbytes), layers={kind: kinds[kind] for kind in ("swa", "csa", "hca")},
        hash_layers=config.num_hash_layers, draft=config.draft, draft_stages=config.draft_stages,
        expert_format=formats[0], dense_format=formats[1], tensors=tensors, shards=shards,
        dtypes=dict(sorted(dtypes.items())), bytes=nbytes,
        **dataclasses.asdict(counted),
    )  # fmt: skip


def _release(config: ModelConfig, nbytes: int) -> str | None:
    for name in PRESETS:
        if preset(name).compress_ratios == config.compress_ratios and _total(_table(preset(name))) == nbytes:
            return name
    return None


def _published(weight_map: dict[str, str], nbytes: int | None) -> ModelConfig | None:
    layers = len({match[1] for name in weight_map if (match := _LAYER.match(name))})
    for name in PRESETS:
        if preset(name).num_hidden_layers != layers:
            continue
        table = _table(preset(name))
        if len(table) == len(weight_map) and _total(table) == nbytes and all(s.name in weight_map for s in table):
            return preset(name)
    return None


@lru_cache(maxsize=1)  # that of a released model takes half a second, and one description asks several times
def _table(config: ModelConfig) -> tuple[TensorSpec, ...]:
    return tuple(tensor_table(config))


def _total(table: Iterable[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in table)
