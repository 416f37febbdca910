"""Published formulas and counts, computed here by other means than the code they judge.

Source of the numbers: V4 report and release records (spec architecture 1, 2.3, 6, 8).
"""

from __future__ import annotations

import math

import torch

from hadal.checkpoint import tensor_table
from hadal.config import preset
from hadal.kernels.reference.compress import select_topk
from hadal.kernels.reference.dense import hadamard
from hadal.kernels.reference.mhc import sinkhorn
from hadal.model.rope import frequencies
from hadal.plan.count import count
from hadal.quant import fake_quant_fp4, fake_quant_fp8
from hadal.verify.report import Check, within, worst

GROUP = "formulas"
PUBLISHED_TENSORS = {
    "flash": (69187, 159609485896),
    "flash-0731": (72317, 166878536440),
    "pro-0813": (149782, 892727580904),
}
PUBLISHED_BILLIONS = {"flash": (284.33, 13.27), "pro": (1572.99, 48.85)}
KV_BYTES = {"flash": 3514.25, "pro": 5031.4375}


def check_formulas() -> list[Check]:
    """Counts of the full-size releases and the small formulas every layer depends on."""
    return [*_counts(), _yarn(), _hadamard(), _sinkhorn(), _topk_ties(), _fp8_grid(), _fp4_grid()]


def _counts() -> list[Check]:
    checks = []
    for name, (tensors, nbytes) in PUBLISHED_TENSORS.items():
        table = list(tensor_table(preset(name)))
        checks.append(within(GROUP, f"{name} tensors", abs(len(table) - tensors), 0, f"{tensors:,} published"))
        missing = abs(sum(spec.nbytes for spec in table) - nbytes)
        checks.append(within(GROUP, f"{name} bytes", missing, 0, f"{nbytes:,} published"))
    for name, (total, active) in PUBLISHED_BILLIONS.items():
        found = count(preset(name))
        gap = worst((abs(found.parameters / 1e9 - total), abs(found.active_parameters / 1e9 - active)))
        checks.append(within(GROUP, f"{name} parameters", gap, 0.01, f"{total} B, {active} B active published"))
        kv = abs(found.kv_bytes_per_token - KV_BYTES[name])
        checks.append(within(GROUP, f"{name} KV bytes per token", kv, 0, f"{KV_BYTES[name]} from the deployed layout"))
    return checks


def _yarn() -> Check:
    """Frequencies below the ramp (k <= 15) keep the base, those above it (k >= 25) are divided by 16."""
    config = preset("flash")
    found = frequencies(config, config.layers[2]).double()
    gaps = []
    for k in range(32):
        base = 160000.0 ** (-2 * k / 64)
        ramp = min(max((k - 15) / (25 - 15), 0.0), 1.0)
        gaps.append(abs(float(found[k]) / (base / 16 * ramp + base * (1 - ramp)) - 1))
    return within(GROUP, "YaRN frequencies", worst(gaps), 1e-6)


def _hadamard() -> Check:
    """Against the sign definition: entry (i, j) is -1 to the number of common bits, over sqrt(128)."""
    signs = [[(-1.0) ** (i & j).bit_count() / math.sqrt(128) for j in range(128)] for i in range(128)]
    gap = hadamard(torch.eye(128)).double() - torch.tensor(signs, dtype=torch.float64)
    return within(GROUP, "Hadamard", float(gap.abs().max()), 1e-6)


def _sinkhorn() -> Check:
    """Against scalar loops: row softmax, column step, then (row, column) 19 times."""
    logits = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(1))
    found = sinkhorn(logits, 20, 1e-6)
    gaps = []
    for case in range(5):
        c = [[math.exp(float(v)) for v in row] for row in logits[case]]
        c = [[v / sum(row) + 1e-6 for v in row] for row in c]
        for step in range(39):
            if step % 2:
                c = [[v / (sum(row) + 1e-6) for v in row] for row in c]
            else:
                sums = [sum(c[j][k] for j in range(4)) + 1e-6 for k in range(4)]
                c = [[c[j][k] / sums[k] for k in range(4)] for j in range(4)]
        gaps += [abs(float(found[case, j, k]) - c[j][k]) for j in range(4) for k in range(4)]
    return within(GROUP, "Sinkhorn", worst(gaps), 1e-6)


def _topk_ties() -> Check:
    """Against Python's stable sort, on scores that are mostly ties."""
    scores = torch.randint(0, 3, (64, 40), generator=torch.Generator().manual_seed(2)).float()
    chosen = select_topk(scores, 16)
    wrong = 0
    for row, values in enumerate(scores.tolist()):
        best = sorted(range(40), key=lambda j: -values[j])[:16]
        wrong += set(best) != set(chosen[row].nonzero().flatten().tolist())
    return within(GROUP, "top-k ties to the lower index", wrong, 0)


def _fp8_grid() -> Check:
    """Every finite E4M3 value is a fixed point of the FP8 quantiser once the group holds the largest one."""
    grid = torch.tensor([(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)])
    groups = torch.cat((grid.view(-1, 7), torch.full((len(grid) // 7, 1), 448.0)), dim=1)
    return within(GROUP, "E4M3 grid", float((fake_quant_fp8(groups, 8) - groups).abs().max()), 0)


def _fp4_grid() -> Check:
    """Ties round to the even code: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4."""
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]])
    wanted = torch.tensor([[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]])
    return within(GROUP, "E2M1 ties", float((fake_quant_fp4(x, 8) - wanted).abs().max()), 0)
