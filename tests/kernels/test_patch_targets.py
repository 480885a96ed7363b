"""Every replacement against the stack's own function: forward and every gradient, float32, 1e-5 relative."""

import functools
import importlib
import importlib.util
import sys
import types

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import stacks
from rlhf_kernels.engine import patched as comparison
from rlhf_kernels.stacks import patching, slots

stacks.activate()
TARGETS = patching.targets()
CASES = [(target, one) for target in TARGETS.values() for one in target.rebindings if one.chosen]


def _loaded(target, rebinding):
    """The stack's function and ours; skips where this machine has no such version."""
    if patching._folder(target.root) is None:
        pytest.skip(f"{target.package} is not installed (make peers)")
    if not rebinding.fits(patching.version_of(target, True), target):
        if rebinding.source is None or not (stacks.peers_root() / "trl-1.12").is_dir():
            pytest.skip(f"the installed {target.package} is another version")
        original = rebinding.source()
        return original, rebinding.make(original)
    try:
        functions = comparison.functions(rebinding)
    except ImportError as error:
        pytest.skip(f"{target.package} cannot be imported here: {error}")
    if functions is None:
        pytest.skip(f"the installed {target.package} has no {rebinding.place}")
    return functions


@pytest.mark.parametrize(("target", "rebinding"), CASES, ids=lambda one: one.name)
def test_replacement_equals_the_original(target, rebinding):
    theirs, ours = _loaded(target, rebinding)
    call = rebinding.call(False)
    with torch.compiler.set_stance("force_eager"):  # OpenRLHF compiles one: seconds
        found = comparison.run(theirs, call)
    assert comparison.difference(found, comparison.run(ours, call)) <= comparison.TOLERANCE
    assert all(t.isfinite().any() for t in found)


@pytest.fixture
def importable_openrlhf(monkeypatch):
    """OpenRLHF's modules with its functions from the installed source: an import wants a GPU's packages."""
    if patching._folder("openrlhf") is None:
        pytest.skip("openrlhf is not installed (make peers)")
    held = {}
    for rebinding in TARGETS["openrlhf"].rebindings:
        name, _, path = rebinding.place.partition(":")
        owner = held.setdefault(name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, name, owner)
        for part in path.split(".")[:-1]:
            setattr(owner, part, type(part, (), {}))
            owner = getattr(owner, part)
        setattr(owner, path.split(".")[-1], rebinding.source())
    actor = types.ModuleType("openrlhf.models.actor")  # it imports by name, as the package's own does
    actor.log_probs_from_logits = held["openrlhf.models.utils"].log_probs_from_logits
    monkeypatch.setitem(sys.modules, actor.__name__, actor)
    return held["openrlhf.models.utils"], held["openrlhf.trainer.ppo_utils.experience_maker"], actor


def test_openrlhf_is_patched_in_its_class_and_where_it_is_imported_by_name(importable_openrlhf):
    utils, maker, actor = importable_openrlhf
    before = utils.log_probs_from_logits, vars(maker.RemoteExperienceMaker)["get_advantages_and_returns"]
    with rlhf_kernels.patch("openrlhf") as patched:
        assert len(patched.replaced) == 4
        assert actor.log_probs_from_logits is utils.log_probs_from_logits is not before[0]
        values = torch.randn(2, 5)
        found = maker.RemoteExperienceMaker().get_advantages_and_returns(values, values, None, 1.0, 0.9)
        torch.testing.assert_close(found, before[1](None, values, values, None, 1.0, 0.9))
        assert vars(maker.RemoteExperienceMaker)["get_advantages_and_returns"] is not before[1]
    assert actor.log_probs_from_logits is utils.log_probs_from_logits is before[0]
    assert vars(maker.RemoteExperienceMaker)["get_advantages_and_returns"] is before[1]


def test_a_stack_that_cannot_be_imported_is_one_sentence():
    if patching._folder("openrlhf") is None or importlib.util.find_spec("flash_attn"):
        pytest.skip("openrlhf is absent, or can be imported")
    with pytest.raises(rlhf_kernels.PatchError, match=r"nothing can be replaced: openrlhf.* cannot be"):
        rlhf_kernels.patch("openrlhf")


def test_declarations_are_consistent():
    for target in TARGETS.values():
        assert target.checked
        for version in target.checked:
            names = [r.name for r in target.rebindings if r.fits(version, target)] + list(target.untouched)
            assert len(set(names)) == len(names)
        for rebinding in target.rebindings:
            assert rebinding.op in rlhf_kernels.__all__ or (not rebinding.op and rebinding.note)
            assert set(rebinding.versions or ()) <= set(target.checked)
            assert rebinding.place.split(".")[0].split(":")[0] == target.root


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda one: one.name)
def test_patch_replaces_what_it_lists_and_undoes_it(target):
    if patching._folder(target.root) is None:
        pytest.skip(f"{target.package} is not installed (make peers)")
    try:
        patched = rlhf_kernels.patch(target.name)
    except rlhf_kernels.PatchError as error:
        pytest.skip(str(error))
    with patched:
        assert patched.replaced
        held = []
        for one in patched.replaced:
            owner, key = slots.look_up(one.place, importlib.import_module(one.place.split(":")[0]))
            held.append((owner, key, slots.attributes(owner)[key]))
        taken = [(slot.holder, slot.key, slot.before) for slot in patched.slots]
        assert len(taken) >= len(held)
    for owner, key, ours in held:
        assert slots.attributes(owner)[key] is not ours
    for holder, key, before in taken:
        assert slots.attributes(holder).get(key, slots.ABSENT) is before


def test_an_update_of_palm_gives_gradients_to_what_is_trained_alone():
    pytest.importorskip("palm_rlhf_pytorch", reason="palm-rlhf-pytorch is not installed (make peers)")
    (rebinding,) = [one for one in TARGETS["palm_rlhf_pytorch"].rebindings if one.name == "learn"]
    call, ours = rebinding.call(False), comparison.functions(rebinding)[1]
    trainer = call.args[0]
    frozen = trainer.actor_critic.actor_palm.token_emb.weight
    found = comparison.run(ours, call)
    assert (
        len(found) == 2 * 2 * 4 * 2 + 2
    )  # two models, layers of four adapters of two tensors; the value head
    assert all(gradient.any() for gradient in found)
    assert frozen.grad is None
    real = trainer.accelerate
    trainer.accelerate = types.SimpleNamespace(
        num_processes=2, backward=real.backward, print=print, device=real.device
    )
    comparison.run(ours, call)  # several processes: as the stack does
    assert frozen.grad.any()


def test_trl_takes_what_dpo_logs_from_our_head(monkeypatch):
    """The mean logit, whether a token is the likeliest and WPO's log sum p^2 do not go to TRL's own."""
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed (make peers)")
    if patching.installed_version("trl") != "1.16.0":
        pytest.skip("the installed TRL is another version")
    call = next(r for r in TARGETS["trl"].rebindings if r.name == "loss_head").call(False)
    asked = []
    real = utils._ChunkedLogProbFunction.forward

    @functools.wraps(real)  # its parameters are looked at
    def forward(ctx, *args):
        asked.append(args[-1])
        return real(ctx, *args)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "forward", staticmethod(forward))
    with rlhf_kernels.patch("trl", only="loss_head"):
        found = utils._ChunkedLogProbFunction.apply(*call.args)
        assert [t.dtype for t in found] == [torch.float32] * 4 + [torch.bool]
        assert found[4].any()
        assert not asked
        scaled_and_capped = (*call.args[:6], 30.0, 0.5, ("entropy",))
        utils._ChunkedLogProbFunction.apply(*scaled_and_capped)
    assert asked == [("entropy",)]


@pytest.mark.parametrize("name", ["selective_log_softmax", "entropy_from_logits"])
def test_16_bits_of_trl_are_rounded_as_it_does(name):
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed (make peers)")
    rebinding = next(one for one in TARGETS["trl"].rebindings if one.name == name)
    logits = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    args = (logits, logits.argmax(-1)) if "soft" in name else (logits,)
    original = getattr(utils, name)
    assert torch.equal(rebinding.make(original)(*args), original(*args))
