"""load_model: from a directory, a Hub repository or the embedded model to a `Model` whose weights lie in mapped files.

Nothing in a checkpoint is executed; files are read as configuration, headers and numbers only.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hadal import device as devices
from hadal.checkpoint.names import TensorSpec
from hadal.checkpoint.safetensors import CheckpointError, MappedFiles
from hadal.checkpoint.source import Checkpoint, open_checkpoint
from hadal.kernels import KernelTable
from hadal.kernels.cpu import unsupported
from hadal.kernels.cpu.pack import PackError
from hadal.kernels.cpu.target import detect
from hadal.model import Model, Numerics
from hadal.model.runner import build_runner
from hadal.quant import PackedWeight

EMBEDDED = "nano"
# What a Hub download may fetch: data only, and of the repository's Python only the file whose prompt texts are parsed.
HUB_PATTERNS = [
    "config.json", "inference/config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "encoding/encoding_dsv4.py",
]  # fmt: skip
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Unquantised parameters used in the carrier's type; all others (norms, gate, mHC, compressor, head) compute in FP32.
_CARRIED = ("embed", "weights_proj", "markov_w1", "markov_w2", "confidence")

Value = Tensor | PackedWeight | Sequence[Tensor | PackedWeight]

_sources: WeakKeyDictionary[nn.Module, Checkpoint] = WeakKeyDictionary()


def locate_model(name: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model: "nano" (embedded), a path, or a Hub repository id, which is downloaded if need be.

    What is downloaded has `weights` or not.
    """
    if str(name) == EMBEDDED:
        return Path(str(importlib.resources.files("hadal").joinpath("assets", EMBEDDED)))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the shards")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise CheckpointError(
            f"no model {str(name)!r}: neither a directory, nor owner/name of a Hub repository, nor 'nano'"
        )
    return _download(str(name), weights)


def load_model(
    path_or_repo_or_name: str | Path = EMBEDDED,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    fake_quant: bool | Literal["auto"] = "auto",
    backend: str | KernelTable = "auto",
    weights: Literal["auto", "packed", "dense"] = "auto",
    expert_memory: int | None = None,
) -> Model:
    """Load a model; every header is checked before a weight is read, and each weight is read once, layer by layer.

    `dtype` "auto" is the device's fast carrier (float32 on a CPU, bfloat16 elsewhere); `fake_quant` "auto" is True for
    bfloat16. float32 + False computes the exact architecture, float32 + True adds the official quantisers, bfloat16 +
    True rounds exactly where the official code does; "auto" for both on a CPU is `fast`, with BF16 products and an int8
    indexer. `weights` "packed" keeps FP4/FP8 as they lie in the file, "dense" expands them to `dtype`, which training
    needs.

    On a CPU `dtype` "auto" and "bfloat16" run on emitted kernels, the whole model or the operators of the kernel table
    `cpu`; float32 has none. `backend` "auto" takes them where they exist (`hadal.kernels.cpu.unsupported` says why
    not), keeps weights packed for them and leaves them out for dense ones; "cpu" takes them or raises; "reference" and
    "fused" ask for plain torch, which expands weights where that takes less than half of the device's free memory.
    Where emitted kernels run the whole model its parameters are read-only, and of the routed experts no more than
    `expert_memory` bytes are held in memory (None: as many as fit), the others stay on disk.
    Raises CheckpointError, ConfigError or DeviceError, one sentence each.
    """
    target = devices.resolve(device)
    carrier = _carrier(dtype, target)
    if fake_quant not in (True, False, "auto"):
        raise CheckpointError(f"fake_quant is {fake_quant!r}; choose True, False or 'auto'")
    if weights not in ("auto", "packed", "dense"):
        raise CheckpointError(f"weights is {weights!r}; choose 'auto', 'packed' or 'dense'")
    checkpoint = open_checkpoint(locate_model(path_or_repo_or_name))
    kernels = _emitted_kernels(checkpoint, target, dtype, carrier, fake_quant, backend, weights)
    if kernels == "runner":
        checkpoint = dataclasses.replace(checkpoint, files=MappedFiles(writable=False))
    elif expert_memory is not None:
        raise CheckpointError("expert_memory is for models that emitted CPU kernels run as a whole; leave it out here")
    numerics = Numerics(
        dtype=carrier,
        fake_quant=carrier == torch.bfloat16 if fake_quant == "auto" else fake_quant,
        quantised_dense=checkpoint.dense_format != "bf16",
        quantised_experts=checkpoint.expert_format != "bf16",
    )
    if weights == "auto":
        roomy = kernels is None and _dense_bytes(checkpoint, carrier) < devices.memory_available(target) / 2
        weights = "dense" if roomy else "packed"
    with torch.device("meta"):
        model = Model(checkpoint.config, numerics, {"runner": "auto", "table": "cpu"}[kernels] if kernels else backend)
    for parameter, specs in checkpoint.by_parameter():
        stored = kernels == "runner" and not (checkpoint.config.draft == "dspark" and parameter.startswith("draft"))
        packed = stored or weights == "packed"
        value = _value(checkpoint, specs, None if stored else carrier, target, packed=packed)
        place_parameter(model, parameter, value)
    unfilled = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not unfilled, f"parameters without a tensor: {unfilled[:3]}"
    _sources[model] = checkpoint
    model.identity = checkpoint.identity()
    if kernels == "runner":
        try:
            model.runner = build_runner(model, model.identity, expert_memory, checkpoint.files.forget)
        except PackError as error:
            if backend == "cpu" or expert_memory is not None:
                raise _without_kernels(error) from error
            return load_model(checkpoint.path, device, dtype, fake_quant, "fused")
    return model


def _emitted_kernels(
    checkpoint: Checkpoint, device: torch.device, dtype: str | torch.dtype, carrier: torch.dtype,
    fake_quant: bool | Literal["auto"], backend: str | KernelTable, weights: str,
) -> Literal["runner", "table"] | None:  # fmt: skip
    """Which emitted kernels run a model; CheckpointError when they are asked for and cannot."""
    if backend not in ("auto", "cpu"):
        return None
    form: Literal["runner", "table"] = "table" if carrier == torch.bfloat16 else "runner"
    reason = None
    if device.type != "cpu":
        reason = f"its device is '{device}'"
    elif form == "table":
        reason = detect()[1] if detect()[0] is None else None
    elif dtype != "auto" or fake_quant is True:
        reason = "float32 has none; leave dtype and fake_quant at 'auto' or choose 'bfloat16'"
    else:
        reason = unsupported(checkpoint.config) or _stored_wide(checkpoint)
    if weights == "dense" and (form == "runner" or backend == "auto"):
        reason = reason or "weights is 'dense'"
    if reason is not None and backend == "cpu":
        raise _without_kernels(reason)
    return form if reason is None else None


def _without_kernels(reason: object) -> CheckpointError:
    return CheckpointError(f"the emitted CPU kernels cannot run this model: {reason}; use backend 'reference'")


def _stored_wide(checkpoint: Checkpoint) -> str | None:
    """Why the products of a runner cannot take a checkpoint's weights."""
    wide = next((s.name for s in checkpoint.table if checkpoint.entries[s.name].dtype == "F32" != s.dtype), None)
    return None if wide is None else f"{wide} is stored in FP32, and their products take BF16"


def source_of(model: Model) -> Checkpoint | None:
    """The checkpoint a model was loaded from, if any."""
    return _sources.get(model)


def place_parameter(model: nn.Module, path: str, value: Value) -> None:
    """Put a value in the place of the parameter or buffer at an attribute path; shapes must agree."""
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    current = getattr(owner, name)
    assert isinstance(current, Tensor), path
    if isinstance(value, Tensor):
        assert value.shape == current.shape, (path, value.shape, current.shape)
        is_parameter = isinstance(current, nn.Parameter)
        setattr(owner, name, nn.Parameter(value, current.requires_grad) if is_parameter else value)
        return
    shape = value.shape if isinstance(value, PackedWeight) else (len(value), *value[0].shape)
    assert shape == current.shape, (path, shape, current.shape)
    delattr(owner, name)
    setattr(owner, name, value)


def carried_dtype(spec: TensorSpec, carrier: torch.dtype) -> torch.dtype:
    """The dtype in which a loaded model holds an unpacked weight."""
    if spec.dtype == "I64":
        return torch.int64
    carried = spec.family != "plain" or spec.parameter.rpartition(".")[2] in _CARRIED
    return carrier if carried else torch.float32


def _value(
    checkpoint: Checkpoint, specs: list[TensorSpec], carrier: torch.dtype | None, device: torch.device, *, packed: bool
) -> Value:
    """What fills a parameter; without a `carrier` unpacked weights stay in the type they are stored in."""
    # What the kernels take is checked when it is packed: a start with packed weights reads none of these.
    stored = (checkpoint.weight(spec, check_scales=carrier is not None) for spec in specs)
    if packed and specs[0].dtype in ("I8", "F8_E4M3"):
        kept = [weight.to(device) for weight in stored if isinstance(weight, PackedWeight)]
        return kept[0] if specs[0].expert is None else kept
    dtype = _STORED[specs[0].dtype] if carrier is None else carried_dtype(specs[0], carrier)
    if specs[0].expert is None:
        return _expand(next(stored), dtype).to(device)
    if carrier is None:
        return [weight for weight in stored if isinstance(weight, Tensor)]
    stack = torch.empty(len(specs), *specs[0].matrix_shape, dtype=dtype, device=device)
    for row, weight in zip(stack, stored, strict=True):
        row.copy_(_expand(weight, dtype))
    return stack


def _expand(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    return weight.dense(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)


def _dense_bytes(checkpoint: Checkpoint, carrier: torch.dtype) -> int:
    total = 0
    for spec in checkpoint.table:
        if spec.role == "weight":
            shape = spec.shape if spec.family == "plain" else spec.matrix_shape
            total += math.prod(shape) * carried_dtype(spec, carrier).itemsize
    return total


def _carrier(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return devices.fast_dtype(device)
    carrier = _DTYPES.get(str(dtype).removeprefix("torch."))
    if carrier is None:
        raise CheckpointError(f"dtype is {dtype!r}; choose 'float32', 'bfloat16' or 'auto'")
    return carrier


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _download(repository: str, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = [pattern for pattern in HUB_PATTERNS if weights or "safetensors" not in pattern]
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{repository!r} is no directory here and could not be fetched from the Hub ({reason}); check the name, "
            "the network and access rights"
        ) from error
