"""convert: rewrite a checkpoint tensor by tensor, without building a model; behind `hadal convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hadal.checkpoint.load import locate_model
from hadal.checkpoint.safetensors import CheckpointError
from hadal.checkpoint.save import Quantise, target_of, write_hf, write_official
from hadal.checkpoint.source import open_checkpoint
from hadal.config import WeightFormat


def convert(
    src: str | Path, dst: str | Path, quantize: Quantise = None, *, names: Literal["official", "hf"] = "official"
) -> None:
    """Rewrite `src` (official or Hugging Face names; BF16, FP32, FP8 or FP4) as directory `dst`.

    `quantize` "fp4": FP4 experts and FP8 dense matrices; "fp8": FP8 for both, lossless from FP4 experts; None keeps
    every value. `names` "hf" writes the dequantised trunk for transformers and leaves the draft head out.
    Raises CheckpointError or QuantError.
    """
    if quantize not in (None, "fp4", "fp8"):
        raise CheckpointError(f"quantize is {quantize!r}; choose 'fp4', 'fp8' or leave it out")
    if names not in ("official", "hf"):
        raise CheckpointError(f"names is {names!r}; choose 'official' or 'hf'")
    source = open_checkpoint(locate_model(src))
    if Path(dst).exists() and source.path.samefile(dst):
        raise CheckpointError(f"{dst} is the source itself; convert into another directory")
    if names == "hf":
        if quantize:
            raise CheckpointError("transformers' names go with unquantised weights here; leave `quantize` out")
        write_hf(dst, source)
        return
    expert: WeightFormat = quantize or source.expert_format
    dense: WeightFormat = "fp8" if quantize else source.dense_format
    stored = {spec.name: spec for spec in source.table}
    target = target_of(source.config, expert, dense, exact=quantize is None)
    write_official(dst, target, lambda spec: source.weight(stored[spec.name]), source)
