"""Tuning: a wrong value cannot win, and what was found is read back where it applies."""

import dataclasses
import inspect

import pytest
import torch

from rlhf_kernels.engine import tune
from rlhf_kernels.engine.clock import CpuClock, Limits
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.runtime import dispatch, native, tuned

CPU = torch.device("cpu")
SHORT = Limits(seconds=0.05, warmup=0.02, rounds=3, precision=0.5)

needs_native = pytest.mark.skipif(native.missing("_C") is not None, reason=str(native.missing("_C")))


def _tuner(planted_specs):
    spec = planted_specs["planted_double"]
    return tune.Tuner(spec, spec.case("small"), torch.float32, "native", CPU, CpuClock(), SHORT)


@needs_native
def test_tune_finds_the_fast_value_and_refuses_the_wrong_one(planted_specs, own_cache):
    (outcome,) = _tuner(planted_specs).outcomes()
    assert outcome.values == {"waste": 1}
    assert outcome.default == {"waste": 0}
    assert outcome.gain > 1.02
    assert set(outcome.timings_us) == {"waste=0", "waste=1"}
    assert outcome.refused["waste=2"].startswith("incorrect: the output is off by")
    assert outcome.shape == (9, 7)  # 256 rows of 64

    path = tune.store(outcome.entry("cpu", torch.get_num_threads()))
    assert path == own_cache / "tuned.json"
    tune.store(outcome.entry("cpu", torch.get_num_threads()) | {"gain": 9})
    (entry,) = tuned.read_table(path)  # in place of the first
    assert entry["gain"] == 9

    for op in dispatch.OPS.values():
        op._chosen.clear()
    assert "tuned for 1 shapes" in str(dispatch.explain("planted_double"))
    function = planted_specs["planted_double"].function
    kernel = dispatch.OPS["planted_double"].choose(torch.ones(256, 64))
    assert torch.equal(function(torch.ones(256, 64)), torch.full((256, 64), 2.0))
    assert kernel.forward._bound[torch.Size((256, 64)), torch.float32].keywords == {"waste": 1}
    function(torch.ones(2, 3))
    assert kernel.forward._bound[torch.Size((2, 3)), torch.float32] is kernel.forward._function


@needs_native
@pytest.mark.parametrize("slow", [True, False])
def test_a_backend_goes_first_where_it_was_measured_to_be_faster(planted_specs, own_cache, monkeypatch, slow):
    op = planted_specs["planted_double"].op
    monkeypatch.setattr(op, "order", {"cpu": ("torch", "native")})
    slowed = op.module("torch" if slow else "native")
    fast = slowed.forward

    def forward(x, **values):
        for _ in range(40):
            torch.exp(x)
        return fast(x, **values)

    monkeypatch.setattr(slowed, "forward", forward)
    _, choice = _tuner(planted_specs).outcomes()
    assert (choice.function, choice.values, choice.shape) == ("choice", {"chosen": int(slow)}, (9, 7))
    assert (choice.gain > 1.02) == slow
    tune.store(choice.entry("cpu", torch.get_num_threads()))
    chosen = op.decide("cpu", torch.float32)
    assert (chosen.backend, chosen.reason) == (
        ("native", "measured to be faster here") if slow else ("torch", "first choice here")
    )
    assert op.decide("cpu", torch.bfloat16).backend == "torch"  # which was not measured
    assert tuned.faster("planted_double", ("native",), "cpu", torch.float32, 64) == ("native",) * slow
    assert tuned.faster("planted_double", ("native",), "cpu", torch.float32, 128) == ()
    assert (
        tuned.faster("planted_double", ("native",), "cpu", torch.float32, (64, "bent")) == ("native",) * slow
    )
    other = dataclasses.replace(choice, case="another of this class", values={"chosen": 0})
    for one in (other, choice):  # neither takes the other's place
        tune.store(one.entry("cpu", torch.get_num_threads()))
        assert tuned.faster("planted_double", ("native",), "cpu", torch.float32, 64) == ()
    tune.store(dataclasses.replace(other, values=choice.values).entry("cpu", torch.get_num_threads()))
    monkeypatch.setattr(op.module("native"), "unsupported", lambda *_: "not these", raising=False)
    assert op.decide("cpu", torch.float32).backend == "torch"
    op._chosen.clear()
    assert list(_tuner(planted_specs).outcomes()) == []


@needs_native
def test_a_backend_that_fails_is_reported_and_not_contested(planted_specs, monkeypatch):
    op = planted_specs["planted_double"].op
    monkeypatch.setattr(op, "order", {"cpu": ("torch", "native")})

    def forward(x, **values):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(op.module("native"), "forward", forward)
    (outcome,) = _tuner(planted_specs).outcomes()
    assert set(outcome.refused.values()) == {"error: NotImplementedError: no such kernel"}
    assert (outcome.values, outcome.timings_us) == ({"waste": 0}, {})


def test_what_is_tuned_can_be_timed_and_heeds_its_knobs():
    for device, excluded in (("cpu", {"triton", "gluon"}), ("cuda", {"native"})):
        found = {name for spec in load_specs().values() for name in tune.tunable(spec, device)}
        assert found
        assert not found & excluded


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "another"}, "measured on another"),
        ({"threads": 77}, "measured with 77 threads"),
        ({"versions": {"torch": "1.0"}}, "measured with torch 1.0"),
    ],
)
def test_entries_of_another_machine_are_skipped(own_cache, change, reason):
    outcome = tune.Outcome("swiglu", "native", "forward", "c", "float32", {"grain": 1}, {"grain": 2})
    entry = outcome.entry("cpu", torch.get_num_threads())
    assert tuned.mismatch(entry, "cpu") is None
    assert tuned.mismatch(entry | change, "cpu").startswith(reason)
    tune.store(entry | change)
    assert tuned.classes("swiglu", "native", "forward", "cpu") == {}


def test_processors_of_one_name_are_told_apart(monkeypatch):
    found = {"model name": "AMD EPYC", "cpu family": "25", "model": "1"}
    monkeypatch.setattr(tuned, "_processor", lambda: found)
    outcome = tune.Outcome("swiglu", "native", "forward", "c", "float32", {"grain": 1}, {"grain": 2})
    entry = outcome.entry("cpu", torch.get_num_threads())
    assert entry["device"] == "AMD EPYC (family 25, model 1)"
    found["model"] = "17"
    said = "measured on AMD EPYC (family 25, model 1), this is AMD EPYC (family 25, model 17)"
    assert tuned.mismatch(entry, "cpu") == said


@needs_native
@pytest.mark.parametrize(
    ("name", "case", "argument"),
    [("token_advantages", "smoke_16x128", "values"), ("decode_attention", "small", "k_cache")],
)
def test_the_argument_that_grows_says_the_shape(name, case, argument):
    spec = load_specs()[name]
    inputs = spec.make(spec.case(case), torch.float32, torch.Generator().manual_seed(0), CPU)
    (knob,) = [knob for knob in spec.knobs if knob.backend == "native"]
    trial = tuned.Trial(spec.op.name, "native", "forward", ((knob.name, knob.candidates[0]),))
    with dispatch.trial(trial), dispatch.backend("native", strict=True):
        spec.function(**inputs.args)
    assert tuned.Tried.seen[trial[:3]] == tuned.shape_class(inputs.args[argument])


def test_values_are_bound_by_that_argument():
    def kernel(score, values, grain=0):
        return grain

    found = {"float32": {(5, 8): {"grain": 7}}}
    score, values = torch.zeros(16), torch.zeros(16, 128)
    assert tuned.Tuned(kernel, found, 1)(score, values) == 7
    assert tuned.Tuned(kernel, found, 0)(score, values) == 0


def test_lookup_is_exact_or_near_within_range_or_the_default():
    found = {(5, 5): {"grain": 1}, (9, 5): {"grain": 2}, (9, 9): {"grain": 3}}
    assert tuned.lookup(found, (9, 5)) == ({"grain": 2}, "exact")
    assert tuned.lookup(found, (8, 5)) == ({"grain": 2}, "nearest, (9, 5)")
    assert tuned.lookup(found, (10, 5)) == ({}, "default")  # more rows than were ever measured
    assert tuned.lookup({}, (1, 1)) == ({}, "default")


def test_a_broken_table_is_no_table(own_cache):
    entries = ("[1]", "[{}]", '[{"op": "gae"}]', "null")
    texts = [f'{{"schema": {tuned.SCHEMA}, "entries": {entry}}}' for entry in entries]
    for text in ("{", "[]", "null", '{"schema": 99, "entries": [1]}', *texts):
        (own_cache / "tuned.json").write_text(text)
        assert tuned.read_table(own_cache / "tuned.json") == []


@needs_native
def test_knob_defaults_are_those_of_the_kernels():
    for spec in load_specs().values():
        for knob in spec.knobs:
            kernel = spec.op.module(knob.backend)
            functions = [f for f in knob.functions if hasattr(kernel, f)]
            assert functions, spec.name
            for function in functions:
                default = None
                if inspect.isfunction(getattr(kernel, function)):
                    default = inspect.signature(getattr(kernel, function)).parameters[knob.name].default
                if default is None:  # the kernel leaves it to its schema
                    own = spec.family if spec.family == "norm" else spec.name  # both norms are one operator
                    name = own + "_backward" * (function == "backward")
                    schema = getattr(torch.ops.rlhf_kernels_native, name).default._schema
                    default = next(a.default_value for a in schema.arguments if a.name == knob.name)
                assert default == knob.candidates[0], f"{spec.name}.{function}: {knob.name}"
