"""token_advantages: other stacks' numbers, its parts, edges, gradients, bad input."""

import math

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import gae, masked_normalize, token_advantages
from tests.golden.load import golden

BACKENDS = ["torch", "reference"]
# TRL puts the score one slot after the last token, where the row has one: only full rows compare.
STACKS = {
    "verl": {"mask_mode": "carry", "normalize": "verl"},
    "openrlhf": {"mask_mode": "zero", "normalize": "openrlhf"},
    "trl": {"mask_mode": "carry", "normalize": "trl"},
}


def _strictly(name):
    return rlhf_kernels.backend(f"token_advantages={name}", strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("package", STACKS)
def test_reproduces_the_stacks(package, backend):
    records = [r for r in golden("token_advantages", package) if r["error"] is None]
    records = [r for r in records if package != "trl" or "full" in r["case"]]
    assert len(records) >= 4
    for record in records:
        inputs = record["inputs"]
        mask = inputs["mask"]
        with _strictly(backend):
            found = token_advantages(**inputs, **record["kwargs"], **STACKS[package])
        for got, want in zip(found, record["outputs"].values(), strict=True):
            compared = mask & want.isfinite()  # of a single token TRL's unbiased variance is NaN
            torch.testing.assert_close(got[compared], want[compared], rtol=1e-5, atol=1e-5)
            assert not got[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_its_parts(backend):
    """The KL term as reward, the score at the last real token, gae, masked_normalize."""
    score, kl, values = torch.randn(3), torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    rewards = -0.3 * kl
    rewards[0, 2] += score[0]
    rewards[1, 4] += score[1]
    advantages, returns = gae(rewards, values, mask=mask, gamma=0.9)
    with _strictly(backend):
        plain = token_advantages(score, kl, values, mask, kl_coef=0.3, gamma=0.9, normalize=False)
        whitened, same = token_advantages(score, kl, values, mask, kl_coef=0.3, gamma=0.9)
    torch.testing.assert_close(plain, (advantages * mask, returns * mask))
    torch.testing.assert_close(whitened, masked_normalize(advantages, mask, zero_masked=True))
    torch.testing.assert_close(same, returns * mask)
    assert not whitened[2].any()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_masked_slots_is_harmless(backend, odd):
    score, kl, values, mask = torch.randn(4), torch.randn(4, 9), torch.randn(4, 9), torch.rand(4, 9) < 0.6
    mask[3] = False
    results = []
    for filler in (0.0, odd):
        leaves = [score.clone().requires_grad_()]
        leaves += [x.masked_fill(~mask, filler).requires_grad_() for x in (kl, values)]
        leaves[0].data[3] = filler  # a row without a real token takes no score
        with _strictly(backend):
            outputs = token_advantages(*leaves, mask, kl_coef=0.1)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        results.append([*outputs, *grads])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("normalize", [True, False, "verl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, normalize):
    mask = torch.rand(3, 5) < 0.7
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3,), (3, 5), (3, 5))]
    with _strictly(backend):
        torch.autograd.gradcheck(
            lambda *x: token_advantages(*x, mask, kl_coef=0.2, gamma=0.9, lam=0.8, normalize=normalize),
            leaves,
        )


X = torch.zeros(4, 6)
BAD = {
    "score per token": (ValueError, {"score": X}, r"score must have one score for each row, \(4,\)"),
    "kl's shape": (ValueError, {"kl": X[:, :2]}, r"kl must have the shape of values, \(4, 6\), got \(4, 2\)"),
    "flat values": (ValueError, {"values": X[0]}, r"values must be \[batch, time\], got \(6,\)"),
    "score's dtype": (TypeError, {"score": X[:, 0].double()}, "score must have the dtype of values"),
    "float mask": (TypeError, {"mask": X}, "mask must be boolean.*got float32"),
    "kl_coef": (TypeError, {"kl_coef": torch.ones(())}, "kl_coef must be a Python number, got Tensor"),
    "mode": (ValueError, {"mask_mode": "skip"}, "mask_mode must be 'carry' or 'zero', got 'skip'"),
    "preset": (ValueError, {"normalize": "mine"}, "normalize must be True, False or one of .*, got 'mine'"),
}


@pytest.mark.parametrize(("error", "change", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told(error, change, said):
    good = {"score": X[:, 0], "kl": X, "values": X, "mask": X.bool(), "kl_coef": 0.1}
    with pytest.raises(error, match=said) as caught:
        token_advantages(**good | change)
    assert str(caught.value).startswith("token_advantages(): ")
