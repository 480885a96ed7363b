"""masked_normalize: other stacks' numbers, edges, gradients, process groups, bits, sizes."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_kernels
from rlhf_kernels import NORMALIZE_PRESETS, masked_normalize
from rlhf_kernels.ops.normalize import kernel_triton, reference
from rlhf_kernels.runtime import native
from rlhf_kernels.stacks import peers
from tests.golden.load import golden
from tests.kernels.processes import both_ranks

needs_native = pytest.mark.skipif(native.missing("_C") is not None, reason="native kernels are not built")
BACKENDS = ["torch", pytest.param("native", marks=needs_native), "triton"]
OPTIONS = {
    "clamped": {},
    "added": {"eps_mode": "add", "unbiased": True, "eps": 1e-8},
    "keeps_mean": {"center": False},
    "zeroed": {"zero_masked": True, "unbiased": True},
    "zeroed_keeps_mean": {"zero_masked": True, "center": False, "dim": 0},
}


def _strictly(name):
    return rlhf_kernels.backend(f"masked_normalize={name}", strict=True)


def _preset(record):
    """The keywords under which ours is the recorded call."""
    kwargs = dict(record["kwargs"])
    preset = dict(NORMALIZE_PRESETS[record["package"]])
    if kwargs.pop("whole_batch_of_experiences", False):
        preset |= {"dim": None, "zero_masked": False}
    if "shift_mean" in kwargs:
        kwargs["center"] = kwargs.pop("shift_mean")
    return preset | kwargs


def _close_where_finite(got, want, slack):
    """Where the stack itself gave NaN or infinity there is nothing to agree with."""
    finite = want.isfinite()
    scale = max(want[finite].abs().max().item(), 1.0) if finite.any() else 1.0
    torch.testing.assert_close(got[finite], want[finite], atol=slack * scale, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("package", NORMALIZE_PRESETS)
def test_presets_reproduce_the_stacks(package, backend):
    """Values and gradients, as recorded from the installed packages."""
    records = [r for r in golden("masked_normalize", package) if r["error"] is None]
    if backend == "triton":
        records = records[::4]  # the interpreter is slow
    for record in records:
        x = record["inputs"]["x"].requires_grad_()
        # The recorded float32 computation loses digits of x - mean where the mean is large.
        slack = 1e-3 if "offset" in record["case"] else 2e-5
        with _strictly(backend):
            out = masked_normalize(x, record["inputs"].get("mask"), **_preset(record))
        _close_where_finite(out.detach(), record["outputs"]["out"], slack)
        (grad,) = torch.autograd.grad(out, x, record["inputs"]["grad_out"])
        if "offset" not in record["case"] and record["outputs"]["out"].isfinite().all():
            _close_where_finite(grad, record["grads"]["x"], slack)


def test_presets_are_what_the_stacks_declare():
    declared = {peer.package: peer.semantics for peer in peers() if peer.op == "masked_normalize"}
    assert declared.keys() == NORMALIZE_PRESETS.keys()
    defaults = {"dim": None, "center": True}
    for package, semantics in declared.items():
        assert defaults | dict(semantics) == defaults | NORMALIZE_PRESETS[package]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, options):
    """Masked slots included: their outputs depend on the moments as well."""
    shape = (2, 3) if backend == "triton" else (3, 7)  # the interpreter is slow
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape) < 0.6
    with _strictly(backend):
        torch.autograd.gradcheck(lambda x: masked_normalize(x, mask, **options), x)
        torch.autograd.gradcheck(lambda x: masked_normalize(x, **options), x)


@st.composite
def _calls(draw):
    """A tensor in any layout, a mask with what may stand in its slots, and options."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    order = draw(st.permutations(range(len(shape))))
    x = torch.randn([shape[d] for d in order], generator=generator, dtype=torch.float64) * 3 + 1
    x = x.permute(sorted(range(len(shape)), key=lambda d: order[d]))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
        x = torch.where(mask, x, draw(st.sampled_from([0.0, 7.0, math.nan, math.inf, -math.inf])))
    dims = draw(st.none() | st.sets(st.integers(0, len(shape) - 1), min_size=1).map(tuple))
    options = {
        "dim": dims,
        "eps": draw(st.sampled_from([1e-5, 0.5, 30.0])),
        "eps_mode": draw(st.sampled_from(["clamp", "add"])),
        **{name: draw(st.booleans()) for name in ("unbiased", "center", "zero_masked")},
    }
    return x, mask, options


@pytest.mark.parametrize("backend", BACKENDS[:2])
@given(call=_calls())
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(backend, call):
    """Values and gradients; nothing but a masked slot's own value is ever NaN."""
    x, mask, options = call
    results = []
    with _strictly(backend):
        for function in (masked_normalize, reference.masked_normalize):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            out = function(leaf, mask, **options)
            results.append((out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out).cumsum(0))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    out, grad = results[0]
    assert grad.isfinite().all()
    assert out.isfinite().all() or not (options["zero_masked"] or out[mask].isnan().any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_and_one_real_element(backend):
    x = torch.tensor([[2.0, 4.0, math.nan], [2.0, 4.0, math.nan]])
    mask = torch.tensor([[False, False, False], [False, True, False]])
    with _strictly(backend):
        out = masked_normalize(x, mask, dim=-1, eps=0.25, unbiased=True)
    torch.testing.assert_close(out[:, :2], torch.tensor([[4.0, 8.0], [-4.0, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_offset_does_not_cancel(backend):
    """Float32 around 1e4, spread by 0.01: a mean rounded to float32 would be off by 5 % of the spread."""
    x = (torch.randn(8, 3000) * 0.01 + 1e4).requires_grad_()
    mask = torch.rand(x.shape) < 0.8
    want = reference.masked_normalize(x.detach().double(), mask, eps=1e-8)
    with _strictly(backend):
        got = masked_normalize(x, mask, eps=1e-8)
    assert (got - want).abs().max() < (0.1 if backend == "torch" else 1e-5)


def test_triton_chunks_of_several_blocks(monkeypatch):
    """The loop within a chunk, which whole tensors above four million elements take."""
    for name, value in {"BLOCK": 16, "LONG": 64, "CHUNKS": 4}.items():
        monkeypatch.setattr(kernel_triton, name, value)
    assert kernel_triton._chunk(150) == 48
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 50) < 0.5
    want = reference.masked_normalize(x, mask)
    with _strictly("triton"):
        got = masked_normalize(x, mask)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))


BITS = """
import torch, rlhf_kernels as rk
from rlhf_kernels.ops.normalize import reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for length in (1, 63, 64, 4097, 20000):
        wide = torch.randn(5, length + 5).to(dtype)
        x = wide[:, 5:].contiguous()
        mask = torch.rand(5, length) < 0.7
        run = lambda x, mask: rk.masked_normalize(x, mask, dim=-1)
        torch.set_num_threads(1)
        whole = run(x, mask)
        for row in range(5):
            assert torch.equal(run(x[row], mask[row]), whole[row]), ("alone", dtype, length, row)
        assert torch.equal(run(wide[:, 5:], mask), whole), ("strided", dtype, length)
        flat = rk.masked_normalize(x, mask)
        torch.set_num_threads(2)
        assert torch.equal(run(x, mask), whole), ("threads", dtype, length)
        assert torch.equal(rk.masked_normalize(x, mask), flat), ("threads on one row", dtype, length)
        assert torch.equal(rk.masked_normalize(wide[:, 5:], mask), flat), ("strided whole", dtype, length)
        want = reference.masked_normalize(x.double(), mask)
        assert (flat.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()
from rlhf_kernels.runtime import native
print(native.host().isa())
"""


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_a_rows_bits_do_not_depend_on_batch_strides_or_threads(isa):
    done = _python(BITS, RLHF_KERNELS_ISA=isa)
    if done.stdout.strip() not in ("", isa):
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr


def _shares_are_the_whole(rank):
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 50).double() * 3 + 5, torch.randn(7, 50).double()
    mask = torch.rand(7, 50) < 0.6
    mask[3:, 8] = False
    mine = slice(0, 3) if rank == 0 else slice(3, 7)
    group = dist.group.WORLD
    grid = ({}, {"unbiased": True, "eps_mode": "add"}, {"center": False, "zero_masked": True}, {"dim": 0})
    for options, real in itertools.product(grid, (mask, None)):
        part, whole = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
        share = None if real is None else real[mine]
        got = masked_normalize(part, share, group=group, **options)
        want = masked_normalize(whole, real, **options)
        torch.testing.assert_close(got, want[mine])
        (grad,) = torch.autograd.grad(got, part, upstream[mine])
        (expected,) = torch.autograd.grad(want, whole, upstream)
        torch.testing.assert_close(grad, expected[mine])
        narrow = masked_normalize(x[mine].float(), share, group=group, **options)
        torch.testing.assert_close(narrow, want[mine].float(), rtol=1e-5, atol=1e-6)
    # A rank without a real element still takes part.
    nothing = masked_normalize(x[mine], mask[mine] & (rank == 0), group=group)
    want = masked_normalize(x, mask & (torch.arange(7) < 3)[:, None])
    torch.testing.assert_close(nothing, want[mine])


def test_process_group_equals_the_concatenation(tmp_path):
    """Two ranks with unlike shares, values and gradients."""
    both_ranks(_shares_are_the_whole, tmp_path)


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, r"x must be float32.*got int64 \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, r"mask must be boolean \(True where real\), got float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must have the shape of x, \(2, 3\)"),
        ({"dim": 2}, ValueError, "dim must name different dimensions of x, which has 2, got 2"),
        ({"dim": (0, -2)}, ValueError, r"different dimensions of x, which has 2, got \(0, -2\)"),
        ({"dim": ()}, ValueError, r"got \(\). Pass None for all of them"),
        ({"dim": 1.0}, TypeError, "dim must be an int, a tuple of ints or None, got 1.0"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"eps": "tiny"}, TypeError, "eps must be a Python number, got str"),
        ({"eps_mode": "max"}, ValueError, "eps_mode must be 'clamp' or 'add', got 'max'"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed.ProcessGroup, got str"),
    ],
)
def test_wrong_arguments_are_one_sentence(change, error, message):
    with pytest.raises(error, match=message):
        masked_normalize(**{"x": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)} | change)


@pytest.mark.skipif(native.missing("_host") is not None, reason="the NumPy module is not built")
def test_numpy_function():
    x, mask = torch.randn(5, 3000), torch.rand(5, 3000) < 0.5
    for zero_masked in (False, True):
        got = native.host().masked_normalize(x.numpy(), mask.numpy(), eps=1e-3, zero_masked=zero_masked)
        want = reference.masked_normalize(x, mask, eps=1e-3, zero_masked=zero_masked)
        torch.testing.assert_close(torch.from_numpy(got), want)


@needs_native
@pytest.mark.slow
def test_beyond_32_bit_offsets():
    """Above 2^31 elements in bfloat16: the count, the offsets and the far end are right."""
    rows, columns = 3, (1 << 30) // 3 * 2 + 8
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 8 << 30:
        pytest.skip(f"needs 8 GiB of free memory, {free / 2**30:.0f} are")
    # Rows of one memory, so that only the result takes its whole size.
    row, real = torch.ones(columns, dtype=torch.bfloat16), torch.ones(columns, dtype=torch.bool)
    row[columns // 2 :] = 3.0
    row[-4:], real[-4:] = math.nan, False
    x, mask = row.expand(rows, -1), real.expand(rows, -1)
    assert x.numel() > 1 << 31
    out = masked_normalize(x, mask, zero_masked=True)
    for found in out:
        ends = torch.cat((found[:4096], found[-4100:-4])).float()
        want = torch.tensor((-1.0, 1.0)).repeat_interleave(4096)
        torch.testing.assert_close(ends, want, rtol=4e-3, atol=1e-7)
    assert not out[2, -4:].any()
    del out
    # Rows so far apart that the last lies beyond; what is between them is never touched.
    apart = 1 << 30
    few = torch.randn(3, 64).bfloat16()
    far = torch.empty(2 * apart + 64, dtype=torch.bfloat16).as_strided((3, 64), (apart, 1)).copy_(few)
    assert torch.equal(masked_normalize(far), masked_normalize(few))
