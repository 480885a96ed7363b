"""logprob: what the specs' loops do not ask."""

import math

import numpy
import pytest
import torch

import rlhf_kernels
from rlhf_kernels import linear_logprob, logprob
from rlhf_kernels.ops.loss_head import kernel_torch
from rlhf_kernels.runtime import native
from tests.golden.load import golden

BUILT = not native.missing("_C")
needs_native = pytest.mark.skipif(not BUILT, reason="the native kernels are not built")
FAST = ["torch", pytest.param("native", marks=needs_native)]
BACKENDS = pytest.mark.parametrize("backend", [*FAST, "reference"])


def randn(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


@pytest.mark.parametrize("function", sorted({r["function"] for r in golden("logprob")}))
def test_is_what_other_stacks_compute(function):
    for record in golden("logprob", function=function):
        inputs = record["inputs"]
        logits = inputs["logits"].requires_grad_()
        found = dict(zip(("logprob", "entropy"), logprob(logits, inputs["target"], **record["kwargs"])))
        for name, expected in record["outputs"].items():
            scale = max(1.0, inputs["logits"].abs().max().item())
            torch.testing.assert_close(
                found[name], expected, rtol=1e-5, atol=1e-6 * scale, msg=record["case"]
            )
            (grad,) = torch.autograd.grad(found[name], logits, inputs[f"grad_{name}"])
            torch.testing.assert_close(grad, record["grads"]["logits"], rtol=1e-4, atol=3e-6 * scale)


@BACKENDS
def test_gradients_through_both_results(backend):
    logits, target = randn(2, 3, 7, requires_grad=True), torch.randint(0, 7, (2, 3))
    with rlhf_kernels.backend(backend):
        assert torch.autograd.gradcheck(lambda z: logprob(z, target, temperature=0.7), (logits,))


def test_second_derivative_is_the_definitions():
    logits, target = randn(2, 5, requires_grad=True), torch.tensor([1, 4])
    with rlhf_kernels.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda z: logprob(z, target), (logits,))


def test_entropy_at_its_ends():
    target = torch.zeros(1, dtype=torch.int64)
    found, entropy = logprob(torch.full((1, 1000), 3.0), target)
    torch.testing.assert_close(entropy, torch.tensor([math.log(1000)]))
    torch.testing.assert_close(found, -entropy)
    certain = torch.zeros(1, 1000).index_fill_(1, target, 200.0)
    assert [t.item() for t in logprob(certain, target)] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_vocabulary_is_harmless(dtype):
    logits = torch.randn(4, 10).to(dtype)
    logits[:, 3:] = -math.inf
    logits.requires_grad_()
    target = torch.tensor([0, 2, 5, 1])
    found = logprob(logits, target)
    short = logprob(logits[:, :3], target.clamp(max=2))
    real = torch.tensor([0, 1, 3])
    for got, want in zip(found, short):
        torch.testing.assert_close(got[real], want[real])
    assert found[0][2] == -math.inf
    assert found[1].isfinite().all()
    (grad,) = torch.autograd.grad(found, logits, (torch.ones(4), torch.ones(4)))
    assert grad.isfinite().all()
    assert not grad[real][:, 3:].any()


def test_a_row_without_a_token_spoils_no_other():
    logits = torch.randn(3, 8)
    logits[1] = -math.inf
    found = logprob(logits.requires_grad_(), torch.tensor([1, 2, 3]))
    grad = torch.autograd.grad(found, logits, (torch.ones(3), torch.ones(3)))[0]
    for t in (*found, grad):
        assert t[1].isnan().all()
        assert t[[0, 2]].isfinite().all()


def test_ignored_rows_count_for_nothing():
    """Not even NaN in them: they are padding."""
    hidden, weight, bias = torch.randn(6, 8), torch.randn(11, 8), torch.randn(11)
    target = torch.tensor([3, -100, 0, -100, 10, 7])
    real = target != -100
    hidden[1], hidden[3] = math.nan, math.inf
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    upstream = torch.randn(6), torch.randn(6)
    found = linear_logprob(hidden, weight, target, bias=bias)
    alone = linear_logprob(hidden[real], weight, target[real], bias=bias)
    for got, want in zip(found, alone):
        assert not got[~real].any()
        torch.testing.assert_close(got[real], want)
    grads = torch.autograd.grad(found, inputs, upstream)
    expected = torch.autograd.grad(alone, inputs, [g[real] for g in upstream])
    for got, want in zip(grads, expected):
        torch.testing.assert_close(got, want)
    assert not grads[0][~real].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_float32(dtype):
    """In 16 bits a log-probability near -10 is known to 0.03 at best: a ratio to 3 %."""
    logits, target = (3 * torch.randn(50, 500)).to(dtype), torch.randint(0, 500, (50,))
    for got, want in zip(logprob(logits, target), logprob(logits.double(), target)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def with_gradient(logits, target):
    """Results and the gradient of their sum."""
    logits = logits.detach().requires_grad_()
    found = logprob(logits, target, temperature=0.7)
    return *found, torch.autograd.grad(sum(t.sum() for t in found), logits)[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", FAST)
def test_a_row_does_not_depend_on_its_batch(backend, threads, monkeypatch):
    logits, target = torch.randn(5, 40001), torch.randint(0, 40001, (5,))
    monkeypatch.setattr(kernel_torch, "BLOCK", 3 * 40001)
    with rlhf_kernels.backend(backend, strict=True):
        alone = [with_gradient(logits[i : i + 1], target[i : i + 1]) for i in range(5)]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            whole = with_gradient(logits, target)
        finally:
            torch.set_num_threads(before)
    for k, together in enumerate(whole):
        assert torch.cat([row[k] for row in alone]).equal(together)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 2047, 2048, 2049, 4099])
def test_native_at_any_alignment_and_length(vocabulary, dtype):
    """The bits of a row are the same wherever it lies, and nothing beyond it is written."""
    memory = torch.randn(3 * (vocabulary + 1) + 1).to(dtype)
    target = torch.randint(0, vocabulary, (3,))
    with rlhf_kernels.backend("native", strict=True):
        strided = memory[1:].view(3, vocabulary + 1)[:, :vocabulary]
        for a, b in zip(with_gradient(strided, target), with_gradient(strided.clone(), target)):
            assert a.equal(b)
        before = memory.clone()
        found = logprob(strided, target)
        rest = (*found, torch.zeros(3, dtype=found[0].dtype), found[1])
        grads = torch.ones(3, dtype=found[0].dtype), torch.ones(3, dtype=found[0].dtype)
        in_place = torch.ops.rlhf_kernels_native.logprob_backward_
        in_place(*grads, strided, target, found[1], *rest[2:], 1.0)
    gaps = memory[1:].view(3, -1)[:, vocabulary:], before[1:].view(3, -1)[:, vocabulary:]
    assert gaps[0].equal(gaps[1])
    assert memory[0] == before[0]
    assert not strided.equal(before[1:].view(3, -1)[:, :vocabulary])


@needs_native
def test_exponents_are_right_over_their_whole_range():
    """Where all else is 0 a gradient is exp(logit): to its rounding, and that of the logit in octaves."""
    x = numpy.linspace(-87.3, 80, 2_000_000).astype(numpy.float32)
    x = numpy.concatenate([numpy.zeros(2, numpy.float32), x])
    zero = numpy.zeros(1, numpy.float32)
    target = numpy.zeros(1, numpy.int64)
    found = native.host().logprob_backward(zero - 1, zero, x[None], target, zero, zero, zero)[0]
    error = numpy.abs(found / numpy.exp(x.astype(numpy.float64)) - 1)[1:]
    assert error[0] == 0
    assert (error / (1 + numpy.abs(x[1:]))).max() < 1.2e-7


@needs_native
def test_native_refuses_targets_that_it_would_read_beyond():
    """Compiled calls do not come past the check of the public function."""
    for target in (torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(RuntimeError, match="at least 0 and below 5, and 1 are not"):
            torch.ops.rlhf_kernels_native.logprob(torch.zeros(2, 5), target, 1.0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
def test_masked_beginnings_and_late_peaks(low, backend):
    """What the first logits say of the rest is wrong here, block after block."""
    logits = torch.randn(3, 9000) + torch.linspace(-200, 400, 9000)
    logits[0, :5000] = low
    logits[1, :8999] = low
    logits[2, 100:8000] = low
    target = torch.tensor([8999, 8999, 50])
    with rlhf_kernels.backend(backend):
        found = with_gradient(logits, target)
    with rlhf_kernels.backend("reference"):
        wanted = with_gradient(logits, target)
    for got, want in zip(found, wanted):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=3e-5)
    assert not found[2][1].any()  # certain


@pytest.mark.parametrize("backend", FAST)
def test_a_row_of_the_lowest_numbers_is_even(backend):
    logits = torch.full((1, 3000), torch.finfo(torch.float32).min)
    with rlhf_kernels.backend(backend):
        found = logprob(logits, torch.tensor([7]))
    torch.testing.assert_close(torch.cat(found), torch.tensor([-1.0, 1.0]) * math.log(3000))


@pytest.mark.parametrize("backend", FAST)
def test_one_bad_logit_spoils_its_row_alone(backend):
    for bad in (math.nan, -math.nan, math.inf):
        logits = torch.randn(3, 5000)
        logits[1, 4500] = bad
        with rlhf_kernels.backend(backend):
            for t in with_gradient(logits, torch.tensor([1, 2, 3])):
                assert t[1].isnan().all()
                assert t[[0, 2]].isfinite().all()


def test_backward_can_be_repeated():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = sum(t.sum() for t in linear_logprob(hidden, weight, torch.tensor([0, 1, 2, 3, 8]), softcap=3.0))
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight))):
        assert a.equal(b)


LOGITS, TARGET = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": LOGITS.long()}, TypeError, r"logits must be float32.*got int64 \(2, 5\)"),
        ({"logits": LOGITS[:, :0]}, ValueError, r"at least one token, got \(2, 0\)"),
        (
            {"target": TARGET.int()},
            TypeError,
            r"target must be int64, got int32 \(2,\)\. Cast with target\.long",
        ),
        ({"target": [0, 0]}, TypeError, "target must be an int64 tensor, got list"),
        ({"target": TARGET[:1]}, ValueError, r"one token for each row, \(2,\), got \(1,\)"),
        ({"target": TARGET + 5}, ValueError, "at least 0 and below 5, got 5"),
        ({"target": TARGET - 100}, ValueError, "at least 0 and below 5, got -100. Give masked positions"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed.ProcessGroup, got str"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be .*number, got str"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=rf"logprob\(\): .*{text}"):
        logprob(**({"logits": LOGITS, "target": TARGET} | change))


def test_floats_of_triton_kernels_keep_their_digits_beside_float64():
    """Triton takes a Python float as float32."""
    from rlhf_kernels.runtime.launch import number

    held = number(0.7, torch.zeros(2, dtype=torch.float64))
    assert held.dtype == torch.float64
    assert held.item() == 0.7
    assert number(0.7, torch.zeros(2)) == 0.7


def test_targets_of_a_batch_that_is_mapped_over():
    logits, target = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    hidden, weight = torch.randn(4, 3, 8), torch.randn(5, 8)
    found = torch.func.vmap(lambda z, ids: logprob(z, ids)[0])(logits, target)
    torch.testing.assert_close(found, logprob(logits, target)[0])
    found = torch.func.vmap(lambda h, ids: linear_logprob(h, weight, ids)[0])(hidden, target)
    expected = linear_logprob(hidden.flatten(0, 1), weight, target.flatten())[0]
    torch.testing.assert_close(found.flatten(), expected)


@BACKENDS
@pytest.mark.parametrize("size", [torch.finfo(torch.float32).min, 1e17])
def test_equal_logits_of_any_size_are_equally_likely(backend, size):
    with rlhf_kernels.backend(backend):
        found, entropy = logprob(torch.full((1, 50), size), torch.tensor([3]))
    assert (found.item(), entropy.item()) == pytest.approx((-math.log(50), math.log(50)))
