"""`patch`: what it refuses, what it lists, and that undoing leaves every attribute the object it was."""

import contextlib
import sys
import threading

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import stacks
from rlhf_kernels.engine import patched as comparison
from rlhf_kernels.stacks import patching, slots

stacks.activate()
VERL = patching.targets()["verl"]
PLACES = [r.place for r in VERL.rebindings]

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed (make peers)")
functional = sys.modules["verl.utils.torch_functional"]


def _attributes():
    """Every attribute of every module of verl, by identity, and the registry's items."""
    held = {
        (name, key): value
        for name, module in sys.modules.copy().items()
        if name.split(".")[0] == "verl" and module is not None
        for key, value in vars(module).copy().items()
    }
    return held | {("registry", key): value for key, value in core_algos.ADV_ESTIMATOR_REGISTRY.items()}


def test_patching_is_imported_when_it_is_first_asked_for():
    assert "patch" not in vars(rlhf_kernels)
    assert rlhf_kernels.patch is patching.patch
    assert not hasattr(rlhf_kernels, "pach")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("varl",), ValueError, "unknown target 'varl': expected one of .*verl"),
        ((3,), TypeError, "expected the name of a stack.*, got int"),
        (
            ("verl", ["masked_whitten"]),
            ValueError,
            "verl has no 'masked_whitten' to replace: expected some of",
        ),
        (("verl", None, "cudnn"), ValueError, "unknown backend 'cudnn': expected one of reference, torch"),
    ],
)
def test_a_wrong_name_is_one_sentence(arguments, error, message):
    target, only, backend = (*arguments, None, None)[:3]
    with pytest.raises(error, match=message) as raised:
        rlhf_kernels.patch(target, only=only, backend=backend)
    assert "\n" not in str(raised.value)


def test_a_stacks_name_is_known_as_people_write_it():
    for written in ("TRL", "palm-rlhf-pytorch", "OpenRLHF", "Transformers"):
        assert patching.find(written) is patching.find(written.lower().replace("-", "_"))
    with rlhf_kernels.patch("VERL", only=["masked_whiten"]) as patched:
        assert repr(patched) == str(patched)
        assert repr(patched).startswith(f"verl {patched.version}: 1 replaced")


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(patching, "_folder", lambda root: None)
    with pytest.raises(
        rlhf_kernels.PatchError, match=r"verl is not installed here. pip install 'verl==0.9.1'"
    ):
        rlhf_kernels.patch("verl")


def test_an_unchecked_version_is_refused_unless_told(monkeypatch):
    monkeypatch.setattr(patching, "installed_version", lambda package, folder: "0.12.0")
    with pytest.raises(rlhf_kernels.PatchError, match=r"verl 0.12.0 was not checked, only 0.9.1. Install"):
        rlhf_kernels.patch("verl")
    with rlhf_kernels.patch("verl", allow_untested=True) as patched:
        assert patched.version == "0.12.0"
        assert {one.name for one in patched.replaced} == {r.name for r in VERL.rebindings}


def test_a_function_with_other_parameters_is_left(monkeypatch):
    def entropy_from_logits(logits, temperature):
        raise AssertionError

    monkeypatch.setattr(functional, "entropy_from_logits", entropy_from_logits)
    monkeypatch.delattr(functional, "logprobs_from_logits")
    with rlhf_kernels.patch("verl") as patched:
        assert functional.entropy_from_logits is entropy_from_logits
        assert (
            "parameters are (logits, temperature), known are (logits)" in patched.left["entropy_from_logits"]
        )
        assert "this version has no verl.utils" in patched.left["logprobs_from_logits"]
        assert {one.name for one in patched.replaced} == {"compute_gae_advantage_return", "masked_whiten"}


def test_a_double_patch_is_refused_and_leaves_the_first():
    before = functional.masked_whiten
    with rlhf_kernels.patch("verl", only="masked_whiten"):
        held = functional.masked_whiten
        assert held is not before
        with pytest.raises(rlhf_kernels.PatchError, match=r"masked_whiten is patched already: call undo\(\)"):
            rlhf_kernels.patch("verl")
        assert functional.masked_whiten is held
        with rlhf_kernels.patch("verl", only=["entropy_from_logits"]) as second:
            assert [one.name for one in second.replaced] == ["entropy_from_logits"]
    assert functional.masked_whiten is before


def test_every_holder_of_a_function_is_rebound_and_the_list_says_so():
    before = core_algos.ADV_ESTIMATOR_REGISTRY["gae"]
    with rlhf_kernels.patch("verl") as patched:
        assert (
            core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is core_algos.compute_gae_advantage_return is not before
        )
        text = str(patched)
        for rebinding in VERL.rebindings:
            assert f"{rebinding.name}: by {rebinding.op} ({rebinding.place})" in text
        assert "left: elementwise" in text
    assert patched.replaced == []
    patched.undo()
    assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is before


def test_a_module_imported_under_the_patch_is_restored_too(monkeypatch):
    before = functional.masked_whiten
    late = type(sys)("verl.late")
    with rlhf_kernels.patch("verl"):
        late.whiten = functional.masked_whiten  # as `from ... import masked_whiten as whiten` does
        monkeypatch.setitem(sys.modules, "verl.late", late)
    assert late.whiten is before


def test_what_others_replaced_meanwhile_stays_and_is_said(monkeypatch):
    def theirs(values, mask, shift_mean=True):
        return values

    before = functional.masked_whiten
    patched = rlhf_kernels.patch("verl", only="masked_whiten")
    functional.masked_whiten = theirs
    try:
        with pytest.warns(UserWarning, match="masked_whiten was replaced by other code meanwhile"):
            patched.undo()
        assert functional.masked_whiten is theirs
    finally:
        functional.masked_whiten = before


def test_a_failure_halfway_leaves_nothing_replaced(monkeypatch):
    before = _attributes()

    def fails(original, ours):
        raise RuntimeError("halfway")

    real, calls = slots.other_signature, []

    def third_time(original, ours):
        calls.append(ours)
        return fails(original, ours) if len(calls) == 3 else real(original, ours)

    monkeypatch.setattr(slots, "other_signature", third_time)
    with pytest.raises(RuntimeError, match="halfway"):
        rlhf_kernels.patch("verl")
    assert all(before[place] is value for place, value in _attributes().items())
    assert not patching.active()


def test_a_hundred_patches_with_threads_at_work_leave_every_attribute_as_it_was():
    before = _attributes()
    values, mask = torch.randn(4, 32), torch.ones(4, 32)
    expected = functional.masked_whiten(values, mask)
    done, wrong = threading.Event(), []

    def work():
        while not done.is_set():
            found = functional.masked_whiten(values, mask)
            advantages, _ = core_algos.compute_gae_advantage_return(values, values, mask, 1.0, 0.95)
            if not torch.allclose(found, expected, atol=1e-5) or not advantages.isfinite().all():
                wrong.append(found)

    def patch_and_undo(times):
        for _ in range(times):
            with contextlib.suppress(rlhf_kernels.PatchError):  # the other thread holds it just now
                rlhf_kernels.patch("verl").undo()

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads.append(threading.Thread(target=patch_and_undo, args=(20,)))
    for thread in threads:
        thread.start()
    patch_and_undo(100)
    threads[-1].join()
    done.set()
    for thread in threads[:-1]:
        thread.join()
    after = _attributes()
    assert not wrong
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] is not after[key]] == []


def test_backend_is_that_of_the_forward(monkeypatch):
    seen = []
    real = rlhf_kernels.runtime.dispatch.Op.decide
    monkeypatch.setattr(
        rlhf_kernels.runtime.dispatch.Op,
        "decide",
        lambda self, *args: seen.append(choice := real(self, *args)) or choice,
    )
    rlhf_kernels.runtime.dispatch.OPS["masked_normalize"]._chosen.clear()
    with rlhf_kernels.patch("verl", only="masked_whiten", backend="torch"):
        functional.masked_whiten(torch.randn(3, 4), torch.ones(3, 4))
    assert [choice.backend for choice in seen if choice.op == "masked_normalize"] == ["torch"]


def test_what_runs_on_no_faster_backend_is_left_unless_named(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "torch")
    patching.dispatch._environment.cache_clear()
    try:
        with rlhf_kernels.patch("verl") as patched:
            assert "logprob runs on the torch backend on cpu" in patched.left["logprobs_from_logits"]
            assert {one.name for one in patched.replaced} == {"compute_gae_advantage_return"}
        with rlhf_kernels.patch("verl", only="logprobs_from_logits") as patched:
            assert [one.name for one in patched.replaced] == ["logprobs_from_logits"]
    finally:
        monkeypatch.undo()
        patching.dispatch._environment.cache_clear()


def test_verl_keeps_what_it_says_of_masks():
    values, weights = torch.randn(3, 8), torch.rand(3, 8)
    one = torch.zeros(3, 8)
    one[0, 0] = 1
    expected = functional.masked_whiten(values, weights)
    with rlhf_kernels.patch("verl"):
        torch.testing.assert_close(functional.masked_whiten(values, weights), expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match="sum of the mask is one"):
            functional.masked_whiten(values, one)
        with pytest.raises(ValueError, match="At least one element"):
            core_algos.compute_gae_advantage_return(values, values, 0 * one, 1.0, 0.95)


def test_a_wrong_replacement_is_found():
    call = VERL.rebindings[1].call(False)
    theirs = comparison.run(functional.masked_whiten, call)
    ours = comparison.run(lambda values, mask: functional.masked_whiten(values, mask) * 1.0001, call)
    assert 5e-5 < comparison.difference(theirs, ours) < 2e-4
    assert comparison.difference(theirs, theirs) == 0
    assert comparison.difference(theirs[:1], theirs) == float("inf")
    assert comparison.difference(theirs, [theirs[0].log(), *theirs[1:]]) == float("inf")
