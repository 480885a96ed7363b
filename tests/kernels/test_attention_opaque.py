"""Attention behind an operator that autograd does not see into: its backward reads the log-sum-exp."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels import RotaryTables, attention, attention_prefix, attention_varlen, backend, rotary_tables
from rlhf_kernels.engine.memory import peak_bytes
from rlhf_kernels.engine.spec import as_outputs
from rlhf_kernels.ops.attention import kernel_torch, prefix_kernel_torch, varlen_kernel_torch
from tests.kernels.recorder import Recorder

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _tables(queries, keys):
    tables = (rotary_tables(positions, 8, xpos_scale_base=16) for positions in (queries, keys))
    return RotaryTables(next(tables).query, next(tables).key)


def _attention(queries, keys, **options):
    shapes = {"q": (2, 4, queries, 8), "k": (2, 2, keys, 8), "v": (2, 2, keys, 8)}
    return attention, shapes, options


def _prefix(**options):
    own, shared = (4, 2, 6, 8), (2, 2, 5, 8)
    shapes = {"q": (4, 4, 3, 8), "k": own, "v": own, "prefix_k": shared, "prefix_v": shared}
    return attention_prefix, shapes, options


def _varlen(lengths, lengths_k=None, behind=0, rotary=False, **options):
    rows, keys = (sum(each) + behind for each in (lengths, lengths_k or lengths))
    shapes = {"q": (rows, 4, 8), "k": (keys, 2, 8), "v": (keys, 2, 8)}
    options["cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0)
    if lengths_k:
        options["cu_seqlens_k"] = torch.tensor((0, *lengths_k)).cumsum(0).int()
    if rotary:
        options["rotary"] = _tables(torch.arange(rows) % 7, torch.arange(keys) % 7)
    return attention_varlen, shapes, options


def _mask(*shape):
    """The first row sees nothing."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0] = False
    return mask


CASES = {
    "full": _attention(9, 12),
    "causal": _attention(12, 12, causal=True, scale=0.7),
    "last queries": _attention(5, 12, causal=True),
    "more queries than keys": _attention(12, 5, causal=True),
    "one query": _attention(1, 12, causal=True),
    "window": _attention(12, 9, window=3),
    "mask": _attention(9, 12, causal=True, key_mask=_mask(2, 12)),
    "rotary and mask": _attention(
        5, 12, key_mask=_mask(2, 12), rotary=_tables(torch.arange(7, 12), torch.arange(24).view(2, 12))
    ),
    "log-sum-exp": _attention(12, 5, causal=True, return_lse=True),
    "softcap": _attention(9, 9, causal=True, softcap=2.0),
    "no keys": _attention(5, 0),
    "prefix": _prefix(),
    "prefix with masks": _prefix(key_mask=_mask(4, 6), prefix_mask=_mask(2, 5)),
    "prefix with rotary": _prefix(rotary=rotary_tables(torch.arange(11), 8)),
    "prefix with log-sum-exp": _prefix(return_lse=True),
    "packed": _varlen((7, 1, 12), causal=True),
    "packed with empty ones": _varlen((0, 7, 0, 12, 0), causal=True, behind=3),
    "packed with rotary": _varlen((7, 5), causal=True, rotary=True, behind=2),
    "packed with window": _varlen((12, 5), window=3, rotary=True),
    "packed across": _varlen((5, 7, 0, 9), (9, 3, 4, 0), causal=True, rotary=True),
    "packed with softcap": _varlen((7, 5), softcap=2.0, rotary=True),
    "packed with log-sum-exp": _varlen((7, 0, 5), (3, 2, 9), causal=True, behind=2, return_lse=True),
    "no packed sequence": _varlen((), behind=3, rotary=True),
}


def _made(name, dtype):
    """(function of leaves, leaves); rows behind the last sequence, which nobody may read, hold NaN."""
    function, shapes, options = CASES[name]
    generator = torch.Generator().manual_seed(2)
    leaves = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    bounds = options.get("cu_seqlens")
    for key, leaf in leaves.items():
        if bounds is not None:
            leaf[options.get("cu_seqlens_k", bounds)[-1] if key in "kv" else bounds[-1] :] = torch.nan
        leaf.requires_grad_()
    return lambda *given: function(**dict(zip(leaves, given)), **options), list(leaves.values())


def _gradients(outputs, leaves):
    """By the gradients 1, 2, ... of all outputs; -inf gets none."""
    total = 0
    for out in as_outputs(outputs):
        weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        total = total + (out.masked_fill(out.isinf(), 0) * weights).sum()
    return torch.autograd.grad(total, leaves, materialize_grads=True)


def _close(got, want, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("known", [True, False], ids=["known", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(name, dtype, known, monkeypatch):
    """Also where PyTorch's kernel does not tell the log-sum-exp, as on a GPU."""
    function, leaves = _made(name, dtype)
    with backend("torch"):
        want = function(*leaves)
        want_gradients = _gradients(want, leaves)
        if not known:
            monkeypatch.setattr(kernel_torch, "_tells_lse", lambda *_: False)
        with Recorder() as recorder:  # a mode: calls go through the operators
            got = function(*leaves)
            gradients = _gradients(got, leaves)
    assert len(recorder.calls) == 2
    _close(as_outputs(got), as_outputs(want), dtype)
    _close(gradients, want_gradients, dtype)
    assert all(gradient.isfinite().all() for gradient in gradients)


class Calls(TorchDispatchMode):
    """Counts what runs inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inside_backward(monkeypatch):
    """The calls that the backward of each room makes."""
    calls = Calls()

    def watched(backward):
        def run(*args):
            with calls:
                return backward(*args)

        return run

    for room in (kernel_torch, varlen_kernel_torch, prefix_kernel_torch):
        monkeypatch.setattr(room, "backward", watched(room.backward))
    return calls.names


@pytest.mark.parametrize("name", ["rotary and mask", "log-sum-exp", "prefix with rotary", "packed across"])
def test_the_backward_runs_no_forward(name, inside_backward):
    function, leaves = _made(name, torch.float32)
    with backend("torch"), Recorder():
        _gradients(function(*leaves), leaves)
    assert FLASH_BACKWARD in inside_backward
    assert FLASH not in inside_backward


@pytest.mark.parametrize("name", [name for name in CASES if "packed" in name])
def test_packed_sequences_in_a_graph(name, inside_backward):
    """A graph does not know cu_seqlens, and holds our operator."""
    function, leaves = _made(name, torch.float64)
    want = function(*leaves)
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    _close(as_outputs(got), as_outputs(want), torch.float64)
    _close(_gradients(got, leaves), _gradients(want, leaves), torch.float64)
    if "softcap" not in name:
        lengths = (CASES[name][2].get(key) for key in ("cu_seqlens", "cu_seqlens_k"))
        lengths = [bounds.diff() for bounds in lengths if bounds is not None]
        times = 1 + ("log-sum-exp" in name)
        assert inside_backward.count(FLASH_BACKWARD) == times * (torch.stack(lengths) > 0).all(0).sum()
        assert FLASH not in inside_backward


@pytest.mark.parametrize("name", ["log-sum-exp", "prefix with log-sum-exp"])
def test_log_sum_exp_in_a_graph(name):
    """Which holds no operator of ours, but what that is made of."""
    function, leaves = _made(name, torch.float64)
    torch._dynamo.reset()
    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), function(*leaves)
    _close(as_outputs(got), as_outputs(want), torch.float64)
    _close(_gradients(got, leaves), _gradients(want, leaves), torch.float64)


@pytest.mark.parametrize("gradients", ["not recorded", "not needed", "taken"])
def test_log_sum_exp_without_all_scores(gradients):
    wanted = gradients != "not needed"
    q, k, v = (torch.randn(1, heads, 512, 16, requires_grad=wanted) for heads in (2, 1, 1))

    def call():
        outputs = attention(q, k, v, causal=True, return_lse=True)
        return outputs if gradients != "taken" else torch.autograd.grad(map(torch.sum, outputs), (q, k, v))

    with torch.set_grad_enabled(gradients == "taken"), backend("torch"):
        held = peak_bytes(call, torch.device("cpu"))
    assert held < 512 * 512 * 4, "the scores of a head"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_the_log_sum_exp_are_as_exact_as_by_the_scores(dtype):
    """257 lies between two numbers of bfloat16: two columns hold it."""
    q, k = (torch.randn(1, 2, 300, 32, dtype=dtype, requires_grad=True) for _ in range(2))

    def gradients(q, k):
        lse = ((q @ k.transpose(-2, -1)) / 32**0.5).logsumexp(-1)
        return torch.autograd.grad(257 * lse.sum(), (q, k))

    exact = gradients(*(x.detach().double().requires_grad_() for x in (q, k)))
    with backend("torch"):
        lse = attention(q, k, torch.zeros_like(k), return_lse=True)[1]
    found = torch.autograd.grad(257 * lse.sum(), (q, k))
    wide = [x.detach().float().requires_grad_() for x in (q, k)]
    for got, plain, want in zip(found, gradients(*wide), exact):
        errors = [(x.to(dtype).double() - want).norm() for x in (got, plain)]
        assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("name", ["log-sum-exp", "prefix with log-sum-exp", "packed with log-sum-exp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_log_sum_exp_without_gradients(name, dtype):
    """In bfloat16 and float16 PyTorch's kernel gives fewer digits."""
    function, leaves = _made(name, dtype)
    with torch.no_grad():
        with backend("torch"):
            out, lse = function(*leaves)
        with backend("reference"):
            want, want_lse = function(*(leaf.double() for leaf in leaves))
    assert lse.is_contiguous()
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    _close(out.double(), want, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(lse.double(), want_lse, rtol=tolerance, atol=tolerance)


def test_log_sum_exp_has_a_derivative_under_transforms():
    """Inside of vmap a tensor does not say that one is asked."""
    x = torch.randn(3, 1, 1, 5, 8, dtype=torch.float64, requires_grad=True)

    def total(y):
        return attention(y, y, y, causal=True, return_lse=True)[1].square().sum()

    (want,) = torch.autograd.grad(sum(map(total, x)), x)
    torch.testing.assert_close(torch.func.grad(lambda y: torch.vmap(total)(y).sum())(x.detach()), want)
