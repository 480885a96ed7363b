"""Adapters: no change at first, one and the same thing merged or apart, and learning by themselves."""

import pytest
import torch

from palm_rlhf.models.checkpoint import read_tensors, write_tensors
from palm_rlhf.models.lora import LoRA
from palm_rlhf.models.value import Policy, ValueModel, frozen, set_dropout
from palm_rlhf.rewards import RewardModel, load_reward_model, save_reward_model

SAME = {"atol": 1e-5, "rtol": 1e-5}


def test_new_adapters_change_nothing(palm, tokens):
    exact = palm(tokens)
    palm.add_finetune_params("new")
    assert torch.equal(palm(tokens, finetune_scope="new"), exact)


def test_the_scale_is_alpha_over_r(tokens):
    lora = LoRA(6, 4, r=2, alpha=8)
    lora.B.data.normal_()
    x = torch.randn(3, 6)
    torch.testing.assert_close(lora(x), x @ lora.A @ lora.B * 4)
    torch.testing.assert_close(lora(x), x @ lora.weight)
    with pytest.raises(ValueError, match="rank"):
        LoRA(6, 4, r=0)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"qk_rmsnorm": True}], ids=str)
def test_merged_adapters_give_what_they_gave_apart(make_palm, tokens, options):
    model = make_palm(finetune_scopes=("a", "b"), lora_r=3, **options)
    apart, other = model(tokens, finetune_scope="a"), model(tokens, finetune_scope="b")
    assert not torch.allclose(apart, other, atol=1e-2)
    model.merge_finetune_params("a")
    torch.testing.assert_close(model(tokens), apart, **SAME)
    assert list(model.finetune_modules) == ["b"]


def test_every_adapter_has_its_own_rank(make_palm, tokens):
    model = make_palm(lora_r=5)
    model.add_finetune_params("small", 1)
    model.add_finetune_params("usual")
    assert [model.finetune_modules[scope][0][0].A.shape[1] for scope in ("small", "usual")] == [1, 5]


def test_removed_adapters_are_given_back(make_palm, tokens):
    model = make_palm(finetune_scopes=("a",))
    expected = model(tokens, finetune_scope="a")
    taken = model.remove_finetune_params("a")
    with pytest.raises(ValueError, match="'a'"):
        model(tokens, finetune_scope="a")
    model.finetune_modules["again"] = taken
    assert torch.equal(model(tokens, finetune_scope="again"), expected)


def test_scopes_that_exist_or_do_not(make_palm):
    model = make_palm(finetune_scopes=("a",))
    with pytest.raises(ValueError, match="a"):
        model.add_finetune_params("a")
    for call in (model.remove_finetune_params, model.merge_finetune_params, model.finetune_parameters):
        with pytest.raises(ValueError, match="'b'"):
            call("b")


def test_what_learns_beside_16_bits_is_float32(make_palm, tokens, tmp_path):
    model = make_palm().bfloat16()
    model.add_finetune_params("a", targets="all")
    assert {p.dtype for p in model.finetune_parameters("a")} == {torch.float32}
    reward = RewardModel(model, dropout=0.0)
    heads = [*ValueModel(model, "a", bins=5).value_head.parameters(), *reward.finetune_parameters()]
    assert {p.dtype for p in heads} == {torch.float32}
    # What they add to keeps its dtype, and merged or apart they are the same to its rounding.
    with torch.no_grad():
        for parameter in (*model.finetune_parameters("a"), *reward.finetune_parameters()):
            parameter.add_(0.02)
    found = model.hidden_states(tokens, scope="a")
    torch.testing.assert_close(
        model.for_sampling("a").hidden_states(tokens), found, atol=0.1, rtol=0.1, check_dtype=True
    )
    assert found.dtype is torch.bfloat16
    assert reward(tokens, prompt_lengths=torch.ones(3)).dtype is torch.float32

    # A file of before, whose head has 16 bits, loads as it is.
    tensors, about = read_tensors(save_reward_model(tmp_path / "reward.safetensors", reward))
    write_tensors(tmp_path / "old.safetensors", {name: x.bfloat16() for name, x in tensors.items()}, about)
    old = load_reward_model(tmp_path / "old.safetensors")
    assert old(tokens, prompt_lengths=torch.ones(3)).isfinite().all()


def test_parameters_of_the_model_and_of_a_scope_are_told_apart(make_palm):
    model = make_palm(finetune_scopes=("a", "b"))
    a, b, rest = (
        set(model.finetune_parameters("a")),
        set(model.finetune_parameters("b")),
        model.palm_parameters(),
    )
    assert a | b | rest == set(model.parameters())
    assert len(a) + len(b) + len(rest) == len(list(model.parameters()))


def test_only_what_learns_has_gradients(make_palm, tokens):
    model = frozen(make_palm(finetune_scopes=("actor", "critic")))
    policy, critic = Policy(model, "actor"), ValueModel(model, "critic")
    critic.value_head.weight.data.normal_()
    for part in (policy, critic):
        for parameter in part.trained():
            parameter.requires_grad_()
    logprob, entropy = policy(tokens, None, 4)
    (logprob.sum() + entropy.sum() + critic(tokens).sum()).backward()
    learns = {id(p) for part in (policy, critic) for p in part.trained()}
    assert len(learns) == 2 * 8 * len(model.layers) + 2
    for module in (policy, critic):
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in learns), name
    actor = list(model.finetune_parameters("actor"))
    for parameter in actor:
        assert parameter.grad.any()
    # The critic's loss moves nothing of the actor.
    for parameter in actor:
        parameter.grad = None
    critic(tokens).square().sum().backward()
    assert all(p.grad is None for p in actor)


def test_without_a_scope_everything_learns_and_no_adapter(make_palm):
    model = make_palm()
    assert set(Policy(model).trained()) == set(model.parameters())
    assert len(list(ValueModel(model).trained())) == len(list(model.parameters())) + 2


def test_values_are_zero_before_the_first_update(palm, tokens):
    assert not ValueModel(palm)(tokens).any()


def test_no_dropout_turns_it_off_in_all_of_them(make_palm, tokens):
    model = make_palm(attn_dropout=0.5, ff_dropout=0.5).train()
    other = torch.nn.Sequential(torch.nn.Dropout(0.5))
    set_dropout(0.0, Policy(model), other)
    assert torch.equal(model(tokens), model(tokens))
    assert other[0].p == 0.0
