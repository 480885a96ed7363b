"""attention_prefix beyond what every op is asked: a prefix beside each row, rows that see nothing, errors."""

import pytest
import torch

from rlhf_kernels import attention, attention_prefix, backend, rotary_tables


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_prefix_is_read_as_if_it_stood_in_every_row(name):
    q = torch.randn(4, 2, 6, 32, requires_grad=True)
    k, v = (torch.randn(4, 1, 9, 32, requires_grad=True) for _ in "kv")
    prefix_k, prefix_v = (torch.randn(2, 1, 20, 32, requires_grad=True) for _ in "kv")
    leaves = (q, k, v, prefix_k, prefix_v)
    with backend(name):
        out, lse = attention_prefix(*leaves, return_lse=True)
        keys, values = (torch.cat((p[[0, 0, 1, 1]], own), 2) for p, own in ((prefix_k, k), (prefix_v, v)))
        joint, joint_lse = attention(q, keys, values, causal=True, return_lse=True)
        torch.testing.assert_close((out, lse), (joint, joint_lse), rtol=1e-5, atol=1e-5)
        got, want = (
            torch.autograd.grad(o.square().sum() + s.sum(), leaves)
            for o, s in ((out, lse), (joint, joint_lse))
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_rows_that_see_nothing_are_zero(name):
    """Neither part, one part, the other, both."""
    rows = [torch.randn(4, 1, 2, 32, requires_grad=True) for _ in "qkv"]
    prefix = [torch.randn(2, 1, 3, 32, requires_grad=True) for _ in "kv"]
    seen = torch.tensor([False, True, False, True])
    options = {
        "key_mask": seen[:, None].expand(4, 2),
        "prefix_mask": torch.tensor([False, True])[:, None].expand(2, 3),
        "return_lse": True,
    }
    with backend(name):
        out, lse = attention_prefix(*rows, *prefix, **options)
        gradients = torch.autograd.grad(out.sum() + lse[1:].sum(), (*rows, *prefix))
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()
    assert lse[1:].isfinite().all()
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][0] == 0).all()
    assert not (gradients[0][2] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prefix_k": torch.zeros(3, 1, 5, 32)}, ValueError, "B a multiple of P"),
        ({"prefix_k": torch.zeros(2, 2, 5, 32)}, ValueError, "with k's heads"),
        ({"prefix_v": torch.zeros(2, 1, 6, 32)}, ValueError, "prefix_v must have the shape of prefix_k"),
        ({"prefix_v": torch.zeros(2, 1, 5, 32).half()}, ValueError, "k's dtype"),
        ({"k": torch.zeros(4, 1, 3, 32), "v": torch.zeros(4, 1, 3, 32)}, ValueError, "its own key"),
        ({"prefix_mask": torch.ones(4, 5).bool()}, ValueError, "one entry for each key"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        (
            {"rotary": rotary_tables(torch.arange(6), 32)},
            ValueError,
            r"\(11, 16\) or \(2, 11, 16\).*got \(6, 16\)",
        ),
        ({"rotary": (1, 2)}, TypeError, "rotary must be RotaryTables, got tuple"),
    ],
)
def test_what_is_refused(change, error, match):
    rows, prefix = torch.zeros(4, 1, 6, 32), torch.zeros(2, 1, 5, 32)
    args = {"q": torch.zeros(4, 2, 6, 32), "k": rows, "v": rows, "prefix_k": prefix, "prefix_v": prefix}
    with pytest.raises(error, match=match):
        attention_prefix(**args | change)
