"""layer_norm and rms_norm: what the specs' loops do not ask."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels
from rlhf_kernels import layer_norm, rms_norm
from rlhf_kernels.ops.norm import kernel_torch
from rlhf_kernels.runtime import native
from tests.golden.load import golden

BOTH = pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=["layer_norm", "rms_norm"])
BUILT = not native.missing("_C")
needs_native = pytest.mark.skipif(not BUILT, reason="the native kernels are not built")
BACKENDS = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("native", marks=needs_native), "reference"]
)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def differentiated(norm, inputs, upstream=None, **options):
    """Results and gradients of all inputs: x, weight and, where there are three, the residual."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    found = norm(*inputs[:2], residual=inputs[2] if len(inputs) > 2 else None, **options)
    found = found if isinstance(found, tuple) else (found,)
    upstream = upstream or [torch.linspace(-1, 1, t.numel()).to(t.dtype).view_as(t) for t in found]
    return [*found, *torch.autograd.grad(found, inputs, upstream)]


def operator(name):
    return getattr(torch.ops.rlhf_kernels, name)


@pytest.mark.parametrize("record", golden("layer_norm"), ids=lambda r: r["case"])
@BACKENDS
def test_is_palms_layer_norm(record, backend):
    inputs = record["inputs"]
    x, weight = (inputs[name].requires_grad_() for name in ("x", "weight"))
    with rlhf_kernels.backend(backend):
        out = layer_norm(x, weight, weight_offset=1.0)
    torch.testing.assert_close(out, record["outputs"]["out"], rtol=1e-5, atol=2e-5)
    grads = torch.autograd.grad(out, (x, weight), inputs["grad_out"])
    for got, name in zip(grads, ("x", "weight")):
        torch.testing.assert_close(got, record["grads"][name], rtol=1e-4, atol=2e-4)


@BOTH
@BACKENDS
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("opaque", [False, True], ids=["eager", "operator"])
def test_gradients(norm, backend, residual, opaque):
    """Against finite differences; `opaque` as the dispatcher runs it, where gradients once were lost."""
    x, other = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    center = norm is layer_norm
    inputs = (x, weight, *((bias,) if center else ()), *((other,) if residual else ()))

    def call(x, weight, *rest):
        bias, added = rest[0] if center else None, rest[-1] if residual else None
        if opaque:
            result = operator(norm.__name__)(x, weight, bias, added, 1e-5, 1.0, center)
            return result if residual else result[0]
        options = {"bias": bias} if center else {}
        return norm(x, weight, weight_offset=1.0, residual=added, **options)

    with rlhf_kernels.backend(backend):
        assert torch.autograd.gradcheck(call, inputs)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_the_addition_before_the_call(norm, dtype):
    x, residual, weight = (torch.randn(s).to(dtype).requires_grad_() for s in ((5, 33), (5, 33), (33,)))
    out, summed = norm(x, weight, residual=residual)
    assert summed.equal(x + residual)
    assert out.equal(norm(x + residual, weight))
    upstream = torch.randn_like(out), torch.randn_like(out)
    fused = torch.autograd.grad((out, summed), (x, residual, weight), upstream)
    apart = torch.autograd.grad((norm(x + residual, weight), x + residual), (x, residual, weight), upstream)
    # Apart, each of the two gradients is rounded before they are added.
    tolerances = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {}
    for got, want in zip(fused, apart):
        torch.testing.assert_close(got, want, **tolerances)
    (only_sum,) = torch.autograd.grad(norm(x, weight, residual=residual)[1], x, upstream[1])
    assert only_sum.equal(upstream[1])


def test_equals_pytorch():
    x, weight, bias = torch.randn(4, 5, 24), torch.randn(24), torch.randn(24)
    expected = F.layer_norm(x, (24,), weight, bias, 1e-3)
    torch.testing.assert_close(layer_norm(x, weight, bias=bias, eps=1e-3), expected)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), F.rms_norm(x, (24,), weight, 1e-3))


@BOTH
def test_weight_offset_is_added_in_float32(norm):
    """1 + 2^-10 is 1 in bfloat16."""
    x = torch.randn(8, 64).bfloat16()
    small = torch.full((64,), 2.0**-10, dtype=torch.bfloat16)
    wide = norm(x.float(), torch.full((64,), 1 + 2.0**-10))
    assert norm(x, small, weight_offset=1.0).equal(wide.bfloat16())
    assert not norm(x, small, weight_offset=1.0).equal(norm(x, small + 1))


def test_rms_norm_rounds_once_as_gemma_and_within_a_place_of_llama():
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    normalized = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gemma = (normalized * (1.0 + weight.float())).bfloat16()
    llama = weight * normalized.bfloat16()
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-6, weight_offset=1.0), gemma, rtol=2**-7, atol=0)
    ours = rms_norm(x, weight, eps=1e-6)
    torch.testing.assert_close(ours, llama, rtol=2**-7, atol=0)
    assert not ours.equal(llama)


@BOTH
def test_parameters_in_float32_keep_the_dtype_of_x(norm):
    x, weight = torch.randn(4, 16).bfloat16().requires_grad_(), torch.randn(16, requires_grad=True)
    out = norm(x, weight)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x, weight.bfloat16()).dtype == torch.bfloat16


@BOTH
@pytest.mark.parametrize("width", [7, 256, 1031])
def test_a_row_does_not_depend_on_its_batch(norm, width):
    x, weight = torch.randn(9, width), torch.randn(width)
    whole = norm(x, weight)
    assert torch.cat([norm(x[i : i + 1], weight) for i in range(9)]).equal(whole)


@needs_native
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_row_does_not_depend_on_its_batch(norm, dtype):
    x, weight, residual, dy, ds = (torch.randn(s).to(dtype) for s in ((70, 131), (131,), *[(70, 131)] * 3))
    with rlhf_kernels.backend("native"):
        whole = differentiated(norm, (x, weight, residual), (dy, ds))[2]
        for i in (0, 63, 64, 69):
            own = slice(i, i + 1)
            alone = differentiated(norm, (x[own], weight, residual[own]), (dy[own], ds[own]))[2]
            assert alone.equal(whole[own])


@needs_native
@BOTH
@pytest.mark.parametrize(("rows", "width"), [(300, 257), (3, 40000)])
def test_bits_do_not_depend_on_the_number_of_threads(norm, rows, width, threads):
    """Those of the weight's gradient neither, which is a sum over rows."""
    inputs = torch.randn(rows, width), torch.randn(width), torch.randn(rows, width)
    with rlhf_kernels.backend("native"):
        threads(1)
        alone = differentiated(norm, inputs)
        threads(3)
        shared = differentiated(norm, inputs)
    for one, three in zip(alone, shared):
        assert one.equal(three)


@needs_native
@BOTH
@pytest.mark.parametrize("layout", ["sliced", "misaligned", "expanded", "transposed"])
def test_memory_layout_changes_no_bit(norm, layout):
    plain, weight, dy = torch.randn(6, 67), torch.randn(67), torch.randn(6, 67)
    x = {
        "sliced": lambda: torch.cat([torch.randn(6, 3), plain, torch.randn(6, 2)], 1)[:, 3:70],
        "misaligned": lambda: torch.cat([torch.zeros(1), plain.flatten()])[1:].view(6, 67),
        "expanded": lambda: plain[:1].expand(6, 67),
        "transposed": lambda: plain.t().contiguous().t(),
    }[layout]()
    with rlhf_kernels.backend("native"):
        got = differentiated(norm, (x, weight), (dy.t().contiguous().t(),))
        want = differentiated(norm, (x.contiguous(), weight.contiguous()), (dy,))
        strided = norm(x, torch.stack([weight, weight], 1)[:, 0])
    assert all(a.equal(b) for a, b in zip(got, want))
    assert strided.equal(want[0])


@needs_native
@BOTH
@pytest.mark.parametrize("rows", [0, 1, 64, 65])
def test_gradient_of_the_weight_at_the_ends_of_a_group(norm, rows):
    x, weight, dy = (torch.randn(s, dtype=torch.float64) for s in ((rows, 9), (9,), (rows, 9)))
    with rlhf_kernels.backend("native"):
        got = differentiated(norm, (x, weight), (dy,))
    with rlhf_kernels.backend("reference"):
        want = differentiated(norm, (x, weight), (dy,))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    assert rows or got[2].equal(torch.zeros_like(weight))


@needs_native
@BOTH
def test_float32_weight_of_a_bfloat16_input(norm):
    x, dy = torch.randn(130, 300).bfloat16(), torch.randn(130, 300).bfloat16()
    weight = torch.randn(300)
    with rlhf_kernels.backend("native"):
        out, grad_x, grad_weight = differentiated(norm, (x, weight), (dy,))
    with rlhf_kernels.backend("reference"):
        want = differentiated(norm, (x.double(), weight.double()), (dy.double(),))
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for got, exact in zip((out, grad_x), want):
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(grad_weight.double(), want[2], rtol=1e-5, atol=1e-4)


@needs_native
def test_a_row_far_from_zero_keeps_its_digits():
    """The mean is not a float32; what it leaves over is taken off as well."""
    x = 1000 + torch.randn(4, 515)
    exact = F.layer_norm(x.double(), (515,))
    with rlhf_kernels.backend("native"):
        torch.testing.assert_close(layer_norm(x, torch.ones(515)).double(), exact, rtol=1e-6, atol=1e-6)


@needs_native
@BOTH
def test_a_row_with_nan_spoils_no_other(norm):
    x = torch.randn(5, 33)
    x[2, 7] = torch.nan
    with rlhf_kernels.backend("native"):
        out, grad_x, grad_weight = differentiated(norm, (x, torch.randn(33)))
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()
    assert grad_x[[0, 1, 3, 4]].isfinite().all()
    assert grad_weight.isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"x": torch.ones(2, 4, dtype=torch.int64)},
            TypeError,
            r"x must be float32.*got int64 \(2, 4\).*\.float\(\)",
        ),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have one element .*\(4,\), got \(3,\)"),
        ({"weight": torch.ones(4).half()}, TypeError, r"weight must be torch.float32 .*got torch.float16"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"weight_offset": "1"}, TypeError, "weight_offset must be a Python number, got str"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        (
            {"residual": torch.ones(2, 3)},
            ValueError,
            r"residual must have the shape of x, \(2, 4\), got \(2, 3\)",
        ),
        ({"residual": torch.ones(2, 4).half()}, TypeError, "residual must have the dtype of x, float32"),
    ],
)
@BOTH
def test_bad_input(norm, change, error, text):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4)} | change
    with pytest.raises(error, match=rf"{norm.__name__}\(\): {text}"):
        norm(**arguments)


def test_bad_bias():
    with pytest.raises(
        ValueError, match=r"layer_norm\(\): bias must have the shape of weight, \(4,\), got \(5,\)"
    ):
        layer_norm(torch.ones(2, 4), torch.ones(4), bias=torch.ones(5))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_float64_takes_a_float32_weight(name):
    function = getattr(rlhf_kernels, name)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    out = function(x, weight)
    torch.testing.assert_close(out, function(x, weight.double()), rtol=0, atol=0)
    out.sum().backward()
    assert out.dtype is x.grad.dtype is torch.float64
    assert weight.grad.dtype is torch.float32


@BOTH
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_statistics_that_the_forward_did_not_keep_are_computed(norm, backend):
    """As when the forward of another backend ran; zeros stand for them."""
    kernel = importlib.import_module(f"rlhf_kernels.ops.norm.kernel_{backend}")
    x, grad, weight = torch.randn(5, 300) * 3 + 2, torch.randn(5, 300), torch.randn(300)
    center = norm is layer_norm
    statistics = kernel.forward(x, weight, None, None, 1e-5, 0.0, center)[2]
    kept = kernel.backward(grad, None, x, weight, None, statistics, 1e-5, 0.0, center)
    assert statistics.ne(0).any(-1).all()
    again = kernel.backward(grad, None, x, weight, None, torch.zeros_like(statistics), 1e-5, 0.0, center)
    torch.testing.assert_close(again, kept)


def test_plain_form_keeps_no_statistics_but_its_operator_has_them():
    """Zeros of 3 numbers a row cost as much as half of the normalisation of a short one."""
    x, weight = torch.randn(3, 8), torch.ones(8)
    with rlhf_kernels.backend("layer_norm=torch"):
        out, summed, statistics = torch.ops.rlhf_kernels.layer_norm(x, weight, None, None, 1e-5, 0.0, True)
    assert out.equal(F.layer_norm(x, (8,)))
    assert (summed.shape, statistics.shape) == ((0,), (3, 3))
    assert not statistics.any()
    assert kernel_torch.forward(x, weight, None, None, 1e-5, 0.0, True)[1:] == (None, None)
