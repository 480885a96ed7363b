"""token_advantages: other stacks' numbers, its parts, edges, gradients, bits, bad input."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_kernels
from rlhf_kernels import gae, masked_normalize, token_advantages
from rlhf_kernels.ops.advantage import (
    kernel_triton,
    token_kernel_native,
    token_kernel_triton,
    token_reference,
)
from rlhf_kernels.ops.normalize.arguments import CENTER, UNBIASED, ZERO_MASKED
from rlhf_kernels.runtime import native
from tests.golden.load import golden

needs_native = pytest.mark.skipif(native.missing("_C") is not None, reason="native kernels are not built")
NATIVE = pytest.param("native", marks=needs_native)
BACKENDS = ["torch", "reference", NATIVE]
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


@pytest.mark.parametrize("mode", ["carry", "zero"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_masked_slots_is_harmless(backend, odd, mode):
    score, kl, values, mask = torch.randn(4), torch.randn(4, 9), torch.randn(4, 9), torch.rand(4, 9) < 0.6
    mask[3] = False
    results = []
    for filler in (0.0, odd):
        leaves = [score.clone().requires_grad_()]
        leaves += [x.masked_fill(~mask, filler).requires_grad_() for x in (kl, values)]
        leaves[0].data[3] = filler  # a row without a real token takes no score
        with _strictly(backend):
            outputs = token_advantages(*leaves, mask, kl_coef=0.1, mask_mode=mode)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        results.append([*outputs, *grads])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("mode", ["carry", "zero"])
@pytest.mark.parametrize("normalize", [True, False, "verl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, normalize, mode):
    mask = torch.rand(3, 5) < 0.7
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3,), (3, 5), (3, 5))]
    with _strictly(backend):
        torch.autograd.gradcheck(
            lambda *x: token_advantages(
                *x, mask, kl_coef=0.2, gamma=0.9, lam=0.8, mask_mode=mode, normalize=normalize
            ),
            leaves,
        )


@st.composite
def _calls(draw):
    """Tensors of any size and layout, and what may stand in masked slots."""
    rows, steps = draw(st.integers(0, 40)), draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def matrix():
        wide = torch.randn(rows, steps + draw(st.sampled_from([0, 3])), generator=generator).double()
        return wide[:, wide.shape[1] - steps :]

    mask = torch.rand(rows, steps, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    args = {"score": torch.randn(rows, generator=generator).double(), "kl": matrix(), "values": matrix()}
    for name in ("kl", "values"):
        args[name].masked_fill_(~mask, draw(st.sampled_from([0.0, math.nan, math.inf])))
    numbers = st.sampled_from([0.0, 0.5, 0.97, 1.0, 1])
    args |= {"mask": mask, "kl_coef": draw(numbers), "gamma": draw(numbers), "lam": draw(numbers)}
    args["mask_mode"] = draw(st.sampled_from(["carry", "zero"]))
    return args | {"normalize": draw(st.sampled_from([True, False, "verl", "openrlhf"]))}


def _with_gradients(args):
    leaves = {name: args[name].detach().requires_grad_() for name in ("score", "kl", "values")}
    outputs = token_advantages(**args | leaves)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


@needs_native
@given(call=_calls())
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(call):
    results = []
    for name in ("native", "reference"):
        with _strictly(name):
            results.append(_with_gradients(call))
    # Of one real token the variance is 0: rstd is 1e4, and so are the digits lost where terms cancel.
    tolerance = 1e-11 if call["normalize"] is False or call["mask"].sum() > 1 else 1e-6
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=tolerance)


def rows_are_their_own(dtype, steps, mode):
    """A row alone, elsewhere in a batch and at another stride has the same bits; run per instruction set."""
    generator = torch.Generator().manual_seed(steps)
    score = torch.randn(37, generator=generator).to(dtype)
    kl, values = (torch.randn(37, steps, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(37, steps, generator=generator) < 0.7

    def call(at, *matrices):
        inputs = [x[at] for x in (score, *matrices, mask)]
        return token_advantages(*inputs, kl_coef=0.1, gamma=0.99, mask_mode=mode, normalize=False)

    everywhere = slice(None)
    whole = call(everywhere, kl, values)
    shuffled = torch.randperm(37, generator=generator)
    wide = [torch.nn.functional.pad(x, (0, 5))[:, :steps] for x in (kl, values)]
    strided = call(everywhere, *wide)
    for out, other, third in zip(whole, call(shuffled, kl, values), strided, strict=True):
        assert torch.equal(out[shuffled], other)
        assert torch.equal(out, third)
    for i in (0, 15, 16, 36):
        for out, row in zip(whole, call(slice(i, i + 1), kl, values), strict=True):
            assert torch.equal(out[i], row[0])


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_a_row_does_not_depend_on_its_batch_before_whitening(isa):
    script = """
import itertools, torch
from tests.kernels.test_token_advantages import rows_are_their_own
for dtype, steps, mode in itertools.product(
    (torch.float32, torch.float64, torch.bfloat16), (1, 3, 17, 300, 1024), ("carry", "zero")
):
    rows_are_their_own(dtype, steps, mode)
"""
    environment = os.environ | {"RLHF_KERNELS_ISA": isa}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=os.getcwd())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype):
    score = torch.randn(100).to(dtype)
    kl, values, grad, grad_returns = (torch.randn(100, 330).to(dtype) for _ in range(4))
    inputs = (score, kl, values, torch.rand(100, 330) < 0.7, 0.1, 0.99, 0.95, True, True, 1e-5, 12)
    calls = (
        (token_kernel_native.forward, inputs),
        (token_kernel_native.backward, (grad, grad_returns, *inputs)),
    )
    threads = torch.get_num_threads()
    for kernel, arguments in calls:
        expected = kernel(*arguments)
        try:
            torch.set_num_threads(3)
            got = kernel(*arguments, grain=1)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_real_token_takes_the_score(backend):
    score, kl, values = torch.tensor([2.0]), torch.full((1, 5), 0.5), torch.full((1, 5), 0.25)
    mask = torch.tensor([[False, False, True, False, False]])
    for mode in ("carry", "zero"):
        with _strictly(backend):
            advantages, returns = token_advantages(
                score, kl, values, mask, kl_coef=0.1, mask_mode=mode, normalize=False
            )
        torch.testing.assert_close(advantages, torch.tensor([[0, 0, 2 - 0.05 - 0.25, 0, 0]]))
        torch.testing.assert_close(returns, torch.tensor([[0, 0, 2 - 0.05, 0, 0]]))


@needs_native
@pytest.mark.parametrize("offset", [0.0, 3e3])
def test_whitening_holds_where_the_mean_is_far_from_zero(offset):
    """Advantages in 16 bits are whitened before they are rounded, and moments are those of the deviations."""
    inputs = torch.randn(64), torch.randn(64, 200), torch.randn(64, 200) - offset
    options = {"kl_coef": 0.1, "gamma": 0.0, "lam": 0.0}
    mask = torch.rand(64, 200) < 0.8
    with _strictly("reference"):
        want, _ = token_advantages(*(x.double() for x in inputs), mask, **options)
    with _strictly("native"):
        got, _ = token_advantages(*inputs, mask, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-3 if offset else 1e-5)


@needs_native
def test_sixteen_bits_are_rounded_once():
    inputs = [torch.randn(s).bfloat16() for s in ((33,), (33, 130), (33, 130))]
    mask = torch.rand(33, 130) < 0.7
    with _strictly("native"):
        wide = token_advantages(*(x.float() for x in inputs), mask, kl_coef=0.1)
        narrow = token_advantages(*inputs, mask, kl_coef=0.1)
    for got, want in zip(narrow, wide, strict=True):
        assert torch.equal(got, want.bfloat16())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("one_program", [0, 1000], ids=["launches", "one_launch"])
def test_interpreter_triton_takes_several_tiles(monkeypatch, one_program, carry):
    """Rows of several blocks, several tiles to a program and several programs, against the definition."""
    monkeypatch.setattr(kernel_triton, "MAX_BLOCK", 16)
    monkeypatch.setattr(token_kernel_triton, "TILE", 32)
    monkeypatch.setattr(token_kernel_triton, "CHUNKS", 2)
    score, (kl, values, grad, grad_returns) = torch.randn(7), torch.randn(4, 7, 41)
    mask = torch.rand(7, 41) < 0.6
    mask[2], mask[3, 9:] = False, False  # no token, and a last one that is not in the last block
    options = (0.3, 0.9, 0.8, carry, True, 1e-5, UNBIASED | CENTER | ZERO_MASKED)
    leaves = [x.double().requires_grad_() for x in (score, kl, values)]
    want = token_reference.forward(*leaves, mask, *options)
    want += torch.autograd.grad(want, leaves, [grad.double(), grad_returns.double()])
    inputs = (score, kl, values, mask, *options)
    got = token_kernel_triton.forward(*inputs, one_program=one_program)
    got += token_kernel_triton.backward(grad, grad_returns, *inputs)
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("carry", [True, False])
def test_numpy_module_gives_the_same(carry):
    host = native.host()
    score, kl, values = torch.randn(19), torch.randn(19, 300), torch.randn(19, 300)
    mask = torch.rand(19, 300) < 0.7
    options = {"kl_coef": 0.1, "gamma": 0.97, "lam": 0.9}
    got = host.token_advantages(
        score.numpy(), kl.numpy(), values.numpy(), mask.numpy(), **options, carry=carry
    )
    mode = "carry" if carry else "zero"
    want = token_advantages(score, kl, values, mask, **options, mask_mode=mode, normalize=False)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(torch.from_numpy(a), b)
    with pytest.raises(ValueError, match="shape of values"):
        host.token_advantages(score.numpy(), kl[:, :3].numpy(), values.numpy(), mask.numpy(), 0.1)


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
