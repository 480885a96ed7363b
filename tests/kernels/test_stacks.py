"""The declarations of foreign stacks: cheap to import, one reason per refusal, extraction from source."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import stacks
from rlhf_kernels.engine.check import Judge
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.stacks import peer, source

OPS = {
    "attention", "rotary", "swiglu", "gae", "masked_normalize", "layer_norm", "rms_norm", "logprob",
    "linear_logprob", "sample", "token_advantages", "lambda_return", "vtrace",
}  # fmt: skip
FOREIGN = {"trl", "verl", "torchrl", "liger_kernel", "palm_rlhf_pytorch", "transformers", "ray"}


def test_listing_the_peers_imports_none_of_them():
    code = "import sys; from rlhf_kernels import stacks; stacks.peers(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not FOREIGN & set(done.stdout.split())


def test_declarations_are_consistent():
    declared = stacks.peers()
    assert {p.op for p in declared} <= OPS
    assert len({(p.op, p.label) for p in declared}) == len(declared)
    assert {p.stack for p in declared} == set(stacks.STACKS)
    with pytest.raises(ValueError, match="unknown stack 'trlx'"):
        stacks.peers(stack="trlx")


def test_declared_arguments_are_ours():
    for p in stacks.peers():
        if hasattr(rlhf_kernels, p.op):
            assert {*p.options, *p.semantics} <= peer._parameters(p.op).keys(), p


def test_missing_stack_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_KERNELS_PEERS", str(tmp_path))
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if ".peers" not in folder])
    absent = stacks.peers("masked_normalize", "openrlhf")[0]
    if absent.version() is not None:
        pytest.skip("OpenRLHF is installed beside the library")
    with pytest.raises(stacks.Unavailable, match=r"openrlhf/models/utils.py is not installed \(make peers\)"):
        absent.load()


DEFAULTS = {
    "mask": None,
    "dim": None,
    "eps": 1e-5,
    "eps_mode": "clamp",
    "unbiased": False,
    "zero_masked": False,
}


@pytest.mark.parametrize(
    ("stack", "arguments", "reason"),
    [
        ("palm_rlhf_pytorch", {"mask": torch.ones(2, 3)}, None),
        ("palm_rlhf_pytorch", {"unbiased": True}, "palm-rlhf-pytorch has unbiased=False"),
        ("verl", {}, "verl has eps=1e-08"),
        ("verl", {"eps": 1e-8, "eps_mode": "add", "unbiased": True}, None),
        ("openrlhf", {"dim": 1, "mask": torch.ones(2, 3)}, "OpenRLHF has zero_masked=True"),
        ("openrlhf", {"dim": 1}, None),  # without a mask there is nothing to zero
    ],
)
def test_supports_gives_the_reason(monkeypatch, stack, arguments, reason):
    monkeypatch.setattr(peer, "_parameters", lambda op: DEFAULTS)
    assert stacks.peers("masked_normalize", stack)[0].supports(arguments) == reason


def test_supports_checks_what_a_stack_fixes_and_we_require(monkeypatch):
    required = dict.fromkeys(("x", "eps"), inspect.Parameter.empty)
    monkeypatch.setattr(peer, "_parameters", lambda op: required)
    palm = stacks.peers("layer_norm", "palm_rlhf_pytorch")[0]
    assert palm.supports({"x": torch.ones(2), "eps": 1e-5}) is None
    assert palm.supports({"x": torch.ones(2), "eps": 1e-6}) == "palm-rlhf-pytorch has eps=1e-05"


def test_supports_knows_directions_and_devices(monkeypatch):
    monkeypatch.setattr(peer, "_parameters", lambda op: {})
    assert stacks.peers("gae", "verl")[0].supports({}, direction="backward") == "verl has no backward"
    assert stacks.peers("rms_norm", "liger")[0].supports({}, device="cpu") == "Liger does not run on cpu"


TRAINER = """
class Trainer:
    def train(self):
        for batch in self.batches:
            if batch:
                total = 0
                for x in batch:
                    total = total + x
                mean = total / len(batch)
                self.log(mean)
"""


def test_statements_run_from_the_installed_file(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    wanted = {"first": "total", "last": "mean", "arguments": ("batch",), "namespace": {}}
    statements = source.extract_statements(path, "Trainer.train", **wanted)
    assert statements([1, 2, 6])["mean"] == 3
    with pytest.raises(stacks.Unavailable, match=r"Trainer.train has no statements from sum to mean"):
        source.extract_statements(path, "Trainer.train", **wanted | {"first": "sum"})
    with pytest.raises(stacks.Unavailable, match=r"trainer.py has no Trainer.evaluate"):
        source.extract(path, "Trainer.evaluate", namespace={})


def test_baselines_agree(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.baselines import python_loop, row_loop

    rewards, values = torch.randn(5, 33), torch.randn(5, 33)
    expected = python_loop.gae(rewards, values, 0.9, 0.8)
    torch.testing.assert_close(row_loop.gae(rewards, values, 0.9, 0.8), expected, atol=1e-5, rtol=1e-5)
    assert row_loop.gae(rewards[:0], values[:0])[0].shape == (0, 33)


@pytest.mark.parametrize(
    "name", ["gemma", "palm_ragged", "window_both", "window_more_queries", "mask_whole_row"]
)
def test_flex_attention_means_the_same(monkeypatch, name):
    """Uncompiled, and forward alone, as it also runs on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (flex,) = (p for p in stacks.peers("attention") if p.label == "FlexAttention")
    spec = load_specs()["attention"]
    case = next(case for case in spec.cases if case.name == name)
    case = dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != "return_lse"})
    for row in Judge(spec, case, torch.float32).rows(flex.label, flex.load(), ["forward"], foreign=True):
        assert row.status == "ok", f"{row.direction}: {row.reason}"


LOAD_ALL = """
import torch
import rlhf_kernels
from rlhf_kernels import stacks
stacks.activate()
torch.manual_seed(0)
log_ratio, rewards, values = 0.3 * torch.randn(4, 50), torch.randn(4, 50), torch.randn(4, 50)
options = {"done": torch.rand(4, 50) < 0.1, "next_value": torch.randn(4), "gamma": 0.9}
for peer in stacks.peers():
    if peer.version() is not None:
        assert callable(peer.load()), peer
    if peer.version() is not None and peer.stack == "torchrl":
        given = (log_ratio, rewards, values)[peer.op != "vtrace" :]
        more = options | ({"rho_clip": 1.3} if peer.op == "vtrace" else {"lam": 0.7})
        ours = getattr(rlhf_kernels, peer.op)(*given, **more)
        torch.testing.assert_close(peer.load()(*given, **more), ours, rtol=1e-4, atol=1e-5)
    if peer.version() is not None and peer.outputs == ("logprob",):  # which is then all that it returns
        logits, target = torch.randn(2, 3, 11), torch.arange(6).view(2, 3)
        torch.testing.assert_close(peer.load()(logits, target), rlhf_kernels.logprob(logits, target)[0])
"""


@pytest.mark.peers
def test_installed_peers_load():
    """In a process of its own, so that the foreign packages stay out of this one."""
    if not stacks.search_paths():
        pytest.skip("make peers")
    done = subprocess.run([sys.executable, "-c", LOAD_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
