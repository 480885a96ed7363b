"""Transforms of torch.func and forward-mode derivatives of every op; the strides that graphs are told of."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import rlhf_kernels
from rlhf_kernels.engine.spec import as_outputs, load_specs
from tests.kernels.recorder import Recorder

SPECS = [spec for spec in load_specs().values() if spec.differentiable]
# PyTorch's fused attention on a CPU has no forward-mode derivative, and says so.
NO_FORWARD_MODE = {"attention", "attention_prefix", "attention_varlen"}


def _double(spec):
    """Inputs of the smallest differentiable case in float64."""
    made = []
    for case in spec.cases:
        if case.tier in ("smoke", "awkward") and all(case.sizes.values()):
            made.append((sum(case.sizes.values()), case))
    case = min(made, key=lambda pair: pair[0])[1]
    return spec.make(case, torch.float64, torch.Generator().manual_seed(1), torch.device("cpu"))


def _of_first(spec):
    """(x -> a weighted sum of all outputs, x) for the first differentiated argument."""
    inputs = _double(spec)
    name = inputs.wrt[0]

    def total(x):
        outputs = [o for o in as_outputs(spec.function(**inputs.args | {name: x})) if o.is_floating_point()]
        return sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)

    return total, torch.nan_to_num(inputs.args[name].detach().clone())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_reverse_mode_of_torch_func(spec):
    total, x = _of_first(spec)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(x), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_forward_mode_is_right_or_refused(spec):
    total, x = _of_first(spec)
    leaf, tangent = x.clone().requires_grad_(), torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    expected = (gradient * tangent).sum()
    if spec.name in NO_FORWARD_MODE:
        with pytest.raises(NotImplementedError, match="forward"):
            torch.func.jvp(total, (x,), (tangent,))
        return
    torch.testing.assert_close(torch.func.jvp(total, (x,), (tangent,))[1], expected, rtol=1e-8, atol=1e-10)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(total(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_vmap(spec):
    total, x = _of_first(spec)
    both = torch.stack([x, x / 2])
    torch.testing.assert_close(
        torch.func.vmap(total)(both), torch.stack([total(x), total(x / 2)]), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_plain_outputs_have_the_strides_that_graphs_are_told_of(spec, backend):
    inputs = _double(spec)
    turned = inputs.map(
        lambda t: t.mT.contiguous().mT if t.dim() > 1 and t.is_floating_point() else t.detach().clone()
    )
    wrt = [turned.args[name].requires_grad_() for name in turned.wrt]
    with rlhf_kernels.backend(f"{spec.op.name}={backend}"):
        with Recorder() as recorder:
            outputs = [o for o in as_outputs(spec.function(**turned.args)) if o.requires_grad]
            torch.autograd.grad(outputs, wrt, [torch.ones_like(o) for o in outputs], allow_unused=True)
        assert recorder.calls
        for func, args, options in recorder.calls:
            real = func(*args, **options)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
                told = func(*fakes, **options)
            pairs = zip(as_outputs(real), as_outputs(told), strict=True)
            for number, (got, want) in enumerate(pairs):
                strides = zip(got.shape, got.stride(), want.stride())
                assert all(n < 2 or a == b for n, a, b in strides), f"output {number} of {func}"
