"""What must hold for every row of the table of online algorithms, in the trainer that knows none."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from palm_rlhf.algorithms.objectives import log_ratio
from palm_rlhf.algorithms.row import Whole
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.models.packing import set_packed
from palm_rlhf.models.value import Policy, ValueModel
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer
from tests.palm.test_algorithms import widened

PROMPTS = [[3, 4, 5, 6], [9], [10, 11, 12], [1, 2]]
CONFIG = OnlineConfig(
    prompts=3, samples=4, max_new_tokens=6, temperature=0.8, minibatch=4, policy_lr=2e-3, critic_lr=2e-3
)
# Every row as it is, and each option that changes a formula once.
CASES = [(name, {}) for name in ALGORITHMS] + [
    ("ppo", {"kl_in": "loss", "kl": "k2", "entropy_coef": 0.01}),
    ("ppo", {"critic_bins": 11, "critic_low": -2.0, "critic_high": 2.0}),
    ("grpo", {"dual_clip": 3.0, "clip_high": 0.28, "average": "token-mean"}),
    ("rloo", {"ratio": "token", "average": "sequence-sum", "kl": "k3"}),
]
IDS = ["-".join([name, *options]) for name, options in CASES]
# Rounding in float32 would hide a difference of 1e-6; not every kernel knows float64.
quiet = pytest.mark.filterwarnings("ignore::rlhf_kernels.runtime.dispatch.FallbackWarning")
every_row = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def good(generation):
    """Between 0 and 1: the share of tokens 3 and 4."""
    right = (generation.responses == 3) | (generation.responses == 4)
    return (right & generation.response_mask).sum(1) / generation.response_mask.sum(1)


def make(make_palm, name, options=None, config=CONFIG, dtype=torch.float32, **sizes):
    algorithm = ALGORITHMS[name]
    model = make_palm(**({"dim": 16, "dim_head": 8} | sizes), finetune_scopes=("actor", "critic")).to(dtype)
    o = algorithm.options(**(options or {}))
    bins = (
        {"bins": b, "low": o.critic_low, "high": o.critic_high} if (b := getattr(o, "critic_bins", 0)) else {}
    )
    critic = ValueModel(model, "critic", **bins) if algorithm.critic else None
    if critic is not None:
        torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    return OnlineTrainer(
        algorithm, Policy(model, "actor"), good, PROMPTS, config=config, stop=2,
        options=o, reference=Policy(model), critic=critic,
    )  # fmt: skip


def learned(trainer):
    groups = [g for optimizer in trainer.optimizers().values() for g in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"]]


def result(trainer, rollout, whole=None):
    """The loss, all metrics, and one vector of all gradients."""
    whole = Whole(rollout.mask.sum(), len(rollout), CONFIG.max_new_tokens) if whole is None else whole
    loss = trainer.algorithm.objective(rollout, trainer.outputs(rollout), trainer.options, whole)
    found = torch.autograd.grad(loss.total, learned(trainer), allow_unused=True)
    gradient = torch.cat([g.flatten() for g in found if g is not None])
    return torch.stack([loss.total.detach(), *loss.metrics.values()]).double(), gradient


def same(found, expected, relative=1e-6):
    for mine, theirs in zip(found, expected):
        assert (mine - theirs).norm() <= relative * theirs.norm(), float(
            (mine - theirs).norm() / theirs.norm()
        )


def off_policy(trainer):
    """A rollout with advantages, and a policy that has moved on since."""
    rollout = trainer.estimated(trainer.rollout())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learned(trainer):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return rollout


@every_row
def test_before_the_first_update_the_learner_finds_what_the_sampler_recorded(make_palm, name, options):
    trainer = make(make_palm, name, options)
    rollout = trainer.estimated(trainer.rollout())
    assert not rollout.mask.all()
    for part in rollout.minibatches(4, torch.Generator().manual_seed(0), groups=trainer.algorithm.groups):
        found = trainer.outputs(part).logprob.detach()
        assert log_ratio(found, part.logprob, part.mask).abs().max() < 1e-5
        # Scored twice in the same minibatch the ratio is exactly 1.
        own = replace(part, generation=replace(part.generation, logprob=found))
        again = log_ratio(trainer.outputs(own).logprob, own.logprob, own.mask).exp()
        assert torch.equal(again, torch.ones_like(again))


@quiet
@every_row
def test_padding_order_and_packing_change_no_loss_and_no_gradient(make_palm, name, options):
    trainer = make(make_palm, name, options, dtype=torch.float64)
    rollout = off_policy(trainer)
    expected = result(trainer, rollout.trimmed())
    assert expected[1].norm() > 1e-3
    parts = [part for part in (trainer.policy, trainer.critic) if part is not None]
    for packed in (False, True):
        set_packed(packed, *parts)
        same(result(trainer, widened(rollout.trimmed(), left=3, right=4)), expected)
        same(result(trainer, rollout.rows(torch.randperm(len(rollout)))), expected)
    # Of the estimates as well.
    shuffle = torch.randperm(len(rollout))
    for changed, back in (
        (rollout.rows(shuffle), shuffle.argsort()),
        (widened(rollout, left=2, right=3), torch.arange(len(rollout))),
    ):
        found, _ = trainer.algorithm.estimator(changed, trainer.options)
        same([found[back][:, : rollout.mask.shape[1]]], [rollout.advantages])


@quiet
@every_row
def test_parts_of_an_update_add_up_to_it(make_palm, name, options):
    trainer = make(make_palm, name, options, dtype=torch.float64)
    rollout = off_policy(trainer)
    expected = result(trainer, rollout)
    whole = Whole(rollout.mask.sum(), len(rollout), CONFIG.max_new_tokens)
    for size in (4, 8) if trainer.algorithm.groups else (1, 5):
        parts = [result(trainer, part, whole) for part in rollout.micro_batches(size)]
        same([torch.stack(found).sum(0) for found in zip(*parts)], expected)


@every_row
def test_what_stands_in_masked_slots_reaches_nothing(make_palm, name, options):
    trainer = make(make_palm, name, options)
    rollout = off_policy(trainer)
    expected = result(trainer, rollout)
    names = ("reference_logprob", "values", "advantages", "returns")
    there = {n: x for n in names if (x := getattr(rollout, n)) is not None}
    spoiled = {n: x.masked_fill(~rollout.mask, float("nan")) for n, x in there.items()}
    logprob = rollout.logprob.masked_fill(~rollout.mask, float("nan"))
    changed = replace(rollout, generation=replace(rollout.generation, logprob=logprob), **spoiled)
    for mine, theirs in zip(result(trainer, changed), expected):
        assert torch.equal(mine, theirs)
    found, _ = trainer.algorithm.estimator(changed, trainer.options)
    assert torch.equal(found, rollout.advantages)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_learns(make_palm, name):
    config = replace(
        CONFIG, prompts=4, samples=8, minibatch=16, steps=10, policy_lr=8e-2, critic_lr=1e-2, seed=5
    )
    options = {"auxiliary_every": 5, "auxiliary_epochs": 1} if ALGORITHMS[name].auxiliary else {}
    trainer = make(make_palm, name, options, config=config, depth=1)
    if trainer.critic is not None:
        torch.nn.init.zeros_(trainer.critic.value_head.weight)
    rewards = [trainer.step(index)["reward"] for index in range(config.steps)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards


def test_groups_stay_together_in_a_fresh_order(make_palm):
    rollout = make(make_palm, "grpo").rollout()
    assert rollout.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    draw = torch.Generator().manual_seed(0)
    orders = set()
    for _ in range(8):
        parts = [part.group.tolist() for part in rollout.minibatches(4, draw, groups=True)]
        assert all(len(set(part)) == 1 for part in parts)
        assert sorted(chain(*parts)) == rollout.group.tolist()
        orders.add(tuple(part[0] for part in parts))
    assert len(orders) > 2
    assert any(len(set(p.group.tolist())) > 1 for p in rollout.minibatches(4, draw))


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.samples > 1])
def test_one_response_is_no_group(make_palm, name):
    with pytest.raises(ValueError, match=f"{name.replace('+', '.')} compares responses to the same prompt"):
        make(make_palm, name, config=replace(CONFIG, samples=1))
    row = ALGORITHMS[name]
    OnlineConfig(**row.defaults)
    assert row.defaults["samples"] >= row.samples


def test_a_resumed_run_goes_on_with_the_weight_of_the_kl_term_that_it_had(make_palm):
    options = {"kl_target": 0.5, "kl_horizon": 20.0}
    one = make(make_palm, "grpo", options)
    metrics = [one.step(index) for index in range(2)]
    assert metrics[0]["kl_coef"] == 0.04
    assert one.options.kl_coef != metrics[1]["kl_coef"] != 0.04
    other = make(make_palm, "grpo", options)
    other.load_extra_state(one.extra_state())
    assert other.options == one.options


def test_rollouts_that_a_checkpoint_kept_go_where_the_policy_is(make_palm):
    trainer = make(make_palm, "ppg")
    trainer.step(0)
    state = trainer.extra_state()
    assert len(state["kept"]) == 1
    # A device that no tensor of the state is on, as a GPU is for a checkpoint, which is read to the CPU.
    trainer.policy.model.to("meta")
    trainer.load_extra_state(state)
    (kept,) = trainer._kept
    tensors = [
        x for part in (kept, kept.generation) for x in vars(part).values() if isinstance(x, torch.Tensor)
    ]
    assert len(tensors) > 8
    assert {x.device.type for x in tensors} == {"meta"}


def test_15_adam_divides_by_as_much_as_in_the_papers(make_palm):
    """A gradient as small as eps moves half as far; with PyTorch's 1e-8 it would move as far as any other."""
    trainer = make(make_palm, "ppo")
    moved = []
    for name, optimizer in trainer.optimizers().items():
        assert optimizer.defaults["eps"] == 1e-5, name
        parameter = optimizer.param_groups[0]["params"][0]
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, 1e-5)
        optimizer.step()
        moved.append((parameter - before).abs().mean() / optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(torch.stack(moved), torch.full((2,), 0.5), atol=1e-2, rtol=0)


def test_16_log_probabilities_are_float32_whatever_the_model(make_palm):
    model = make_palm().bfloat16()
    tokens = torch.cat([torch.full((23, 3), 5), torch.arange(23)[:, None]], 1)
    logprob, entropy = Policy(model)(tokens, torch.ones_like(tokens, dtype=torch.bool), 3)
    assert logprob.dtype == entropy.dtype == torch.float32
    # In bfloat16 the normaliser would be off by as much as 1 in 256.
    torch.testing.assert_close(logprob.exp().sum(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_16_in_bf16_the_product_with_the_vocabulary_is_float32_for_the_head_as_well(make_palm):
    policy = Policy(make_palm(spread=0.5))
    tokens = torch.arange(20).view(4, 5)
    every = torch.arange(23).expand(4, 3, 23)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logprob, _, head = policy.with_head(tokens, None, 2, 1.0, every)
        ids, best = policy.most_probable(tokens, None, 2, 1.0, 3)
    torch.testing.assert_close(head.gather(2, tokens[:, 2:, None]).squeeze(2), logprob, atol=1e-5, rtol=0)
    torch.testing.assert_close(head.gather(2, ids), best, atol=1e-5, rtol=0)


def test_17_every_epoch_takes_all_responses_in_a_fresh_order_and_rates_end_at_zero(make_palm):
    trainer = make(make_palm, "grpo")
    rollout = trainer.rollout()
    orders = []
    for _ in range(2):
        parts = list(trainer._minibatches(replace(rollout, score=torch.arange(12.0)), 1))
        orders.append([int(score) for part in parts for score in part.score])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1]
    trainer._set_rates(CONFIG.steps)
    assert {g["lr"] for o in trainer.optimizers().values() for g in o.param_groups} == {0.0}


def test_a_rollout_in_parts_is_one_rollout(make_palm):
    trainer = make(make_palm, "grpo", config=replace(CONFIG, rollout_batch=4))
    rollout = trainer.rollout()
    assert len(rollout) == 12
    assert rollout.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert rollout.generation.tokens.shape[1] - rollout.generation.prompt_width == rollout.mask.shape[1]
    prompts = {tuple(rollout.generation.prompt(row)) for row in range(12)}
    assert prompts <= {tuple(prompt) for prompt in PROMPTS}
    assert len(prompts) == 3
    found = trainer.outputs(rollout).logprob
    assert log_ratio(found, rollout.logprob, rollout.mask).abs().max() < 1e-5
