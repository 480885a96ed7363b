"""palm-rlhf-pytorch under the patch: what a single call of a replaced function does not show."""

import pytest
import torch

from rlhf_kernels import stacks
from rlhf_kernels.engine import patched as comparison
from rlhf_kernels.stacks import patching

stacks.activate()
palm = pytest.importorskip("palm_rlhf_pytorch.palm", reason="palm-rlhf-pytorch is not installed (make peers)")


def _rebinding(name):
    target = patching.targets()["palm_rlhf_pytorch"]
    return next(one for one in target.rebindings if one.name == name)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generation_with_normalised_queries_and_keys(rows, dtype):
    """In both layouts of the weights; its blocks are no whole number of columns, so are those of float64."""
    torch.manual_seed(0)
    model = palm.PaLM(num_tokens=50, dim=24, depth=2, dim_head=8, heads=3, qk_rmsnorm=True).to(dtype)
    for name, parameter in model.named_parameters():
        if "scale" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    prompt = torch.randint(50, (rows, 5))
    kept = []
    cached = _rebinding("generate").make(palm.PaLM.generate)
    from rlhf_kernels.stacks.palm_generation import cached_generate

    keeping = cached_generate(palm.PaLM.generate, lambda *given: kept.extend(given))
    tokens = []
    for generate in (palm.PaLM.generate, cached, keeping):
        torch.manual_seed(1)
        tokens.append(generate(model, 20, prompt))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(kept[0], torch.cat([prompt, tokens[0]], dim=1))
    with torch.no_grad():
        assert comparison.difference([model(kept[0])], [kept[1]]) <= comparison.TOLERANCE


@pytest.mark.parametrize("change", ["none", "autocast", "model", "subclass"])
def test_a_rollout_reads_its_response_again_only_where_it_has_to(change, monkeypatch):
    """The actor's model is called for the logits where somebody else's code may change them."""
    from palm_rlhf_pytorch import ppo

    call = _rebinding("train").call(False)
    trainer = call.args[0]
    original = ppo.RLHFTrainer.train
    actor = trainer.actor_critic
    if change == "autocast":  # as accelerate wraps it
        actor.forward = lambda *args, **kwargs: ppo.ActorCritic.forward(actor, *args, **kwargs)
    elif change == "model":
        model = actor.actor_palm
        model.forward = lambda *args, **kwargs: palm.PaLM.forward(model, *args, **kwargs)
    elif change == "subclass":
        actor.__class__ = type("Other", (ppo.ActorCritic,), {})
    expected = comparison.run(original, call)
    lengths = []
    forward = palm.PaLM.forward

    def counted(self, x, *args, **kwargs):
        if self is actor.actor_palm and x.shape[1] == 24:
            lengths.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(palm.PaLM, "forward", counted)
    found = comparison.run(_rebinding("train").make(original), call)
    assert comparison.difference(expected, found) <= comparison.TOLERANCE
    assert len(lengths) == (0 if change == "none" else 2)  # two rollouts of the whole length


def test_logits_of_what_was_padded_are_not_those_of_its_sampling():
    from rlhf_kernels.stacks.palm_rollout import _Sampling

    torch.manual_seed(0)
    model = palm.PaLM(num_tokens=50, dim=24, depth=1, dim_head=8, heads=2).eval()
    prompt = torch.randint(1, 50, (2, 5))
    prompt[:, 2] = 7
    for eos in (None, 7):  # 7: every row has had it, so that the first new token is padding
        sampling = _Sampling(model, palm.PaLM.generate)
        tokens = torch.cat([prompt, sampling.generate(6, prompt=prompt, eos_token=eos)], dim=1)
        assert torch.equal(tokens, sampling.tokens) == (eos is None)
        with torch.no_grad():
            assert comparison.difference([model(tokens)], [sampling(tokens)]) <= comparison.TOLERANCE
