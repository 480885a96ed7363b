"""What a compiled graph holds: the C++ operators where they run, else ours, which choose at each call."""

import json
import math

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import rlhf_kernels
from rlhf_kernels.engine.spec import as_outputs, load_specs
from rlhf_kernels.ops.swiglu import swiglu
from rlhf_kernels.runtime import library, native, tuned

pytestmark = pytest.mark.skipif(bool(native.missing("_C")), reason=str(native.missing("_C")))
NATIVE = [spec for spec in load_specs().values() if library._OPERATORS[spec.op.name].natives]


def _of(graph):
    targets = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return [target.removesuffix(".default") for target in targets if target.startswith("rlhf_kernels")]


@pytest.fixture
def compiled():
    """Compiles a function; its `.held` are our operators in each graph that AOTAutograd made."""
    torch._dynamo.reset()

    def compiling(function, **options):
        held = []

        def keep(graph, _):
            held.append(_of(graph))
            return make_boxed_func(graph.forward)

        found = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep), **options)
        found.held = held
        return found

    return compiling


def test_most_operators_are_native_in_graphs():
    ours = (spec.op for spec in load_specs().values())
    assert {spec.op.name for spec in NATIVE} == {op.name for op in ours if "native" in op.declared()} - {
        "linear_logprob"  # products of PyTorch's, block by block
    }


@pytest.mark.parametrize("spec", NATIVE, ids=lambda spec: spec.name)
def test_graph_holds_the_cpp_operator(spec, compiled):
    case = min(spec.cases, key=lambda case: math.prod(case.sizes.values()) or math.inf)
    inputs = spec.make(case, torch.float32, torch.Generator().manual_seed(1), torch.device("cpu"))
    options = {k: v for k, v in inputs.args.items() if not isinstance(v, torch.Tensor)}
    tensors = {k: v for k, v in inputs.args.items() if isinstance(v, torch.Tensor)}

    def call(**given):
        return as_outputs(spec.function(**given, **options))

    graph = compiled(call)
    for got, want in zip(graph(**tensors), call(**tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    outputs = [output for output in graph(**tensors) if output.requires_grad]
    if outputs:
        wrt = [tensors[name] for name in inputs.wrt]
        torch.autograd.grad(outputs, wrt, [torch.ones_like(output) for output in outputs])
    names = [name for graph in graph.held for name in graph]
    assert names
    assert all(name.startswith("rlhf_kernels_native.") for name in names), names


@pytest.mark.parametrize("name", [spec.op.name for spec in NATIVE])
def test_cpp_operators_take_the_same_arguments(name):
    for ours, inner, _ in library._OPERATORS[name].natives:
        mine = [a for a in ours._schema.arguments if not a.kwarg_only]
        theirs = native.overload(inner)._schema
        assert [str(a.type) for a in mine] == [str(a.type) for a in theirs.arguments[: len(mine)]]
        assert all(a.has_default_value() for a in theirs.arguments[len(mine) :])
        assert len(ours._schema.returns) == len(theirs.returns)


def test_attention_on_a_cpu_is_seen_through(compiled):
    """Entering an operator of ours, in Python, would cost more than a small call."""
    q, k, v = (torch.randn(2, heads, 8, 16, requires_grad=True) for heads in (4, 1, 1))
    tables = rlhf_kernels.rotary_tables(torch.arange(8), 16)
    graph = compiled(lambda q, k, v: rlhf_kernels.attention(q, k, v, causal=True, rotary=tables))
    graph(q, k, v).sum().backward()
    assert {name for graph in graph.held for name in graph} == {"rlhf_kernels_native.rotary"}


def test_graph_follows_an_override(compiled):
    x = torch.randn(4, 16)
    graph = compiled(lambda x: swiglu(x))
    graph(x)
    with rlhf_kernels.backend("torch"):
        assert torch.equal(graph(x), swiglu(x))
    with rlhf_kernels.backend("reference"):  # our operator chooses at each call
        assert torch.equal(graph(x), swiglu(x))
    graph(x)
    assert graph.held == [["rlhf_kernels_native.swiglu"], ["rlhf_kernels.swiglu"]]


def test_tuned_kernel_stays_behind_our_operator(compiled, own_cache):
    """It looks at the shape of each call."""
    entry = {
        "op": "swiglu", "backend": "native", "function": "forward", "dtype": "float32", "class": (3, 5),
        "values": {"grain": 1}, "device": tuned.table_device("cpu"), "threads": torch.get_num_threads(),
        "versions": tuned.versions("native"),
    }  # fmt: skip
    tuned.table_path().write_text(json.dumps({"schema": tuned.SCHEMA, "entries": [entry]}))
    tuned.forget()
    graph = compiled(lambda x: swiglu(x))
    graph(torch.randn(4, 16))
    assert graph.held == [["rlhf_kernels.swiglu"]]


def test_cache_of_graphs_tells_backends_apart():
    """What Dynamo hands on, and caches go by."""
    torch._dynamo.reset()
    seen = []

    def keep(graph, _):
        seen.extend(dict(node.kwargs) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    graph = torch.compile(lambda x: swiglu(x), fullgraph=True, backend=keep)
    graph(torch.randn(4, 16))
    with rlhf_kernels.backend("torch"):
        graph(torch.randn(4, 16))
    assert seen == [{"backend": "native"}, {"backend": ""}]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_keeps_our_operators(strict):
    class Gate(torch.nn.Module):
        def forward(self, x):
            return swiglu(x)

    program = torch.export.export(Gate(), (torch.randn(4, 16),), strict=strict)
    assert _of(program.graph_module) == ["rlhf_kernels.swiglu"]
    assert _of(program.run_decompositions().graph_module) == ["rlhf_kernels.swiglu"]
