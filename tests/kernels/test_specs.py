"""What must hold for every op, looped over the specs: right on every backend, sound in torch.library."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels
from rlhf_kernels.engine.check import Judge, check_case
from rlhf_kernels.engine.spec import as_outputs, load_specs
from tests.kernels.recorder import Recorder

SPECS = load_specs()
CHECKED_TIERS = ("smoke", "typical", "awkward")
HALVES = (torch.float16, torch.bfloat16)


def _grid(backends):
    """Parameters (op, case, dtype) of the ops that have one of these backends."""
    return [
        pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype)[6:]}")
        for spec in SPECS.values()
        if set(backends) & set(spec.op.declared())
        for case in spec.cases
        if case.tier in (CHECKED_TIERS if "triton" not in backends else ("awkward",))
        for dtype in case.dtypes
    ]


def _assert_correct(judge, backend):
    rows = check_case(judge.spec, judge.case, judge.dtype, backend, judge=judge)
    assert rows
    return {row.status: f"{backend} {row.direction}: {row.reason}" for row in rows}


@pytest.mark.parametrize(("spec", "case", "dtype"), _grid(("torch", "native")))
def test_right_on_a_cpu(spec, case, dtype):
    """The plain form and the native kernel against one definition, which costs more than both."""
    judge = Judge(spec, case, dtype, torch.device("cpu"))
    # PyTorch's own arithmetic: bfloat16 stands for float16, and small sizes do where there is a kernel.
    skipped = (torch.float16,) if case.tier != "typical" or "native" not in spec.op.declared() else HALVES
    if dtype not in skipped:
        found = _assert_correct(judge, "torch")
        assert set(found) <= {"ok", "unavailable"}, found
    if "native" in spec.op.declared():
        found = _assert_correct(judge, "native")
        assert set(found) == {"ok"}, found


def _interpreted():
    """All cases in float32. What float16 adds is the same in all of an op's: every third has it."""
    grid = _grid(("triton",))
    kept = [p for p in grid if p.values[2] is torch.float32]
    for spec in SPECS.values():
        kept += [p for p in grid if p.values[0] is spec and p.values[2] is torch.float16][::3]
    return kept


@pytest.mark.parametrize(("spec", "case", "dtype"), _interpreted())
def test_interpreter_triton_is_right(spec, case, dtype):
    found = _assert_correct(Judge(spec, case, dtype, torch.device("cpu")), "triton")
    assert set(found) == {"ok"}, found


def _smallest(spec):
    """One small case per set of options."""
    seen = {}
    for case in spec.cases:
        size = 1
        for n in case.sizes.values():
            size *= n
        key = tuple(sorted((k, str(v)) for k, v in case.options.items()))
        if 0 < size <= 1 << 16 and (key not in seen or size < seen[key][0]):
            seen[key] = (size, case)
    return [case for _, case in seen.values()]


def _small_grid():
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}")
        for spec in SPECS.values()
        for case in _smallest(spec)
        if torch.float32 in case.dtypes
    ]


def _inputs(spec, case, requires_grad=True):
    inputs = spec.make(case, torch.float32, torch.Generator().manual_seed(1), torch.device("cpu"))
    args = inputs.map(lambda t: t.detach().clone() if t.is_contiguous() else t.detach())
    for name in inputs.wrt:
        args.args[name] = args.args[name].requires_grad_(requires_grad)
    return args


@pytest.mark.parametrize(("spec", "case"), _small_grid())
def test_opcheck(spec, case):
    """Schema, fake kernel, autograd registration and AOT dispatch for any shape; for one: tests of graphs."""
    inputs = _inputs(spec, case)
    with Recorder() as recorder:
        spec.function(**inputs.args)
    assert recorder.calls, f"{spec.name} did not reach its operator under a dispatch mode"
    func = recorder.calls[0][0]
    args = _positional(spec, func, recorder.calls[0])
    torch.library.opcheck(
        func, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    torch.library.opcheck(func, args, test_utils="test_aot_dispatch_dynamic")


def _positional(spec, func, call):
    """The recorded call with the differentiated tensors as leaves again (the mode sees them detached)."""
    _, args, kwargs = call
    assert not kwargs
    first = True
    result = []
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dtype == torch.float32:
            # To opcheck NaN differs from NaN: here masked slots hold 0.
            arg = arg.nan_to_num(nan=0.0) if arg.isnan().any() else arg
            arg = arg.detach().requires_grad_(first)
            first = False
        result.append(arg)
    return tuple(result)


@pytest.mark.parametrize(("spec", "case"), _small_grid())
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(spec, case, dynamic):
    torch._dynamo.reset()
    inputs = _inputs(spec, case)
    options = {k: v for k, v in inputs.args.items() if not isinstance(v, torch.Tensor)}
    tensors = {k: v for k, v in inputs.args.items() if isinstance(v, torch.Tensor)}

    def call(**given):
        return as_outputs(spec.function(**given, **options))

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, want in zip(compiled(**tensors), call(**tensors)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    wrt = [inputs.args[name] for name in inputs.wrt]
    if wrt:
        outputs = [o for o in compiled(**tensors) if o.requires_grad]
        plain = [o for o in call(**tensors) if o.requires_grad]
        gradients = torch.autograd.grad(outputs, wrt, [torch.ones_like(o) for o in outputs])
        expected = torch.autograd.grad(plain, wrt, [torch.ones_like(o) for o in plain])
        for got, want in zip(gradients, expected):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def _of_length(spec, n):
    """The first case with n steps, or rows where it has no steps."""
    case = spec.cases[0]
    steps = [letter for letter in ("T", "S", "U", "C") if letter in case.sizes]
    letters = steps or [letter for letter in ("N", "B") if letter in case.sizes]
    options = dict(case.options) | ({"lengths": (n, 3, n)} if "lengths" in case.options else {})
    return dataclasses.replace(case, sizes=dict(case.sizes) | dict.fromkeys(letters, n), options=options)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_compiled_once_for_all_lengths(spec):
    """Once for the first, and once more for every other."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    options = {}
    compiled = torch.compile(
        lambda tensors: as_outputs(spec.function(**tensors, **options)), fullgraph=True, backend=keep
    )
    for n in (24, 40, 56, 72):
        args = _inputs(spec, _of_length(spec, n), requires_grad=False).args
        options = {k: v for k, v in args.items() if not isinstance(v, torch.Tensor)}
        compiled({k: v for k, v in args.items() if isinstance(v, torch.Tensor)})
    assert len(graphs) <= 2


def _spread_backends():
    return [
        pytest.param(spec, name, id=f"{spec.name}-{name}")
        for spec in SPECS.values()
        for name in spec.op.declared()
        if name not in ("gluon", "reference")
    ]


@pytest.mark.filterwarnings("ignore")  # of NumPy, under the interpreter
@pytest.mark.parametrize(("spec", "name"), _spread_backends())
def test_gradients_of_one_number_for_all(spec, name):
    """What `.sum().backward()` sends: a tensor whose elements are one in memory."""
    if reason := spec.op.unsupported(name, "cpu", torch.float32):
        pytest.skip(reason)
    cases = [case for case in _smallest(spec) if torch.float32 in case.dtypes]
    made = [_inputs(spec, case) for case in cases]
    inputs = min(made, key=lambda inputs: sum(t.numel() for t in inputs.tensors()))
    wrt = [inputs.args[name] for name in inputs.wrt]
    if not wrt:
        pytest.skip(f"{spec.name} has no gradient")
    found = []
    for spread in (True, False):
        with rlhf_kernels.backend(f"{spec.op.name}={name}", strict=True):
            outputs = [o for o in as_outputs(spec.function(**inputs.args)) if o.requires_grad]
            one = torch.tensor(0.5)
            grads = [one.expand(o.shape) if spread else torch.full_like(o, 0.5) for o in outputs]
            found.append(torch.autograd.grad(outputs, wrt, grads))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_second_derivative_is_refused_or_right(spec):
    """A second differentiation must never give a silent zero."""
    if not spec.differentiable:
        pytest.skip(f"{spec.name} has no gradient")
    inputs = _inputs(spec, _smallest(spec)[0])
    wrt = [inputs.args[name] for name in inputs.wrt]
    outputs = [o for o in as_outputs(spec.function(**inputs.args)) if o.requires_grad]
    first = torch.autograd.grad(outputs, wrt, [torch.ones_like(o) for o in outputs], create_graph=True)
    graded = [g for g in first if g.requires_grad]
    if not graded:
        return  # linear in every input: the second derivative is zero, and autograd says so
    kernel = spec.op.choose(next(iter(inputs.tensors())))
    if getattr(kernel, "DIFFERENTIABLE", False):
        try:
            torch.autograd.grad([g.sum() for g in graded], wrt, allow_unused=True)
        except RuntimeError as refusal:  # PyTorch's own fused kernels say so themselves
            if "not implemented" not in str(refusal):
                raise
        return
    own_backward = not hasattr(torch.ops.rlhf_kernels, f"{spec.op.name}_backward")
    if own_backward or hasattr(kernel, "differentiable"):  # to any order
        exact = inputs.map(lambda t: t.double().detach().requires_grad_() if t.requires_grad else t)
        given = tuple(exact.args[name] for name in exact.wrt)
        assert torch.autograd.gradgradcheck(
            lambda *wrt: spec.function(**(exact.args | dict(zip(exact.wrt, wrt)))), given, fast_mode=True
        )
        return
    with pytest.raises(RuntimeError, match=r"once_differentiable|second derivative"):
        torch.autograd.grad([g.sum() for g in graded], wrt, allow_unused=True)


class _OurOperators(TorchDispatchMode):
    """Notes the operators of this package that are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("rlhf_kernels"):
            self.called.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["reference", "torch_form"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_plain_forms_are_plain(spec, form):
    """torch.compile does not see into an operator: its times would be those of the eager form."""
    case = spec.cases[0]
    args = spec.make(case, torch.float32, torch.Generator().manual_seed(0), torch.device("cpu")).args
    with _OurOperators() as seen:
        getattr(spec, form)(**args)
    assert not seen.called


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_declared_backends_exist(spec):
    for name in spec.op.declared():
        module = (
            spec.op.module(name)
            if name != "native" or not rlhf_kernels.runtime.native.missing("_C")
            else None
        )
        assert module is None or callable(module.forward)


def test_public_surface():
    """Names are added, and taken away, on purpose."""
    others = {
        "NORMALIZE_PRESETS", "BackendError", "FallbackWarning", "PatchError", "Patched", "RotaryTable",
        "RotaryTables", "backend", "explain", "patch", "rotary_tables", "warm_up",
    }  # fmt: skip
    assert sorted(rlhf_kernels.__all__) == sorted(others | set(SPECS))
    for name in rlhf_kernels.__all__:
        assert hasattr(rlhf_kernels, name)
    for spec in SPECS.values():
        assert getattr(rlhf_kernels, spec.name) is spec.function
