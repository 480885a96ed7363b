"""The check: each way to be wrong is planted, and caught."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from rlhf_kernels.engine import check, poison
from rlhf_kernels.engine.bench import Bench
from rlhf_kernels.engine.check import Judge, check_case, deviation
from rlhf_kernels.engine.implementations import of_backend
from rlhf_kernels.engine.roofs import Roofs
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.spec import Case, load_specs
from rlhf_kernels.ops.swiglu import kernel_torch
from rlhf_kernels.ops.swiglu.spec import SPECS
from rlhf_kernels.runtime import dispatch
from rlhf_kernels.stacks import Unavailable

SWIGLU = SPECS[0]
CPU = torch.device("cpu")
allocate = torch._C._dynamo.guards._empty_strided_cpu  # what native kernels allocate with


def swiglu(x, gate=None, gate_first=False):
    return kernel_torch.swiglu(x, gate, gate_first=gate_first)


def _unwritten(x, gate=None, gate_first=False):
    good = swiglu(x, gate, gate_first)
    out = allocate(tuple(good.shape), good.stride(), good.dtype)
    out[1:] = good[1:]
    return out


def _writes_to_input(x, gate=None, gate_first=False):
    out = swiglu(x, gate, gate_first)
    x.data[0, 0] += 1
    return out


def _returns_its_input(x, gate=None, gate_first=False):
    return x[:, : x.shape[1] // 2].copy_(swiglu(x, gate, gate_first))


def _wrong_besides(x, gate=None, gate_first=False):
    return _returns_its_input(x, gate, gate_first) + 1


def _writes_between_rows(x, gate=None, gate_first=False):
    x.data.as_strided((1,), (1,), x.storage_offset() - 1).fill_(7.0)  # the gap before the first row
    return swiglu(x, gate, gate_first)


_flips = itertools.count()


def _undecided(x, gate=None, gate_first=False):
    return swiglu(x, gate, gate_first) * (1 + 1e-7 * (next(_flips) % 2))


class _DroppedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1] = 0
        return grad


def _wrong_gradient(x, gate=None, gate_first=False):
    return _DroppedGradient.apply(swiglu(x, gate, gate_first))


def _raises(x, gate=None, gate_first=False):
    raise RuntimeError("no\nsecond line")


def _cannot(x, gate=None, gate_first=False):
    raise Unavailable("not with these shapes")


@pytest.mark.parametrize(
    ("function", "case", "forward", "backward", "reason"),
    [
        (swiglu, "small_64x512", "ok", "ok", ""),
        (lambda **a: swiglu(**a) + 1e-3, "small_64x512", "incorrect", "ok", "the output is off by 0.001"),
        (_wrong_gradient, "small_64x512", "ok", "incorrect", "the gradient of x is off by"),
        (_unwritten, "small_64x512", "incorrect", "incorrect", "the output is not finite"),
        (_writes_to_input, "small_64x512", "incorrect", "incorrect", "it wrote to its inputs"),
        (_writes_between_rows, "strided_7x130", "incorrect", "incorrect", "it wrote to its inputs"),
        (_undecided, "small_64x512", "incorrect", "incorrect", "a second run gave other bits"),
        (lambda **a: swiglu(**a).double(), "small_64x512", "incorrect", "ok", "the output is float64 (64,"),
        (lambda **a: swiglu(**a)[:, :-1], "small_64x512", "error", "error", "RuntimeError"),
        (lambda **a: (swiglu(**a),) * 2, "small_64x512", "incorrect", "ok", "2 outputs, expected 1"),
        (_raises, "small_64x512", "error", "error", "RuntimeError: no"),
        (_cannot, "small_64x512", "unavailable", "unavailable", "not with these shapes"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_check_verdicts(function, case, forward, backward, reason):
    rows = Judge(SWIGLU, SWIGLU.case(case), torch.float32).rows("planted", function)
    assert [row.status for row in rows] == [forward, backward], rows
    bad = next((row for row in rows if row.status != "ok"), rows[0])
    assert bad.reason.startswith(reason), bad.reason
    assert "second line" not in bad.reason


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_returns_its_input, "it wrote to its inputs"),
        (_wrong_besides, "it wrote to its inputs; the output is off by 1, allowed is "),
    ],
)
def test_what_lies_in_the_inputs_is_said_first(function, reason):
    (row,) = Judge(SWIGLU, SWIGLU.case("small_64x512"), torch.float32).rows("planted", function, ["forward"])
    assert row.status == "incorrect"
    assert row.reason.startswith(reason), row.reason
    assert ("off by" in row.reason) == ("off by" in reason)


@pytest.mark.parametrize("n", [1, 30, 100, 700, 40_000, 3_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_of_old_memory_is_left(n, dtype):
    """Also in what `torch.empty` does not allocate, and in what was freed a moment ago.

    Of small blocks some are missed, as the module says: what PyTorch frees in between comes first.
    """
    left = 0
    for _ in range(5):
        churned = [torch.ones(n + i, dtype=dtype) for i in range(20)]
        del churned[::2]
        with poison.poisoned(CPU, [torch.empty(n, dtype=dtype)]):
            for new in (torch.empty(n, dtype=dtype), allocate((n,), (1,), dtype)):
                left += bool((new == 1).any())
                assert n < 1000 or new.isnan().all()
    assert left <= (2 if n * dtype.itemsize <= poison._SMALL else 0)


def test_unwritten_output_fails_although_old_memory_held_the_answer():
    judge = Judge(SWIGLU, SWIGLU.case("small_64x512"), torch.float32)
    for _ in range(3):
        swiglu(**judge.inputs.args)  # freed memory of the right size now holds the right values
    (row,) = judge.rows("planted", _unwritten, ["forward"])
    assert (row.status, row.error) == ("incorrect", math.inf)


def test_deviation_of_infinities_and_integers():
    inf, nan = math.inf, math.nan
    want = torch.tensor([1.0, inf, nan, 2.0, 1e9], dtype=torch.float64)
    yard = torch.tensor([1.0, inf, nan, nan, inf])
    assert deviation(torch.tensor([1.0, inf, nan, nan, inf]), want, yard, 1.0)[0] == 0  # as the yardstick
    assert deviation(torch.tensor([1.0, inf, nan, 2.0, 1e9]), want, yard, 1.0)[0] == 0  # or better
    assert deviation(torch.tensor([1.0, -inf, nan, 2.0, 1e9]), want, yard, 1.0)[0] == inf
    assert deviation(torch.tensor([nan, inf, nan, 2.0, 1e9]), want, yard, 1.0)[0] == inf
    error, allowed = deviation(torch.tensor([1.5]), torch.tensor([1.0]).double(), torch.tensor([1.125]), 2.0)
    assert (error, allowed) == (0.5, 0.25 + 2 * 2**-23)
    tokens = torch.tensor([3, 5, 7])
    assert deviation(tokens, torch.tensor([3, 5, 8]), torch.tensor([3, 5, 7]), 1.0) == (0.0, 0.0)
    assert deviation(tokens, torch.tensor([3, 4, 8]), torch.tensor([3, 4, 8]), 1.0) == (2.0, 0.0)


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.001, "incorrect")])
def test_a_gradient_that_all_rows_share_is_checked_by_some(factor, status):
    spec = load_specs()["linear_logprob"]
    case = dataclasses.replace(spec.case("small_32x64x512"), checked={"rows": (0, 5)})

    def scaled(hidden, weight, target):
        held = weight.detach()
        return spec.torch_form(hidden, held + factor * (weight - held), target)

    forward, backward = Judge(spec, case, torch.float32).rows("planted", scaled)
    assert (forward.status, backward.status) == ("ok", status)
    assert status == "ok" or "the gradient of weight" in backward.reason


def test_only_the_checked_rows_count(planted_specs):
    spec = planted_specs["planted_double"]

    def wrong_in(row):
        def function(x):
            out = 2 * x
            out[row] += 1
            return out

        return function

    judge = Judge(spec, spec.case("rows"), torch.float32)
    assert judge.reference.outputs[0].shape == (2, 8)
    assert judge.rows("planted", wrong_in(5))[0].status == "ok"
    assert judge.rows("planted", wrong_in(63))[0].status == "incorrect"


def test_padding_of_a_foreign_function_does_not_count():
    spec = load_specs()["gae"]
    case = next(c for c in spec.cases if "mask" in spec.make(c, torch.float32, torch.Generator(), CPU).args)
    judge = Judge(spec, case, torch.float32)

    def careless(**args):
        return tuple(out.masked_fill(~args["mask"], 7.0) for out in spec.torch_form(**args))

    assert judge.rows("planted", careless, ["forward"])[0].status == "incorrect"
    assert judge.rows("planted", careless, ["forward"], foreign=True)[0].status == "ok"
    wrong = judge.rows("planted", lambda **a: tuple(o + 1 for o in careless(**a)), ["forward"], foreign=True)
    assert wrong[0].reason.startswith("returns is off by 1")


def test_fall_back_is_not_the_backend_asked_for():
    rows = check_case(SWIGLU, SWIGLU.cases[0], torch.float32, "gluon")
    assert {row.status for row in rows} == {"unavailable"}
    assert rows[0].reason == "swiglu has no gluon kernel"


def test_pytorch_is_not_asked_for_the_same_bits_twice(monkeypatch):
    """Its attentions' backwards on a GPU would fail, and with them all that is timed beside them."""
    monkeypatch.setattr(check, "same_bits", lambda *_: False)
    for backend, status in (("torch", "ok"), ("native", "incorrect")):
        rows = check_case(SWIGLU, SWIGLU.cases[0], torch.float32, backend)
        assert {row.status for row in rows} in ({status}, {"unavailable"}), rows
        one = of_backend(SWIGLU, SWIGLU.cases[0], torch.float32, CPU, backend)
        bench, judge = Bench(CPU, None, Roofs(), 1), Judge(SWIGLU, SWIGLU.cases[0], torch.float32)
        found = {row.status for row in bench.candidate(judge, one).rows.values()}
        assert found in ({status}, {"unavailable"})


def test_native_kernels_are_only_where_the_op_has_some(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: None)
    for spec in load_specs().values():
        for device in ("cpu", "cuda"):
            refused = spec.op.unsupported("native", device, torch.float32) is not None
            assert refused == ("native" not in spec.op.order.get(device, ())), (spec.name, device)


def test_a_row_that_is_not_ok_has_no_time():
    with pytest.raises(ValueError, match="has no time"):
        Row("op", "impl", "case", "float32", "forward", "cpu", status="incorrect", median_us=1.0)
    row = Row("op", "impl", "case", "float32", "forward", "cpu", median_us=1.0, error=math.inf)
    assert row.failed("error", "why").median_us is None
    assert row.to_json()["error"] is None
    assert Row.from_json(json.loads(json.dumps(row.to_json()))).median_us == 1.0


def test_cases_are_found_by_name():
    case = Case("a", {"N": 1})
    assert dataclasses.replace(SWIGLU, cases=(case,)).case("a") is case
    with pytest.raises(ValueError, match="no case 'b': expected one of a"):
        dataclasses.replace(SWIGLU, cases=(case,)).case("b")
