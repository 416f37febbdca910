"""Random initial weights for training from scratch.

The report leaves the initialisation of mHC open; here every block starts close to a plain residual: each site reads the
mean of the streams, writes its output to all of them with weight one, and leaves the streams unmixed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hadal.model.mhc import HyperConnection, StreamCollapse
from hadal.model.moe import Gate

if TYPE_CHECKING:
    from hadal.model.transformer import Model

KEEP = 4.0  # logit advantage of a stream's own value over each other stream in the initial comb
GATE_SCALE = 0.01  # the input-dependent part of the mixing maps starts small (report 2.2)


@torch.no_grad()
def init_weights(model: Model, generator: torch.Generator | None = None) -> None:
    """Fill every parameter and buffer of the model; matrices get unit-variance outputs, residual writers less."""
    depth = len(model.layers) + len(model.draft)
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            parameter.fill_(1.0)
        elif name.endswith(("attn_sink", ".ape", ".base")):
            parameter.zero_()
        elif name.endswith(".scale"):
            parameter.fill_(GATE_SCALE)
        elif name == "embed":
            _normal(parameter, 0.02, generator)
        else:
            std = parameter.shape[-1] ** -0.5
            if name.endswith(("wo_b", "w2")):
                std /= math.sqrt(2 * depth)
            _normal(parameter, 0.5 * std if name == "head" else std, generator)
    for module in model.modules():
        _init_module(module, generator)


def _init_module(module: nn.Module, generator: torch.Generator | None) -> None:
    if isinstance(module, StreamCollapse):
        module.base.fill_(math.log(1 / (len(module.base) - 1)))  # sigmoid = 1/N: the mean of the streams
    elif isinstance(module, HyperConnection):
        n = math.isqrt(len(module.base) + 1) - 1  # (2 + n) n rows
        module.base[:n] = math.log(1 / (n - 1))
        module.base[2 * n :] = (KEEP * torch.eye(n, device=module.base.device)).flatten()
    elif isinstance(module, Gate):
        if hasattr(module, "tid2eid"):
            _fill_hash_table(module.tid2eid, module.weight.shape[0], generator)
        else:
            module.bias.zero_()


def _fill_hash_table(table_VK: Tensor, experts: int, generator: torch.Generator | None) -> None:
    """Distinct random experts per token id."""
    order = torch.rand(table_VK.shape[0], experts, generator=generator).argsort(-1)
    table_VK.copy_(order[:, : table_VK.shape[1]])


def _normal(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
