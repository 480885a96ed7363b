"""attention_varlen beyond what every op is asked: packs against sequences alone, bounds, errors."""

import pytest
import torch

from rlhf_kernels import attention, attention_varlen, backend, rotary_tables
from rlhf_kernels.ops.attention import kernel_triton

LENGTHS = (3, 0, 33)


def _packed(lengths=LENGTHS, behind=0, dtype=torch.float32, heads=2, groups=1, size=32):
    rows = sum(lengths) + behind
    q, k, v = (torch.randn(rows, n, size).to(dtype).requires_grad_() for n in (heads, groups, groups))
    return q, k, v, torch.tensor((0, *lengths)).cumsum(0).int()


def _results(out, lse, leaves):
    total = out.square().sum() + lse.nan_to_num(0, 0, 0).sum()
    return out, lse, *torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_sequences_are_those_of_attention(name):
    """To the bit with Triton: a sequence does not see how it is packed."""
    q, k, v, bounds = _packed()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    tables = rotary_tables(positions, 32)
    with backend(name):
        options = {"causal": True, "window": 25, "return_lse": True}
        packed = _results(*attention_varlen(q, k, v, bounds, rotary=tables, **options), (q, k, v))
        for start, end in zip(bounds.tolist(), bounds.tolist()[1:]):
            own = [x.detach()[start:end].transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
            own_tables = rotary_tables(torch.arange(end - start), 32)
            out, lse, *gradients = _results(*attention(*own, rotary=own_tables, **options), own)
            pairs = [(packed[0][start:end].transpose(0, 1), out), (packed[1][:, start:end], lse)]
            pairs += [(p[start:end].transpose(0, 1), g) for p, g in zip(packed[2:], gradients)]
            for got, want in pairs:
                if name == "triton":
                    assert torch.equal(got, want[0])
                else:
                    torch.testing.assert_close(got, want[0], rtol=1e-5, atol=1e-5)


def test_plan_of_more_sequences_than_a_block():
    lengths = torch.randint(0, 90, (700,))
    lengths[::3] = 0
    bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    rows = int(bounds[-1]) + 50
    plan = kernel_triton._plan(bounds, rows, 16)
    assert plan[0].tolist() == [*bounds.tolist(), rows]
    tiles = torch.cat((lengths, torch.tensor([50]))).add(15).div(16, rounding_mode="floor").cumsum(0)
    assert plan[1].tolist() == [0, *tiles.tolist()]


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_rows_behind_the_last_sequence_are_zero(name):
    q, k, v, bounds = _packed(behind=37)
    with torch.no_grad():
        k[-37:], v[-37:] = torch.nan, torch.nan
    with backend(name):
        out, lse, *gradients = _results(*attention_varlen(q, k, v, bounds, return_lse=True), (q, k, v))
    assert lse[:, -37:].isneginf().all()
    for x in (out, *gradients):
        assert x.isfinite().all()
        assert (x[-37:] == 0).all()
        assert not (x[:33] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": torch.zeros(1, 2, 8, 32)}, ValueError, r"q must be \[N, H, D\]"),
        ({"k": torch.zeros(9, 1, 32), "v": torch.zeros(9, 1, 32)}, ValueError, "Pass cu_seqlens_k"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, TypeError, "int32 or int64"),
        ({"cu_seqlens": [0, 8]}, TypeError, "got list"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "rise from 0 to at most 8"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, ValueError, "rise from 0"),
        ({"cu_seqlens": torch.tensor([1, 8])}, ValueError, "rise from 0"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 8])}, ValueError, "in 1 sequences"),
        ({"rotary": rotary_tables(torch.zeros(2, 8), 32)}, ValueError, r"tables of q must be \[rows, D/2\]"),
    ],
)
def test_what_is_refused(change, error, match):
    args = {"q": torch.zeros(8, 2, 32), "k": torch.zeros(8, 1, 32), "v": torch.zeros(8, 1, 32)}
    with pytest.raises(error, match=match):
        attention_varlen(**args | {"cu_seqlens": torch.tensor([0, 8])} | change)


def test_a_batch_is_mapped_over_at_the_same_bounds():
    q, bounds = torch.randn(2, 5, 1, 8), torch.tensor([0, 3, 5])
    found = torch.func.vmap(lambda x: attention_varlen(x, x, x, bounds))(q)
    torch.testing.assert_close(found[1], attention_varlen(q[1], q[1], q[1], bounds))
