"""What only a GPU can show: every backend, side streams, graph capture, a second device, 64-bit offsets."""

import pytest
import torch

import rlhf_kernels
from rlhf_kernels.engine.check import check_case
from rlhf_kernels.engine.spec import as_outputs, load_specs
from rlhf_kernels.runtime.dispatch import unavailable

if not torch.cuda.is_available():
    pytest.skip("no CUDA device on this machine", allow_module_level=True)

SPECS = load_specs()


def _backends(spec):
    """Backends of this op that run on the GPU here; the definition is what they are checked against."""
    return [name for name in spec.op.backends("cuda") if name != "reference"]


GRID = [
    pytest.param(
        spec,
        name,
        case,
        dtype,
        id=f"{spec.name}-{name}-{case.name}-{str(dtype)[6:]}",
        marks=[pytest.mark.slow] if case.tier == "large" else [],
    )
    for spec in SPECS.values()
    for name in _backends(spec)
    for case in spec.cases
    for dtype in case.dtypes
]
PAIRS = [
    pytest.param(spec, name, id=f"{spec.name}-{name}") for spec in SPECS.values() for name in _backends(spec)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_room():
    """Gives back what a test took, since other processes test on the same GPU."""
    yield
    if torch.cuda.memory_reserved() > 4 << 30:
        torch.cuda.empty_cache()


def _skip_missing(name):
    reason = unavailable(name, "cuda")
    if name == "gluon" and torch.cuda.get_device_capability()[0] != 9:
        reason = "it is for Hopper"
    if reason:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize(("spec", "name", "case", "dtype"), GRID)
def test_right_on_the_gpu(spec, name, case, dtype):
    _skip_missing(name)
    for row in check_case(spec, case, dtype, name, device="cuda"):
        if row.status == "unavailable" and name != "torch":  # by dtype, option or head size
            pytest.skip(row.reason)
        assert row.status == "ok", f"{row.direction}: {row.reason}"


def _smoke(spec, name, device="cuda"):
    """Inputs of the first small case that this backend serves."""
    case, dtype = next(
        (case, dtype)
        for case in spec.cases
        if case.tier in ("smoke", "typical")
        for dtype in case.dtypes
        # Gluon refuses by head size.
        if name != "gluon" or spec.op.unsupported(name, "cuda", dtype, case.sizes["D"]) is None
    )
    return spec.make(case, dtype, torch.Generator().manual_seed(3), torch.device(device))


def _call(spec, inputs):
    return as_outputs(spec.function(**inputs.args))


@pytest.mark.parametrize(("spec", "name"), PAIRS)
def test_follows_the_current_stream(spec, name):
    """Inputs written late on a side stream: a kernel on another stream would read what was there before."""
    _skip_missing(name)
    inputs = _smoke(spec, name)
    with rlhf_kernels.backend(name):
        expected = [o.clone() for o in _call(spec, inputs)]
        late = inputs.map(lambda t: torch.zeros_like(t))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for target, source in zip(late.tensors(), inputs.tensors()):
                target.copy_(source)
            got = _call(spec, late)
        torch.cuda.synchronize()
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("spec", "name"), PAIRS)
def test_graph_capture(spec, name):
    """Captured once, replayed on new inputs: no host synchronisation, no allocation outside the pool."""
    _skip_missing(name)
    inputs = _smoke(spec, name)
    if any(isinstance(value, torch.Generator) for value in inputs.args.values()):
        pytest.skip("a generator on the host cannot be captured")
    if (spec.name, name) == ("attention_varlen", "torch"):
        pytest.skip("it reads the lengths on the host")
    with rlhf_kernels.backend(name):
        _call(spec, inputs)  # compile and warm up outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _call(spec, inputs)
        for tensor in inputs.tensors():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, _call(spec, inputs)):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("spec", "name"), PAIRS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device(spec, name):
    """Tensors on cuda:1 while cuda:0 is current."""
    _skip_missing(name)
    with rlhf_kernels.backend(name), torch.cuda.device(0):
        first = _call(spec, _smoke(spec, name, "cuda:0"))
        second = _call(spec, _smoke(spec, name, "cuda:1"))
    for a, b in zip(first, second):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["native", "triton"])
def test_beyond_32_bit_offsets(name):
    """More than 2^31 elements in one tensor."""
    _skip_missing(name)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    rows, cols = (1 << 16) + 8, 1 << 15
    x = torch.ones(rows, cols, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3.0
    with rlhf_kernels.backend(name):
        out = rlhf_kernels.masked_normalize(x, dim=-1, zero_masked=True, center=False)
    assert torch.isfinite(out[-1]).all()
    assert out[-1, -1] != out[0, 0]


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_more_heads_than_a_grid_has_on_its_later_axes(name):
    """B * H above 65,535."""
    _skip_missing(name)
    q = torch.randn(33_000, 2, 3, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with rlhf_kernels.backend(name, strict=True):
        out = rlhf_kernels.attention(q, q, q, causal=True)
        (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
        last = q[-1:].detach().requires_grad_()
        alone = rlhf_kernels.attention(last, last, last, causal=True)
        (expected,) = torch.autograd.grad(alone, last, torch.ones_like(alone))
    torch.testing.assert_close(out[-1:], alone)
    torch.testing.assert_close(grad[-1:], expected)
