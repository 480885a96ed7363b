"""decode_attention beyond what every op is asked: bits of a row, unseen slots, edges, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_kernels import attention, backend, decode_attention
from rlhf_kernels.ops.attention.decode_reference import seen
from rlhf_kernels.runtime import native

BACKENDS = ("torch", "native", "triton")
FAST = ("native", "triton")


def _inputs(batch=3, heads=4, groups=2, slots=70, size=32, dtype=torch.float32):
    shapes = ((heads, 1), (groups, slots), (groups, slots))
    return [torch.randn(batch, *shape, size).to(dtype) for shape in shapes]


def _run(name, *args, **options):
    if name == "native" and (reason := native.missing("_C")):
        pytest.skip(reason)
    with backend(name, strict=True):
        return decode_attention(*args, **options)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_equals_attention_with_the_mask_of_the_seen_slots(name):
    q, k, v = _inputs()
    lengths, starts = torch.tensor([70, 33, 64]), torch.tensor([5, 0, 63])
    with backend("reference"):
        want = attention(q, k, v, key_mask=seen(k, lengths, starts), scale=0.3)
    torch.testing.assert_close(_run(name, q, k, v, lengths, starts=starts, scale=0.3), want)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bound", ["lengths", "starts"])
def test_one_bound_alone(name, bound):
    q, k, v = _inputs()
    given = {bound: torch.tensor([70, 33, 1])}
    want = _run("reference", q, k, v, **given)
    torch.testing.assert_close(_run(name, q, k, v, **given), want)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_row_that_sees_nothing_is_zero(name):
    q, k, v = _inputs()
    out = _run(name, q, k, v, torch.tensor([0, 20, 70]), starts=torch.tensor([0, 20, 69]))
    assert (out[:2] == 0).all()
    torch.testing.assert_close(out[2], v[2, :, 69:].repeat_interleave(2, 0))


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_bounds_beyond_the_cache_are_those_of_the_cache(name):
    q, k, v = _inputs()
    got = _run(name, q, k, v, torch.tensor([1 << 40, 70, 30]), starts=torch.tensor([-(1 << 40), -1, 1 << 40]))
    want = _run(name, q, k, v, torch.tensor([70, 70, 0]))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unseen_slots_may_hold_anything(name, dtype):
    q, k, v = _inputs(dtype=dtype)
    lengths, starts = torch.tensor([69, 33, 64]), torch.tensor([5, 1, 63])
    hidden = ~seen(k, lengths, starts)[:, None, :, None]
    clean = _run(name, q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), lengths, starts=starts)
    dirty = _run(
        name, q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf), lengths, starts=starts
    )
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_in_a_seen_slot_is_not_hidden(name):
    q, k, v = _inputs(batch=1)
    k[0, 0, 40, 3] = torch.nan
    out = _run(name, q, k, v, torch.tensor([50]))
    assert out[0, :2].isnan().all()
    assert out[0, 2:].isfinite().all()


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_a_row_depend_on_the_row_alone(name, dtype):
    """Not on the rows around it, on the room behind it, or on the slots before it."""
    if name == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is no evidence")
    slots = 700 if name == "native" else 90
    q, k, v = _inputs(batch=4, slots=slots, dtype=dtype)
    lengths, starts = torch.tensor([slots, 47, slots - 3, 40]), torch.tensor([3, 2, 1, 40])
    whole = _run(name, q, k, v, lengths, starts=starts)
    for b in range(4):
        low, high = int(starts[b]), int(lengths[b])
        alone = _run(name, *(x[b : b + 1] for x in (q, k, v)), lengths[b : b + 1], starts=starts[b : b + 1])
        moved = _run(name, q[b : b + 1], *(x[b : b + 1, :, low:high] for x in (k, v)))
        assert torch.equal(alone[0], whole[b])
        assert torch.equal(moved[0], whole[b])


THREADS = """
import sys, torch
from rlhf_kernels import backend, decode_attention
torch.manual_seed(3)
for dtype in (torch.float32, torch.bfloat16):
    q, k, v = (torch.randn(2, h, n, 64).to(dtype) for h, n in ((8, 1), (2, 3000), (2, 3000)))
    lengths = torch.tensor([2999, 600])
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with backend("native", strict=True):
            found.append(decode_attention(q, k, v, lengths))
    print(all(torch.equal(found[0], other) for other in found[1:]))
"""


def test_bits_do_not_depend_on_threads():
    if reason := native.missing("_C"):
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True"], done.stderr


SHAPES = """
import ctypes, mmap, torch
from rlhf_kernels import backend, decode_attention
from rlhf_kernels.runtime import native
torch.manual_seed(3)
libc, pages = ctypes.CDLL(None), []

def at_the_end(x):
    # A copy that ends where a page begins which must not be read.
    size = x.numel() * x.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    held = mmap.mmap(-1, whole + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(held)) + whole
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    pages.append(held)
    flat = torch.frombuffer(held, dtype=x.dtype, count=x.numel(), offset=whole - size)
    return flat.view(x.shape).copy_(x)

for heads in (1, 2, 3, 4, 7, 8, 9, 16, 21):
    for size in (1, 7, 16, 24, 32, 40, 64, 80, 128, 256):
        for slots in (1, 15, 17, 130, 190, 193, 513):
            q, k, v = (torch.randn(1, h, n, size) for h, n in ((heads, 1), (1, slots), (1, slots)))
            for dtype, most in ((torch.float32, 4e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
                args = [x.to(dtype) for x in (q, k, v)]
                with backend("native", strict=True):
                    got = decode_attention(args[0], *map(at_the_end, args[1:]))
                with backend("reference"):
                    want = decode_attention(*(x.double() for x in args))
                error = (got - want).abs().max().item()
                assert error <= most, (heads, size, slots, dtype, error)
print(native.host().bfloat16_products(), "right")
"""


@pytest.mark.parametrize("level", ["base", "v3", "v4", "v4+bf16", None])
def test_every_block_of_heads_size_and_rest_on_every_instruction_set(level):
    """None is all that the processor has. Whoever names a level gets no products beyond it."""
    if reason := native.missing("_C") or native.missing("_host"):
        pytest.skip(reason)
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if level in ("v4", "v4+bf16") and flags and "avx512f" not in flags:
        pytest.skip("no AVX-512 here: v3, which is asked, would be taken")
    environment = {name: value for name, value in os.environ.items() if name != "RLHF_KERNELS_ISA"}
    environment |= {"RLHF_KERNELS_ISA": level} if level else {}
    done = subprocess.run(
        [sys.executable, "-c", SHAPES], capture_output=True, text=True, timeout=240, env=environment
    )
    products, right = done.stdout.split() or (None, done.stderr)
    assert right == "right", done.stderr
    if level == "v4+bf16":
        assert products == ("pairs" if "avx512_bf16" in flags else "floats")
    elif level:
        assert products == "floats"
    elif "amx_bf16" in flags:
        assert products == "tiles"


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_float64_is_of_the_definition_and_of_pytorch(name):
    args = _inputs(dtype=torch.float64)
    if name in FAST:
        with backend(name), pytest.warns(UserWarning, match="there is no kernel for float64"):
            got = decode_attention(*args)
    else:
        got = _run(name, *args)
    torch.testing.assert_close(got, _run("reference", *args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("whole", [torch.int32, torch.int64])
def test_lengths_of_either_kind_and_any_stride(name, whole):
    q, k, v = _inputs()
    lengths = torch.tensor([70, 0, 33, 0, 64, 0], dtype=whole)[::2]
    want = _run(name, q, k, v, lengths.contiguous().long())
    assert torch.equal(_run(name, q, k, v, lengths), want)


@pytest.mark.parametrize("name", FAST)
def test_a_slice_of_a_cache_is_read_in_place(name):
    """Strides of the batch, the heads and the slots are those of the larger cache."""
    q, k, v = _inputs(slots=90)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    parts = [x[:, :, 7:77] for x in (k, v)]
    assert torch.equal(_run(name, q, *parts), _run(name, q.contiguous(), *(x.contiguous() for x in parts)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 2, 32)}, ValueError, r"one step, \[B, H, 1, D\].*attention\(q, k, v"),
        ({"q": torch.zeros(3, 4, 32)}, ValueError, r"q must be \[B, H, 1, D\], got \(3, 4, 32\)"),
        ({"q": torch.zeros(3, 3, 1, 32)}, ValueError, "multiple of the cache's"),
        ({"q": torch.zeros(3, 4, 1, 16)}, ValueError, "k_cache must have q's batch and head size"),
        ({"v_cache": torch.zeros(3, 2, 7, 32)}, ValueError, "v_cache must have the shape of k_cache"),
        ({"k_cache": torch.zeros(3, 2, 70, 32).half()}, ValueError, "must have q's dtype"),
        ({"k_cache": torch.zeros(3, 2, 70, 32).long()}, TypeError, "k_cache must be float32"),
        ({"lengths": 70}, TypeError, "lengths must be a tensor of int64 or int32, got int"),
        ({"lengths": torch.ones(3)}, TypeError, r"got torch.float32. Pass torch.tensor\(lengths"),
        ({"starts": torch.zeros(2).long()}, ValueError, "starts must have one number for each row"),
        ({"scale": -1.0}, ValueError, "scale must be positive and finite, got -1.0"),
        ({"scale": "1"}, TypeError, "scale must be a Python number"),
    ],
)
def test_errors_say_what_to_do(change, error, message):
    args = dict(zip(("q", "k_cache", "v_cache"), _inputs())) | change
    with pytest.raises(error, match=message):
        decode_attention(**args)


def test_a_wanted_gradient_is_refused_with_the_remedy():
    q, k, v = _inputs()
    with pytest.raises(ValueError, match=r"requires a gradient.*call attention\(q, k, v, key_mask"):
        decode_attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert not decode_attention(q, k, v).requires_grad


def test_native_checks_guard_memory():
    """The operator itself refuses what would read beyond the cache."""
    if reason := native.missing("_C"):
        pytest.skip(reason)
    run = native.operator("decode_attention")
    q, k, v = _inputs()
    for args, message in (
        ((q, k, v[:, :, :-1], None, None), "do not fit"),
        ((q[:, :3], k, v, None, None), "do not fit"),
        ((q, k[0], v[0], None, None), "four dimensions"),
        ((q, k, v, torch.ones(2).long(), None), "must be"),
        ((q, k, v, torch.ones(3), None), "must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*args, 1.0)
