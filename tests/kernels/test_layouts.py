"""Rows in groups, as those of `logits[:, :-1]`: native kernels read them where they are."""

import pytest
import torch

import rlhf_kernels
from rlhf_kernels.engine.memory import peak_bytes
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.runtime import native

pytestmark = pytest.mark.skipif(native.missing("_C") is not None, reason=str(native.missing("_C")))

COLUMNS = 48
WEIGHT = torch.linspace(0.5, 1.5, COLUMNS)


def _logprob(x):
    return rlhf_kernels.logprob(x, torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % x.shape[-1])


CALLS = {
    "logprob": _logprob,
    "layer_norm": lambda x: rlhf_kernels.layer_norm(x, WEIGHT[: x.shape[-1]], bias=WEIGHT[: x.shape[-1]]),
    "rms_norm": lambda x: rlhf_kernels.rms_norm(x, WEIGHT[: x.shape[-1]], residual=x),
    "swiglu": lambda x: rlhf_kernels.swiglu(x),
    "swiglu_pair": lambda x: rlhf_kernels.swiglu(x, x.detach().flip(0)),
}
LAYOUTS = {
    "all but the last": lambda x: x[:, :-1],
    "every second": lambda x: x[:, ::2],
    "turned": lambda x: x[0].transpose(0, 1),
    "spread": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "two cuts": lambda x: x[:, :-1, 1:],
    "three cuts": lambda x: x.unflatten(2, (2, 2))[:, :-1, :-1],
    "columns cut": lambda x: x[:, :-1, :, :-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_rows_in_groups_are_those_of_a_copy(name, layout):
    torch.manual_seed(1)
    x = LAYOUTS[layout](torch.randn(2, 4, 4, COLUMNS))
    found = []
    for given in (x, x.contiguous()):
        leaf = given.detach().requires_grad_()
        outputs = CALLS[name](leaf)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        graded = [o for o in outputs if o.requires_grad]
        gradient = torch.autograd.grad([o.sum() for o in graded], leaf) if graded else ()
        found.append([*outputs, *gradient])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")  # of NumPy, under the interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_reads_them_there_as_well(layout):
    pytest.importorskip("triton")
    x = LAYOUTS[layout](torch.randn(2, 4, 4, COLUMNS, generator=torch.Generator().manual_seed(1)))
    found = []
    for backend in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        with rlhf_kernels.backend(f"logprob={backend}", strict=True):
            outputs = _logprob(leaf)
            found.append((*outputs, *torch.autograd.grad([o.sum() for o in outputs], leaf)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_case_that_is_timed_is_cut_from_longer_rows():
    spec = load_specs()["logprob"]
    case = spec.case("shifted_4x64x50257")
    args = spec.make(case, torch.float32, torch.Generator().manual_seed(0), torch.device("cpu")).args
    assert (args["logits"].shape, args["target"].shape) == ((4, 64, 50257), (4, 64))
    assert args["logits"].stride() == (65 * 50257, 50257, 1)


@pytest.mark.parametrize("name", ["logprob", "layer_norm", "swiglu"])
def test_rows_in_groups_are_not_copied(name):
    x = torch.randn(4, 65, 4096)
    weight, target = torch.ones(4096), torch.zeros(4, 64, dtype=torch.long)
    call = {
        "logprob": lambda x: rlhf_kernels.logprob(x, target),
        "layer_norm": lambda x: rlhf_kernels.layer_norm(x, weight),
        "swiglu": lambda x: rlhf_kernels.swiglu(x),
    }[name]
    cut, whole = x[:, :-1], x[:, :-1].contiguous()
    assert peak_bytes(lambda: call(cut), x.device) == peak_bytes(lambda: call(whole), x.device)


def test_the_cpp_swiglu_refuses_rows_of_another_shape():
    """As many elements in other rows would be read beyond their end."""
    rlhf_kernels.swiglu(torch.ones(2, 4))  # loads the library
    with pytest.raises(RuntimeError, match="x and gate must have one shape"):
        torch.ops.rlhf_kernels_native.swiglu(torch.ones(64, 2), torch.ones(2, 64))
