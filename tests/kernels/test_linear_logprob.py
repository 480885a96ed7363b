"""linear_logprob: what the specs' loops do not ask."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels
from rlhf_kernels import linear_logprob, logprob
from rlhf_kernels.engine.memory import peak_bytes
from rlhf_kernels.ops.loss_head import linear_blocks, linear_kernel_torch
from rlhf_kernels.runtime import native
from tests.golden.load import golden

BUILT = not native.missing("_C")
needs_native = pytest.mark.skipif(not BUILT, reason="the native kernels are not built")
FAST = ["torch", pytest.param("native", marks=needs_native)]
TARGET = torch.zeros(2, dtype=torch.int64)
BACKENDS = pytest.mark.parametrize("backend", [*FAST, "reference"])


def randn(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


@pytest.mark.parametrize("package", sorted({r["package"] for r in golden("linear_logprob")}))
def test_linear_is_what_other_stacks_compute(package):
    for record in golden("linear_logprob", package):
        inputs = record["inputs"]
        upstream = [inputs.pop(f"grad_{name}") for name in ("logprob", "entropy")]
        wrt = {name: inputs[name].requires_grad_() for name in record["grads"]}
        found = linear_logprob(**inputs, **record["kwargs"])
        for got, name in zip(found, ("logprob", "entropy")):
            torch.testing.assert_close(got, record["outputs"][name], rtol=1e-5, atol=1e-5)
        for got, name in zip(torch.autograd.grad(found, list(wrt.values()), upstream), wrt):
            torch.testing.assert_close(got, record["grads"][name], rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_linear_gradients_through_both_results(backend, softcap):
    hidden, weight, bias = randn(5, 4), randn(6, 4), randn(6)
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    target = torch.tensor([0, 5, -1, 2, 2])

    def call(hidden, weight, bias):
        options = {"bias": bias, "temperature": 1.3, "softcap": softcap, "ignore_index": -1}
        return linear_logprob(hidden, weight, target, **options)

    with rlhf_kernels.backend(backend):
        assert torch.autograd.gradcheck(call, inputs)


def test_linear_is_logprob_of_the_product():
    """Over the border of a block of rows."""
    n = linear_blocks.ROWS + 1
    hidden, weight, target = randn(n, 6), randn(9, 6), torch.randint(0, 9, (n,))
    both = [[t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2)]
    fused = linear_logprob(*both[0], target, temperature=0.8)
    apart = logprob(F.linear(*both[1]), target, temperature=0.8)
    for got, want in zip(fused, apart):
        torch.testing.assert_close(got, want)
    upstream = randn(n), randn(n)
    for got, want in zip(*(torch.autograd.grad(o, i, upstream) for o, i in zip((fused, apart), both))):
        torch.testing.assert_close(got, want)


class Largest(TorchDispatchMode):
    """The largest tensor that comes into being, and how many matrix products do."""

    def __init__(self):
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        sizes = [
            t.untyped_storage().nbytes() // t.element_size() for t in found if isinstance(t, torch.Tensor)
        ]
        self.numel = max(self.numel, *sizes, 0)
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
            getattr(torch.ops.mkldnn, "_linear_pointwise", None),
        )
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_logits_are_never_held(dtype, softcap):
    n, e, v = 8 * linear_blocks.ROWS, 8, 100
    hidden, weight, target = (
        torch.randn(n, e).to(dtype),
        torch.randn(v, e).to(dtype),
        torch.randint(0, v, (n,)),
    )
    options = (0.7, softcap, -100)
    with Largest() as seen:
        results = linear_kernel_torch.forward(hidden, weight, None, target, *options)
        grads = torch.ones(n), torch.ones(n)
        operands = (*grads, hidden, weight, None, target, *results[1:4])
        linear_kernel_torch.backward(*operands, *options, [True, True, False])
    assert seen.numel <= 2 * linear_blocks.ROWS * v
    assert seen.numel < n * v / 2


@BACKENDS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "library"])
def test_linear_outputs_are_those_of_the_logits(backend, compiled):
    """Over the border of a block; ties, a cap, ignored rows; no gradient, and none lost."""
    n = linear_blocks.ROWS + 3
    hidden, weight, bias = torch.randn(n, 6), torch.randn(9, 6, requires_grad=True), torch.randn(9)
    logits = 2.0 * torch.tanh(F.linear(hidden, weight, bias) / 2.0) / 0.7
    target = logits.argmax(-1)
    target[::2] = 1
    hidden[0], bias[:3] = 0, 5.0  # three tokens are the largest of row 0: 1 is not the first
    logits = 2.0 * torch.tanh(F.linear(hidden, weight, bias) / 2.0) / 0.7
    target[5] = -100
    real = target != -100
    names = ("is_top1", "log_sum_p2", "mean_logit")
    options = {"bias": bias, "temperature": 0.7, "softcap": 2.0, "outputs": names}
    function = linear_logprob
    if compiled:
        function = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    with rlhf_kernels.backend(backend):
        logp, entropy, is_top1, squares, mean = function(hidden, weight, target, **options)
        (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), weight)
    assert is_top1.dtype is torch.bool
    assert not mean.requires_grad
    assert not squares.requires_grad
    assert not is_top1[0]
    assert is_top1.equal((logits.argmax(-1) == target) & real)
    torch.testing.assert_close(mean, logits.mean(-1).detach().masked_fill(~real, 0))
    expected = logits.detach().softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(squares, expected.masked_fill(~real, 0))
    plain = linear_logprob(hidden, weight, target, bias=bias, temperature=0.7, softcap=2.0)
    torch.testing.assert_close((logp, entropy), plain)
    torch.testing.assert_close(grad, torch.autograd.grad(plain[0].sum() + plain[1].sum(), weight)[0])


def test_a_frozen_weight_costs_no_product():
    hidden, weight, target = torch.randn(4, 8), torch.randn(9, 8), torch.randint(0, 9, (4,))
    results = linear_kernel_torch.forward(hidden, weight, None, target, 1.0, None, -100)
    operands = (torch.ones(4), torch.ones(4), hidden, weight, None, target, *results[1:4], 1.0, None, -100)
    counts = []
    for wanted in ([True, True, False], [True, False, False], [False, True, False]):
        with Largest() as seen:
            found = linear_kernel_torch.backward(*operands, wanted)
        assert [bool(t.numel()) for t in found] == wanted
        counts.append(seen.products)
    assert counts == [3, 2, 2]
    (grad,) = torch.autograd.grad(linear_logprob(hidden.requires_grad_(), weight, target)[0].sum(), hidden)
    with rlhf_kernels.backend("reference"):
        (expected,) = torch.autograd.grad(linear_logprob(hidden, weight, target)[0].sum(), hidden)
    torch.testing.assert_close(grad, expected)


@needs_native
def test_linear_native_holds_one_block_of_logits():
    """Beside the gradients: 512 rows of logits, and little more."""
    n, e, v = 4 * linear_blocks.ROWS, 16, 3000
    hidden, weight = torch.randn(n, e, requires_grad=True), torch.randn(v, e, requires_grad=True)
    target, upstream = torch.randint(0, v, (n,)), (torch.randn(n), torch.randn(n))

    def call():
        with rlhf_kernels.backend("native", strict=True):
            torch.autograd.grad(linear_logprob(hidden, weight, target), (hidden, weight), upstream)

    block, gradients = linear_blocks.ROWS * v * 4, (n + v) * e * 4
    assert block < peak_bytes(call, torch.device("cpu")) < 1.1 * block + gradients + 40 * n


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(2, 1, 3)}, ValueError, r"hidden must be \[N, E\].*hidden\.flatten\(0, -2\)"),
        (
            {"weight": torch.zeros(5, 4)},
            ValueError,
            r"weight must have a row of hidden's size .*\(5, 3\), got \(5, 4\)",
        ),
        ({"weight": torch.zeros(5, 3).half()}, TypeError, r"dtype of hidden.*got torch.float16.*weight\.to"),
        (
            {"bias": torch.zeros(4)},
            ValueError,
            r"bias must have one element for each token, \(5,\), got \(4,\)",
        ),
        ({"target": TARGET - 1}, ValueError, "below 5 or -100, which is ignored, got -1"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        (
            {"outputs": ("top",)},
            ValueError,
            "outputs must be among mean_logit, is_top1, log_sum_p2, got 'top'",
        ),
        (
            {"outputs": "mean_logit"},
            TypeError,
            r"outputs must be a list of names, got 'mean_logit'. Pass \['mean_logit'\]",
        ),
    ],
)
def test_linear_bad_input(change, error, text):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "target": TARGET} | change
    with pytest.raises(error, match=rf"linear_logprob\(\): .*{text}"):
        linear_logprob(**arguments)
