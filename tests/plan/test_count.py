from __future__ import annotations

import math

import pytest

from hadal.checkpoint import tensor_table
from hadal.config import PRESETS, preset
from hadal.plan import active_bytes, count


@pytest.mark.parametrize(
    ("name", "total", "active", "kv", "state"),
    [("flash", 284.33, 13.27, 3514.25, 15.42), ("pro", 1572.99, 48.85, 5031.4375, 23.27)],
)
def test_counts_equal_the_published_figures(name: str, total: float, active: float, kv: float, state: float) -> None:
    counted = count(preset(name))
    assert counted.parameters / 1e9 == pytest.approx(total, abs=0.01)
    assert counted.active_parameters / 1e9 == pytest.approx(active, abs=0.005)
    assert counted.kv_bytes_per_token == kv
    assert counted.state_bytes / 1e6 == pytest.approx(state, abs=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_elements_of_the_tensor_list(name: str) -> None:
    counted = count(preset(name))
    trunk = draft = 0
    for spec in tensor_table(preset(name), expert_format="bf16", dense_format="bf16"):
        if spec.dtype != "I64":
            if spec.name.startswith("mtp."):
                draft += math.prod(spec.shape)
            else:
                trunk += math.prod(spec.shape)
    assert (counted.parameters, counted.draft_parameters) == (trunk, draft)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("quantization", "expert_dtype"), [(True, "fp4"), (True, "fp8"), (False, None)])
def test_active_bytes_are_those_of_the_files_with_the_experts_share(
    name: str, quantization: bool, expert_dtype: str | None
) -> None:
    config = preset(name).replace(quantization=quantization, expert_dtype=expert_dtype)
    experts = other = 0
    for spec in tensor_table(config):
        if not spec.name.startswith(("mtp.", "embed.")) and spec.dtype != "I64":
            experts += spec.nbytes * (spec.family == "expert")
            other += spec.nbytes * (spec.family != "expert")
    share = config.num_experts_per_tok / config.n_routed_experts
    assert active_bytes(config) == pytest.approx(other + experts * share, rel=1e-12)
    assert active_bytes(config, 2) == pytest.approx(other + experts * (1 - (1 - share) ** 2), rel=1e-12)
    assert active_bytes(config, 10**6) == pytest.approx(other + experts, rel=1e-12)
