"""Small operators against definitions written out another way."""

import math

import pytest
import torch

from hadal.kernels import BACKENDS, KernelError, Numerics, kernel_table
from hadal.kernels.reference import dense, mhc, moe


def test_every_operator_has_a_reference_and_unknown_backends_are_refused():
    table = kernel_table("reference")
    assert set(table.operators()) >= {"attend", "linear", "routed_experts", "stream_maps"}
    assert all(path.startswith("hadal.kernels.reference.") for path in table.operators().values())
    assert kernel_table("auto").name in BACKENDS
    with pytest.raises(KernelError, match="reference"):
        kernel_table("gpu9")


def test_rotation_is_complex_multiplication_of_neighbouring_pairs():
    g = torch.Generator().manual_seed(0)
    x, angle = torch.randn(5, 2, 10, generator=g), torch.rand(5, 3, generator=g)
    out = dense.rotate(x, angle.cos(), angle.sin())
    for t in range(5):
        for h in range(2):
            for pair in range(3):
                z = complex(x[t, h, 4 + 2 * pair], x[t, h, 5 + 2 * pair]) * complex(
                    math.cos(angle[t, pair]), math.sin(angle[t, pair])
                )
                assert abs(complex(out[t, h, 4 + 2 * pair], out[t, h, 5 + 2 * pair]) - z) < 1e-6
    assert torch.equal(out[..., :4], x[..., :4])
    torch.testing.assert_close(dense.rotate(out, angle.cos(), angle.sin(), inverse=True), x)


def test_hadamard_is_its_own_inverse_and_keeps_length():
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    y = dense.hadamard(x)
    torch.testing.assert_close(dense.hadamard(y), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_sinkhorn_ends_on_columns_and_is_nearly_doubly_stochastic():
    c = mhc.sinkhorn(torch.randn(9, 4, 4, generator=torch.Generator().manual_seed(2)), 20, 1e-6)
    assert float((c.sum(1) - 1).abs().max()) < 1e-5  # columns: over j, the first index
    assert float((c.sum(2) - 1).abs().max()) < 1e-2


def test_streams_are_contracted_over_the_first_index_of_comb():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 4, 8, generator=g), torch.randn(2, 8, generator=g)
    post, comb = torch.rand(2, 4, generator=g), torch.rand(2, 4, 4, generator=g)
    out = mhc.mix_out(x, y, post, comb)
    for t in range(2):
        for k in range(4):
            want = post[t, k] * y[t] + sum(comb[t, j, k] * x[t, j] for j in range(4))
            torch.testing.assert_close(out[t, k], want)


def test_experts_accumulate_when_a_token_names_one_twice():
    """Hash tables may list an expert twice; its output then counts twice."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(3, 8, generator=g)
    w1, w2, w3 = torch.randn(4, 6, 8, generator=g), torch.randn(4, 8, 6, generator=g), torch.randn(4, 6, 8, generator=g)
    ids, weights = torch.tensor([[1, 1], [0, 3], [2, 1]]), torch.rand(3, 2, generator=g)
    out = moe.routed_experts(x, ids, weights, w1, w2, w3, Numerics(), 0.5)
    for t in range(3):
        want = torch.zeros(8)
        for k in range(2):
            e = int(ids[t, k])
            gate, up = (w1[e] @ x[t]).clamp(max=0.5), (w3[e] @ x[t]).clamp(-0.5, 0.5)
            want += w2[e] @ (gate * torch.sigmoid(gate) * up * weights[t, k])
        torch.testing.assert_close(out[t], want, atol=1e-5, rtol=1e-4)


def test_expert_choice_breaks_ties_by_the_lower_index_and_weights_ignore_the_bias():
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0]])
    bias = torch.tensor([1.0, 0.0, 0.0, 1.0])
    ids = moe.choose_experts(scores, bias, 3)
    assert ids.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(moe.routing_weights(scores, ids, 1.5), torch.tensor([[0.3, 0.6, 0.6]]))


def test_an_affinity_that_underflows_leaves_finite_gradients():
    weight = torch.tensor([[1.0], [-120.0]], requires_grad=True)
    scores = moe.affinities(torch.tensor([[1.0]]), weight)
    moe.routing_weights(scores, torch.tensor([[0]]), 1.0).sum().backward()
    assert torch.isfinite(weight.grad).all()
