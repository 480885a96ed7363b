"""gae: other stacks' numbers, the definition on random calls, gradients, bits, sizes, bad input."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_kernels
from rlhf_kernels import gae, masked_normalize
from rlhf_kernels.ops.advantage import kernel_native, reference
from rlhf_kernels.runtime import native
from tests.golden.load import golden

needs_native = pytest.mark.skipif(native.missing("_C") is not None, reason="native kernels are not built")
NATIVE = pytest.param("native", marks=needs_native)
BACKENDS = ["torch", NATIVE, "triton"]
# What amounts to each stack's function; TRL's loop knows no mask.
STACKS = {"verl": {"mask_mode": "carry"}, "openrlhf": {"mask_mode": "zero"}, "trl": None}


def _strictly(name):
    return rlhf_kernels.backend(f"gae={name}", strict=True)


def _close_where_finite(got, want, where):
    """A stack that multiplies by its mask lets NaN out of masked slots."""
    compared = want.isfinite() & where
    torch.testing.assert_close(got[compared], want[compared], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("package", STACKS)
def test_reproduces_the_stacks(package, backend):
    """As recorded from the installed packages, in masked slots too where they mean something there."""
    records = [r for r in golden("gae", package) if r["error"] is None]
    if backend == "triton":
        records = [r for r in records[::3] if "float64" not in r["case"]]
    assert len(records) > 15
    for record in records:
        rewards, values, mask = (record["inputs"][name] for name in ("rewards", "values", "mask"))
        options = STACKS[package]
        with _strictly(backend):
            given = {} if options is None else {"mask": mask, **options}
            advantages, returns = gae(rewards, values, **given, **record["kwargs"])
        everywhere = torch.ones_like(mask)
        outputs = record["outputs"]
        if options is not None:
            assert advantages.isfinite().all()
            assert returns.isfinite().all()
        if "whitened_advantages" in outputs:
            whitened = masked_normalize(advantages, mask, **rlhf_kernels.NORMALIZE_PRESETS["verl"])
            _close_where_finite(whitened, outputs["whitened_advantages"], mask)
        else:
            _close_where_finite(advantages, outputs["advantages"], everywhere)
        _close_where_finite(returns, outputs["returns"], everywhere if options is None else mask)


@st.composite
def _calls(draw, dtype=torch.float64):
    """Tensors of any size, flags, and what may stand in masked slots."""
    rows, steps = draw(st.integers(0, 40)), draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def matrix():
        wide = torch.randn(rows, steps + draw(st.sampled_from([0, 3])), generator=generator, dtype=dtype)
        return wide[:, wide.shape[1] - steps :]

    args = {"rewards": matrix(), "values": matrix()}
    for name, chance in (("mask", draw(st.sampled_from([0.0, 0.5, 0.9]))), ("done", 0.1), ("truncated", 0.1)):
        if draw(st.booleans()):
            args[name] = torch.rand(rows, steps, generator=generator) < chance
    dims = draw(st.integers(0, 2))
    if dims:
        args["next_value"] = matrix() if dims == 2 else torch.randn(rows, generator=generator, dtype=dtype)
    if "mask" in args:
        odd = draw(st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
        for name in ("rewards", "values", "next_value"):
            if name in args and args[name].dim() == 2:
                args[name].masked_fill_(~args["mask"], odd)
    numbers = st.sampled_from([0.0, 0.5, 0.97, 1.0, 1])
    args |= {"gamma": draw(numbers), "lam": draw(numbers)}
    return args | {"mask_mode": draw(st.sampled_from(["carry", "zero"]))}


def _with_gradients(function, args):
    leaves = {n: args[n].detach().requires_grad_() for n in ("rewards", "values", "next_value") if n in args}
    outputs = function(**args | leaves)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    found = torch.autograd.grad(
        outputs, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
    )
    return [*outputs, *found]


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@given(call=_calls())
@settings(max_examples=200, deadline=None)
def test_equals_the_definition(backend, call):
    with _strictly(backend):
        got = _with_gradients(gae, call)
    for g, want in zip(got, _with_gradients(reference.gae, call), strict=True):
        assert g.isfinite().all()
        torch.testing.assert_close(g, want, rtol=1e-11, atol=1e-11)


@given(call=_calls(torch.float32))
@settings(max_examples=12, deadline=None)
def test_interpreted_triton_equals_the_definition(call):
    with _strictly("triton"):
        got = _with_gradients(gae, call)
    for g, want in zip(got, _with_gradients(reference.gae, call), strict=True):
        assert g.isfinite().all()
        torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["carry", "zero"])
@pytest.mark.parametrize("dims", [0, 1, 2])
@pytest.mark.parametrize("backend", ["torch", NATIVE])
def test_gradcheck(backend, dims, mode):
    rows, steps = 3, 6
    flags = {name: torch.rand(rows, steps) < 0.2 for name in ("done", "truncated")}
    flags["mask"] = torch.rand(rows, steps) < 0.7
    shapes = [(rows, steps), (rows, steps), (rows, steps)[:dims]][: 3 if dims else 2]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(rewards, values, next_value=None):
        return gae(rewards, values, next_value=next_value, gamma=0.9, lam=0.8, mask_mode=mode, **flags)

    with _strictly(backend):
        torch.autograd.gradcheck(call, leaves)
        torch.autograd.gradcheck(lambda *leaves: gae(*leaves[:2], gamma=0.9, lam=0.8), leaves[:2])


def test_triton_refuses_float64():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with _strictly("triton"), pytest.raises(rlhf_kernels.BackendError, match="no float64"):
        gae(x, x)


def _bits(t):
    return t.contiguous().view(torch.uint8)


def rows_are_their_own(dtype, steps, masked):
    """A row alone, elsewhere in a batch and at another stride has the same bits; run per instruction set."""
    generator = torch.Generator().manual_seed(steps)
    rewards, values = (torch.randn(37, steps, generator=generator).to(dtype) for _ in range(2))
    drawn = torch.rand(37, steps, generator=generator) < 0.7
    lengths = torch.randint(steps + 1, (37, 1), generator=generator)
    mask = {"": None, "random": drawn, "runs": torch.arange(steps) < lengths}[masked]
    whole = gae(rewards, values, mask=mask, gamma=0.99)
    shuffled = torch.randperm(37, generator=generator)
    moved = gae(
        rewards[shuffled], values[shuffled], mask=None if mask is None else mask[shuffled], gamma=0.99
    )
    wide = [torch.nn.functional.pad(t, (0, 5))[:, :steps] for t in (rewards, values)]
    strided = gae(*wide, mask=mask, gamma=0.99)
    for out, other, third in zip(whole, moved, strided, strict=True):
        assert torch.equal(_bits(out[shuffled]), _bits(other))
        assert torch.equal(_bits(out), _bits(third))
    for i in (0, 15, 16, 36):
        one = slice(i, i + 1)
        alone = gae(rewards[one], values[one], mask=None if mask is None else mask[one], gamma=0.99)
        for out, row in zip(whole, alone, strict=True):
            assert torch.equal(_bits(out[one]), _bits(row))


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_a_row_does_not_depend_on_its_batch(isa):
    script = """
import itertools, torch
from tests.kernels.test_gae import rows_are_their_own
for dtype, steps, masked in itertools.product(
    (torch.float32, torch.float64, torch.bfloat16), (1, 3, 17, 300, 1024), ("", "random", "runs")
):
    rows_are_their_own(dtype, steps, masked)
"""
    environment = os.environ | {"RLHF_KERNELS_ISA": isa}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=os.getcwd())


@needs_native
def test_threads_do_not_change_bits():
    rewards, values = torch.randn(100, 130), torch.randn(100, 130)
    arguments = (rewards, values, torch.rand(100, 130) < 0.7, None, None, None, 0.9, 0.9, True)
    expected = kernel_native.forward(*arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = kernel_native.forward(*arguments, grain=1)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@needs_native
def test_numpy_module_gives_the_same():
    host = native.host()
    rewards, values, mask = torch.randn(19, 300), torch.randn(19, 300), torch.rand(19, 300) < 0.7
    for given_mask in (None, mask):
        got = host.gae(rewards.numpy(), values.numpy(), given_mask, 0.97, 0.9)
        want = gae(rewards, values, mask=given_mask, gamma=0.97, lam=0.9)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(torch.from_numpy(a), b)
    with pytest.raises(ValueError, match="shape of rewards"):
        host.gae(rewards.numpy(), values[:, :3].numpy())


@needs_native
def test_rows_beyond_two_to_the_31_elements():
    """Memory is reserved, and two rows of it used."""
    steps, far = 50, 2**31 + 64
    rewards, values, mask = (
        torch.randn(2, steps).bfloat16(),
        torch.randn(2, steps),
        torch.rand(2, steps) < 0.7,
    )
    try:
        distant = [torch.empty(far + steps, dtype=dtype) for dtype in (torch.bfloat16, torch.bool)]
    except RuntimeError as error:
        pytest.skip(f"6 GB of address space are not to be had: {error}")
    spread = [memory.as_strided((2, steps), (far, 1)) for memory in distant]
    spread[0].copy_(rewards)
    spread[1].copy_(mask)
    with _strictly("native"):
        expected = gae(rewards, values.bfloat16(), mask=mask)
        got = gae(spread[0], values.bfloat16(), mask=spread[1])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_returns_are_advantages_and_real_values():
    rewards, values, mask = torch.randn(5, 9), torch.randn(5, 9), torch.rand(5, 9) < 0.5
    advantages, returns = gae(rewards, values, mask=mask)
    torch.testing.assert_close(returns, advantages + torch.where(mask, values, 0))


X = torch.zeros(4, 16)
COLUMN = X[:, 0]
BAD_TYPES = {
    "list": ({"rewards": [1.0]}, "rewards must be a tensor, got list"),
    "integers": ({"rewards": X.long()}, r"rewards must be float32.*got int64 \(4, 16\). Cast with"),
    "values' dtype": ({"values": X.double()}, "dtype of rewards, float32, got float64. Cast with"),
    "float mask": ({"mask": X}, r"mask must be boolean \(True where real\), got float32"),
    "integer done": (
        {"done": X.int()},
        r"done must be boolean, got int32 \(4, 16\). Convert with done.bool\(\)\.$",
    ),
    "next_value's dtype": ({"next_value": COLUMN.half()}, "next_value must have the dtype of rewards"),
    "tensor gamma": ({"gamma": torch.ones(())}, r"gamma must be a Python number, got Tensor.*\.item"),
    "text lam": ({"lam": "0.9"}, "lam must be a Python number, got str"),
}
BAD_VALUES = {
    "one row": ({"rewards": X[0]}, r"must be \[batch, time\], got \(16,\).*rewards\[None\]"),
    "values' shape": ({"values": X[:, :8]}, r"the shape of rewards, \(4, 16\), got \(4, 8\)"),
    "mask's shape": (
        {"mask": X[:2].bool()},
        r"mask must have the shape of rewards, \(4, 16\), got \(2, 16\)",
    ),
    "truncated's shape": ({"truncated": X[0].bool()}, "truncated must have the shape of rewards"),
    "device": ({"values": X.to("meta")}, "rewards is on cpu and values on meta. Move it"),
    "next_value's length": ({"next_value": COLUMN[:3]}, r"next_value must be \(4,\), a value after each row"),
    "next_value's shape": (
        {"next_value": X[:, :1]},
        r"must be \(4,\), a value .*, or \(4, 16\), one after each step, got \(4, 1\)",
    ),
    "mode": ({"mask_mode": "skip"}, "mask_mode must be 'carry' or 'zero', got 'skip'"),
}


@pytest.mark.parametrize(("change", "said"), BAD_TYPES.values(), ids=BAD_TYPES)
def test_bad_types_are_told(change, said):
    with pytest.raises(TypeError, match=said) as caught:
        gae(**{"rewards": X, "values": X} | change)
    assert str(caught.value).startswith("gae(): ")


@pytest.mark.parametrize(("change", "said"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_are_told(change, said):
    with pytest.raises(ValueError, match=said) as caught:
        gae(**{"rewards": X, "values": X} | change)
    assert str(caught.value).startswith("gae(): ")
