"""The online trainer: prompts in turn, rates, critics, what it needs and what it leaves alone."""

import copy
from dataclasses import replace

import pytest
import torch

from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.generation import generate
from palm_rlhf.models.value import Policy, ValueModel, frozen
from palm_rlhf.rollout.store import RolloutStore
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer

PPO = ALGORITHMS["ppo"]
PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 3], [4, 4, 4]]
CONFIG = OnlineConfig(prompts=4, max_new_tokens=5, minibatch=2, steps=4, policy_lr=1e-3, critic_lr=1e-3)


def ones(generation):
    """One point for every token 3."""
    return ((generation.responses == 3) & generation.response_mask).sum(1).float()


def trainer(make_palm, config=CONFIG, reward=ones, lora=True, **options):
    model = make_palm(finetune_scopes=("actor", "critic") if lora else ())
    parts = {"policy": Policy(model, "actor" if lora else None)}
    parts["reference"] = Policy(model if lora else frozen(copy.deepcopy(model)))
    parts["critic"] = ValueModel(model, "critic") if lora else ValueModel(copy.deepcopy(model))
    given = {"algorithm": PPO} | parts | options
    return OnlineTrainer(
        given.pop("algorithm"), given.pop("policy"), reward, PROMPTS, config=config, stop=2, **given
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_every_prompt_comes_once_before_any_comes_again(make_palm):
    one = trainer(make_palm)
    drawn = [tuple(p) for _ in range(5) for p in one.next_prompts()]
    for start in range(0, 20, 5):
        assert set(drawn[start : start + 5]) == {tuple(p) for p in PROMPTS}


def test_with_adapters_the_backbone_stays_as_it_is(make_palm):
    one = trainer(make_palm)
    before = state(one.policy.model)
    one.step(0)
    moved = changed(before, state(one.policy.model))
    assert {name.split(".")[1] for name in moved} == {"actor", "critic"}
    assert all(name.startswith("finetune_modules") for name in moved)
    assert one.critic.value_head.weight.any()


def test_without_adapters_the_reference_stays_and_policy_and_critic_go_their_own_ways(make_palm):
    one = trainer(make_palm, lora=False)
    before = state(one.reference.model)
    for index in range(3):
        one.step(index)
    assert not changed(before, state(one.reference.model))
    moved = [changed(before, state(part.model)) for part in (one.policy, one.critic)]
    assert all(moved)
    assert changed(state(one.policy.model), state(one.critic.model))


def test_the_critic_alone_learns_in_its_warm_up(make_palm):
    one = trainer(make_palm, replace(CONFIG, critic_warmup=1))
    before, head = state(one.policy.model), one.critic.value_head.weight.clone()
    one.step(0)
    assert not {name for name in changed(before, state(one.policy.model)) if ".actor." in name}
    assert not torch.equal(one.critic.value_head.weight, head)
    one.step(1)
    assert {name for name in changed(before, state(one.policy.model)) if ".actor." in name}


def test_rates_rise_and_fall(make_palm):
    one = trainer(make_palm, replace(CONFIG, steps=10, warmup=3))
    rates = []
    for index in range(10):
        one._set_rates(index)
        rates.append(one.optimizers()["policy"].param_groups[0]["lr"] / CONFIG.policy_lr)
    assert rates == pytest.approx([0.25, 0.45, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    constant = trainer(make_palm, replace(CONFIG, anneal=False))
    constant._set_rates(3)
    assert constant.optimizers()["critic"].param_groups[0]["lr"] == CONFIG.critic_lr


def test_micro_batches_change_no_update_beyond_rounding(make_palm):
    states = []
    for micro_batch in (None, 1):
        one = trainer(make_palm, replace(CONFIG, micro_batch=micro_batch, policy_lr=1e-2))
        one.step(0)
        states.append(state(one.policy.model))
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_reward_that_is_sought_is_found(make_palm):
    config = OnlineConfig(
        prompts=32, max_new_tokens=4, minibatch=16, steps=25, policy_lr=2e-2, critic_lr=1e-2
    )
    one = trainer(make_palm, config, lora=False)
    rewards = [one.step(index)["reward"] for index in range(25)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1


def test_evaluation_is_logged_before_and_now_and_then(make_palm):
    seen = []

    def evaluate(policy, generator):
        seen.append(policy.scope)
        return {"accuracy": float(len(seen))}

    one = trainer(make_palm, evaluate=evaluate, eval_every=2)
    rows = [one.step(index) for index in range(4)]
    assert rows[0]["accuracy_before"] == 1
    assert [row.get("accuracy") for row in rows] == [None, 2, None, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": None}, "ppo needs a critic"),
        ({"reference": None}, "ppo needs a reference"),
        (
            {"algorithm": ALGORITHMS["reinforce++"], "config": replace(CONFIG, critic_warmup=2)},
            "critic_warmup=2 lets a critic learn alone, and reinforce\\+\\+ has none",
        ),
    ],
)
def test_what_an_algorithm_needs_is_asked_for(make_palm, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(make_palm, **options)


def test_weights_in_float16_do_not_learn(make_palm):
    """Nothing scales a loss here, and gradients in float16 underflow; those of adapters as well."""
    half = make_palm(finetune_scopes=("actor",)).half()
    with pytest.raises(ValueError, match=r"weights in float16 do not learn here.* Train weights in float32"):
        trainer(make_palm, policy=Policy(half))
    half.finetune_modules.float()
    with pytest.raises(ValueError, match="Train with --dtype bfloat16"):
        trainer(make_palm, policy=Policy(half, "actor"))
    # A reference alone may have them.
    trainer(make_palm, reference=Policy(make_palm().half()))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_run(make_palm, odd):
    one = trainer(make_palm, reward=lambda generation: torch.full((4,), odd))
    with pytest.raises(ValueError, match="a reward is not finite"):
        one.step(0)


@pytest.mark.parametrize("shape", [(1,), (4, 1), ()])
def test_a_reward_that_is_not_one_number_a_response_stops_the_run(make_palm, shape):
    """One number for all would have been that of every response, without a word."""
    one = trainer(make_palm, reward=lambda generation: torch.rand(shape))
    with pytest.raises(ValueError, match=r"a reward gives a tensor \[4\], a number for each of 4 responses"):
        one.step(0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("temperature", 0.0, "temperature must be above 0"), ("minibatch", 0, "minibatch must be at least 1")],
)
def test_a_configuration_without_sense_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        OnlineConfig(**{name: value})


def test_the_trainers_values_are_those_before_each_token(make_palm):
    """Item 4, in the trainer itself: the value of a token has not seen it."""
    one = trainer(make_palm)
    torch.nn.init.normal_(one.critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    rollout = one.rollout()
    with torch.no_grad():
        found, _ = one._values(rollout, one.critic)
        for row in range(len(rollout)):
            text = rollout.generation.prompt(row) + rollout.generation.response(row)
            start = len(rollout.generation.prompt(row))
            for step in range(int(rollout.mask[row].sum())):
                direct = one.critic(torch.tensor([text[: start + step]]))[0, -1]
                torch.testing.assert_close(found[row, step], direct, rtol=1e-5, atol=1e-5)


def test_a_rollout_does_not_depend_on_how_many_are_sampled_at_a_time(make_palm):
    config = replace(CONFIG, samples=2, max_new_tokens=8)
    found = [trainer(make_palm, replace(config, rollout_batch=size)).rollout() for size in (None, 2)]
    assert torch.equal(found[0].generation.seeds, found[1].generation.seeds)
    for row in range(8):
        assert found[0].generation.response(row) == found[1].generation.response(row)
    g = found[0].generation
    seed = g.seeds[[5]]
    again = generate(
        make_palm(finetune_scopes=("actor", "critic")), [g.prompt(5)], max_new_tokens=8, scope="actor",
        stop=2, seeds=seed,
    )  # fmt: skip
    assert again.response(0) == g.response(5)


def test_a_rollout_that_was_kept_teaches_what_it_taught(make_palm, tmp_path):
    store = RolloutStore(tmp_path)
    one, other = trainer(make_palm, store=store), trainer(make_palm)
    for index in range(2):
        metrics = one.step(index)
        found = other.update(RolloutStore(tmp_path).rollout(index), index)
        assert all(metrics[name] == value for name, value in found.items())
    for name, tensor in state(one.policy.model).items():
        assert torch.equal(tensor, state(other.policy.model)[name]), name
    assert [row["step"] for row in store.rollouts] == [0, 1]
    one.step(1)
    assert [row["step"] for row in RolloutStore(tmp_path).rollouts] == [0, 1]
