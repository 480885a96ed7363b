"""logprob and linear_logprob with a vocabulary in slices over a process group."""

import math

import pytest
import torch
import torch.distributed as dist

import rlhf_kernels
from rlhf_kernels import linear_logprob, logprob
from rlhf_kernels.runtime import native
from tests.kernels.processes import both_ranks


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _close(got, want, dtype):
    options = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, want, equal_nan=True, **options)


def _weighed(found, upstream):
    """A loss of the results that are finite."""
    products = torch.stack(found[:2]) * upstream.to(found[0].dtype)
    return products[:, found[0].isfinite()].sum()


def _linear_slice_is_its_part(mine, dtype, hidden, weight, target, bias, upstream, options):
    given = [t.to(dtype) for t in (hidden, weight, bias)]
    cuts = (slice(None), mine, mine)
    part = [t[cut].clone().requires_grad_() for t, cut in zip(given, cuts)]
    whole = [t.clone().requires_grad_() for t in given]
    got = linear_logprob(*part[:2], target, bias=part[2], group=dist.group.WORLD, **options)
    want = linear_logprob(*whole[:2], target, bias=whole[2], **options)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        _close(a, b, dtype)
    gathered = [torch.empty_like(torch.stack(got[:2])) for _ in range(2)]
    dist.all_gather(gathered, torch.stack(got[:2]).detach())
    assert torch.equal(*(t.nan_to_num() for t in gathered))
    found = torch.autograd.grad(_weighed(got, upstream), part)
    for a, b, cut in zip(found, torch.autograd.grad(_weighed(want, upstream), whole), cuts):
        _close(a, b[cut], dtype)


def _slice_is_its_part(mine, dtype, logits, target, upstream):
    part, whole = logits[:, mine].to(dtype).requires_grad_(), logits.to(dtype).requires_grad_()
    target = target.clamp(min=0)
    got = logprob(part.view(3, 3, -1), target.view(3, 3), temperature=0.7, group=dist.group.WORLD)
    want = logprob(whole, target, temperature=0.7)
    for a, b in zip(got, want, strict=True):
        _close(a.view(-1), b, dtype)
    grads = upstream.to(got[0].dtype).unbind()
    (found,) = torch.autograd.grad(got, part, [g.view(3, 3) for g in grads])
    _close(found, torch.autograd.grad(want, whole, grads)[0][:, mine], dtype)


def _slices_are_the_whole(rank, backends):
    torch.manual_seed(0)
    mine = slice(9) if rank == 0 else slice(9, None)
    hidden, weight, bias, upstream = randn(9, 6), randn(23, 6), randn(23), randn(2, 9)
    target = torch.tensor([0, 8, 9, 22, 4, -100, 15, 20, 1])
    hidden[5] = math.nan  # is ignored
    # Equal logits in both slices, the largest: the first counts.
    weight[12], bias[12], hidden[4] = weight[4], bias[4], 3 * weight[4]
    empty = bias.masked_fill(torch.arange(23) < 9, -math.inf)  # the first process's slice is masked
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    options = {"temperature": 0.7, "outputs": ("is_top1", "log_sum_p2", "mean_logit")}
    grid = [(name, dtype, bias, options) for name in backends for dtype in dtypes]
    grid += [("torch", torch.float64, bias, options | {"softcap": 2.0})]
    grid += [(name, torch.float64, empty, options) for name in backends]
    for name, dtype, offset, given in grid:
        with rlhf_kernels.backend(name):
            _linear_slice_is_its_part(mine, dtype, hidden, weight, target, offset, upstream, given)
            logits = hidden.nan_to_num() @ weight.t() + offset
            _slice_is_its_part(mine, dtype, logits, target, upstream)
    # A slice that has become NaN is no masked one.
    found = logprob(torch.full((2, 4), math.nan if rank else 0.0), target[:2] % 8, group=dist.group.WORLD)
    assert all(t.isnan().all() for t in found)
    # One row alone, which has no dimension of rows.
    logits = randn(8)
    part = logits[4 * rank : 4 * rank + 4].clone().requires_grad_()
    whole, one = logits.clone().requires_grad_(), torch.tensor(6)
    got, want = logprob(part, one, group=dist.group.WORLD), logprob(whole, one)
    torch.testing.assert_close(got, want)
    (found,), (expected,) = (torch.autograd.grad(sum(r), t) for r, t in ((got, part), (want, whole)))
    torch.testing.assert_close(found, expected[4 * rank : 4 * rank + 4])
    with pytest.raises(ValueError, match="at least 0 and below 8, got 8"):
        logprob(torch.zeros(2, 4), target[:2], group=dist.group.WORLD)


def test_slices_of_a_vocabulary_are_the_whole(tmp_path):
    """Two processes with unlike slices against one: every result, its bits on both, every gradient."""
    both_ranks(
        _slices_are_the_whole, tmp_path, ("torch", "reference", *([] if native.missing("_C") else ["native"]))
    )
