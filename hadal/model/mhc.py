"""HyperConnection: the parameters with which one site reads from and writes to the N residual streams.

Source: report 2.2, spec architecture 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hadal.config import ModelConfig
from hadal.kernels import KernelTable


class HyperConnection(nn.Module):
    """Mixing maps of one site; rows of `fn` are N pre, N post, N*N comb."""

    def __init__(self, config: ModelConfig, ops: KernelTable) -> None:
        super().__init__()
        n = config.hc_mult
        self.fn = nn.Parameter(torch.empty((2 + n) * n, n * config.hidden_size))
        self.base = nn.Parameter(torch.empty((2 + n) * n))
        self.scale = nn.Parameter(torch.empty(3))
        self._config, self._ops = config, ops

    def maps(self, x_TND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre [T, N], post [T, N] and comb [T, N, N] for the current streams."""
        c = self._config
        pre, post, comb = self._ops.stream_maps(
            x_TND, self.fn, self.base, self.scale,
            iterations=c.hc_sinkhorn_iters, eps=c.hc_eps, norm_eps=c.rms_norm_eps,
        )  # fmt: skip
        return pre, post, comb


class StreamCollapse(nn.Module):
    """Collapses the streams to one hidden state before a head."""

    def __init__(self, config: ModelConfig, ops: KernelTable) -> None:
        super().__init__()
        self.fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.empty(config.hc_mult))
        self.scale = nn.Parameter(torch.empty(1))
        self._config, self._ops = config, ops

    def forward(self, x_TND: Tensor) -> Tensor:
        """[T, N, d] -> [T, d]."""
        c = self._config
        weights = self._ops.collapse_map(
            x_TND, self.fn, self.base, self.scale, eps=c.hc_eps, norm_eps=c.rms_norm_eps
        )  # fmt: skip
        out: Tensor = self._ops.mix_in(x_TND, weights)
        return out
