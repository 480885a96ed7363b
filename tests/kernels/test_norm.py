"""layer_norm and rms_norm: what the specs' loops do not ask."""

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels
from rlhf_kernels import layer_norm, rms_norm
from tests.golden.load import golden

BOTH = pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=["layer_norm", "rms_norm"])
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


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
    for got, want in zip(fused, apart):
        torch.testing.assert_close(got, want)
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
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-6, weight_offset=1.0), gemma, rtol=2**-8, atol=0)
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
