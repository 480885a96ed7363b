"""PPO held to the details that a real one must get right.

The names of the tests from `test_1` on are those of the list of implementation details, in its order
(Huang et al., 2024, "The N implementation details of RLHF with PPO").
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.algorithms.estimators import gae_with_kl, kl_estimate
from palm_rlhf.algorithms.objectives import clipped_policy_loss, clipped_value_loss, log_ratio, masked_mean
from palm_rlhf.algorithms.row import Outputs, Whole
from palm_rlhf.algorithms.table import ALGORITHMS, PPOOptions, ppo_estimator, ppo_objective
from palm_rlhf.generation import generate
from palm_rlhf.models.value import Policy, ValueModel, set_dropout
from palm_rlhf.rollout import Rollout
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer
from rlhf_kernels import masked_normalize

PROMPTS = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12], [1, 2, 1, 2], [5, 5], [7, 8, 9]]


class Setting:
    """A policy with adapters, its reference and a critic, and what was sampled, with advantages."""

    def __init__(self, make_palm, *, temperature: float = 0.7, seed: int = 0, **sampling) -> None:
        model = make_palm(
            finetune_scopes=("actor", "critic"), attn_dropout=0.1, ff_dropout=0.1, dim=16, dim_head=8
        )
        self.model, self.temperature = model.train(), temperature
        self.policy, self.reference = Policy(model, "actor"), Policy(model)
        self.critic = ValueModel(model, "critic")
        self.critic.value_head.weight.data.normal_()
        set_dropout(0.0, self.policy, self.critic)
        generation = generate(
            model, PROMPTS, max_new_tokens=9, temperature=temperature, stop=[2, 3, 4, 5], scope="actor",
            generator=torch.Generator().manual_seed(seed), **sampling,
        )  # fmt: skip
        score = torch.linspace(-1, 1, len(PROMPTS))
        self.rollout = Rollout(generation, temperature, score)
        with torch.no_grad():
            reference = self.score(self.reference, self.rollout)[0]
            self.rollout = replace(
                self.rollout, reference_logprob=reference, values=self.values(self.rollout)
            )
        self.options = PPOOptions(entropy_coef=0.01)
        advantages, returns = ppo_estimator(self.rollout, self.options)
        self.rollout = replace(self.rollout, advantages=advantages, returns=returns)

    def score(self, policy: Policy, rollout: Rollout):
        g = rollout.generation
        return policy(g.tokens, g.mask, g.prompt_width, rollout.temperature)

    def values(self, rollout: Rollout):
        g = rollout.generation
        return self.critic(g.tokens, g.mask)[:, g.prompt_width - 1 : -1]

    def outputs(self, rollout: Rollout) -> Outputs:
        return Outputs(*self.score(self.policy, rollout), self.values(rollout))

    def loss(self, rollout: Rollout, count=None):
        count = rollout.mask.sum() if count is None else count
        return ppo_objective(rollout, self.outputs(rollout), self.options, Whole(count, len(rollout), 9))

    def learns(self) -> list[torch.nn.Parameter]:
        return [*self.policy.trained(), *self.critic.trained()]

    def move(self) -> None:
        """As some updates would: the policy is no longer the one that sampled."""
        with torch.no_grad():
            for parameter in self.learns():
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture
def setting(make_palm) -> Setting:
    return Setting(make_palm)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.0}], ids=str)
def test_1_the_ratio_is_one_before_the_first_update(make_palm, sampling):
    s = Setting(make_palm, **sampling)
    mask = s.rollout.mask
    assert not mask.all()
    logprob, _ = s.score(s.policy, s.rollout)
    assert log_ratio(logprob, s.rollout.logprob, mask).abs().max() < 1e-5
    loss = s.loss(s.rollout)
    assert loss.metrics["clip_fraction"] == 0
    assert loss.metrics["approx_kl"].abs() < 1e-6
    torch.testing.assert_close(
        loss.metrics["policy_loss"], -masked_mean(s.rollout.advantages, mask), atol=1e-5, rtol=0
    )
    # Dropout, were it on, would be seen here.
    s.policy.model.set_dropout(0.1)
    assert log_ratio(s.score(s.policy, s.rollout)[0], s.rollout.logprob, mask).abs().max() > 1e-3


def test_1_scored_twice_in_the_same_minibatches_the_ratio_is_exactly_one(setting):
    def scored(part):
        with torch.no_grad():
            return setting.score(setting.policy, part)[0]

    for part in setting.rollout.minibatches(2, torch.Generator().manual_seed(0)):
        for piece in part.micro_batches(1):
            old = replace(piece, generation=replace(piece.generation, logprob=scored(piece)))
            logprob = setting.score(setting.policy, piece)[0].detach()
            assert torch.equal(log_ratio(logprob, old.logprob, piece.mask).exp(), torch.ones_like(logprob))


def test_2_logprobs_are_those_at_the_temperature_of_sampling(setting):
    g, model = setting.rollout.generation, setting.model
    for row in range(len(PROMPTS)):
        prompt, response = g.prompt(row), g.response(row)
        ids = torch.tensor([prompt + response])
        logits = model(ids, finetune_scope="actor")[0, len(prompt) - 1 : -1]
        expected = F.log_softmax(logits / 0.7, -1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(g.logprob[row][g.response_mask[row]], expected, atol=1e-5, rtol=0)


def test_3_padding_of_a_rollout_changes_no_loss_and_no_gradient(setting):
    setting.move()
    cut = setting.rollout.trimmed()
    wide = widened(cut, left=3, right=4)
    results = []
    for rollout in (cut, wide, setting.rollout):
        loss = setting.loss(rollout)
        results.append(
            (loss.total, *loss.metrics.values(), *torch.autograd.grad(loss.total, setting.learns()))
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-5)


def widened(rollout: Rollout, left: int, right: int) -> Rollout:
    """More columns on both sides, of rubbish that the mask hides."""
    g = rollout.generation
    rubbish = {"reference_logprob": -9.0, "values": 7.0, "advantages": 50.0, "returns": -30.0}
    pad = lambda x, value: F.pad(x, (0, 0) * (x.dim() - 2) + (0, right), value=value)  # noqa: E731
    if rollout.head_ids is not None:
        rubbish |= {"head_ids": 0, "head_logprob": -1.0}
    changed = {name: pad(x, rubbish[name]) for name in rubbish if (x := getattr(rollout, name)) is not None}
    wide = replace(
        g, tokens=F.pad(g.tokens, (left, right), value=6), mask=F.pad(g.mask, (left, right)),
        prompt_width=g.prompt_width + left, logprob=pad(g.logprob, -3.0), log_mass=pad(g.log_mass, -1.0),
    )  # fmt: skip
    return replace(rollout, generation=wide, **changed)


def test_3_padding_changes_no_advantage(setting):
    cut, wide = setting.rollout.trimmed(), widened(setting.rollout.trimmed(), left=2, right=5)
    steps = cut.mask.shape[1]
    for found, expected in zip(ppo_estimator(wide, setting.options), ppo_estimator(cut, setting.options)):
        torch.testing.assert_close(found[:, :steps], expected, atol=1e-6, rtol=1e-6)
        assert not found[:, steps:].any()


def test_4_the_value_is_that_before_the_action_token(setting):
    """The value of a token is read where its logits are: changing the token changes no value up to itself."""
    g = setting.rollout.generation
    row, step = 0, 1
    tokens = g.tokens.clone()
    at = g.prompt_width + step
    tokens[row, at] = (tokens[row, at] + 1) % 20
    changed = replace(setting.rollout, generation=replace(g, tokens=tokens))
    before, after = setting.values(setting.rollout)[row], setting.values(changed)[row]
    torch.testing.assert_close(after[: step + 1], before[: step + 1], atol=1e-6, rtol=0)
    assert (after[step + 1] - before[step + 1]).abs() > 1e-3
    direct = setting.critic(torch.tensor([g.prompt(row)]))[0, -1]
    torch.testing.assert_close(before[0], direct, atol=1e-5, rtol=0)


def test_5_a_reward_sees_nothing_after_the_stop_and_without_a_stop_there_is_a_score_of_its_own(make_palm):
    seen = []

    def reward(generation):
        seen.append(generation)
        return torch.full((len(generation.tokens),), 2.0)

    model = make_palm()
    config = OnlineConfig(prompts=6, samples=4, max_new_tokens=6, missing_stop_score=-1.0, temperature=1.3)
    algorithm = replace(ALGORITHMS["ppo"], critic=False, reference=False)
    trainer = OnlineTrainer(algorithm, Policy(model), reward, PROMPTS, config=config, stop=2)
    rollout = trainer.rollout()
    stopped = rollout.generation.stopped
    assert stopped.any()
    assert not stopped.all()
    assert torch.equal(rollout.score, torch.where(stopped, 2.0, -1.0))
    for row in range(len(rollout)):
        assert 2 not in seen[0].response(row)[:-1]
        assert (seen[0].response(row)[-1] == 2) == bool(stopped[row])


def test_7_values_are_zero_at_first(make_palm):
    critic = ValueModel(make_palm())
    assert not critic(torch.ones(2, 5, dtype=torch.int64)).any()


def by_hand(rollout: Rollout, kl_coef: float, gamma: float, lam: float, kind: str):
    """Advantages and returns of a rollout row by row, in the order in which the definition has them."""
    advantages, returns = torch.zeros_like(rollout.values), torch.zeros_like(rollout.values)
    for row in range(len(rollout)):
        length = int(rollout.mask[row].sum())
        kl = kl_estimate(rollout.logprob[row], rollout.reference_logprob[row], kind)
        rewards = [-kl_coef * float(kl[t]) for t in range(length)]
        rewards[-1] += float(rollout.score[row])
        advantage = following = 0.0
        for t in reversed(range(length)):
            value = float(rollout.values[row, t])
            advantage = rewards[t] + gamma * following - value + gamma * lam * advantage
            following = value
            advantages[row, t], returns[row, t] = advantage, advantage + value
    return advantages, returns


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_8_the_penalty_is_in_the_reward_and_the_score_at_the_last_real_token(setting, kind):
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0)):
        found = gae_with_kl(setting.rollout, kl_coef=0.3, kl=kind, gamma=gamma, lam=lam, whiten=False)
        expected = by_hand(setting.rollout, 0.3, gamma, lam, kind)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_8_the_score_is_at_the_last_real_token_alone(setting):
    """With lambda 0 and gamma 0 an advantage is its own reward, less the value."""
    zero = torch.zeros_like(setting.rollout.values)
    plain = replace(setting.rollout, values=zero, score=torch.full((len(PROMPTS),), 5.0))
    rewards, _ = gae_with_kl(plain, kl_coef=0.0, gamma=0.0, lam=0.0, whiten=False)
    last = plain.mask.sum(1) - 1
    expected = zero.scatter(1, last[:, None], 5.0)
    torch.testing.assert_close(rewards, expected)


def test_9_gamma_is_one_and_lambda_095_and_returns_are_before_whitening(setting):
    assert (setting.options.gamma, setting.options.lam) == (1.0, 0.95)
    expected, returns = by_hand(setting.rollout, setting.options.kl_coef, 1.0, 0.95, "k1")
    torch.testing.assert_close(setting.rollout.returns, returns, atol=1e-5, rtol=1e-5)
    whitened = masked_normalize(expected, setting.rollout.mask, zero_masked=True)
    torch.testing.assert_close(setting.rollout.advantages, whitened, atol=1e-5, rtol=1e-5)


def test_10_whitening_is_over_the_real_tokens_of_the_whole_batch(setting):
    found = setting.rollout.advantages[setting.rollout.mask]
    assert found.mean().abs() < 1e-6
    torch.testing.assert_close(found.var(unbiased=False), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert not setting.rollout.advantages[~setting.rollout.mask].any()
    # Not of rows, and not of the parts in which it is learnt.
    rows = [setting.rollout.advantages[row][setting.rollout.mask[row]].mean() for row in range(len(PROMPTS))]
    assert torch.stack(rows).abs().max() > 0.1


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_12_what_stands_in_masked_slots_reaches_nothing(setting, rubbish):
    rollout, mask = setting.rollout, setting.rollout.mask
    hidden = ~mask
    expected_estimates = ppo_estimator(rollout, setting.options)
    outputs = Outputs(*(x.detach() for x in setting.outputs(rollout)[:3]))

    def results(rollout, outputs):
        given = [x.clone().requires_grad_() for x in outputs[:3]]
        loss = ppo_objective(rollout, Outputs(*given), setting.options, Whole(mask.sum(), len(rollout), 9))
        return [loss.total, *loss.metrics.values(), *torch.autograd.grad(loss.total, given)]

    expected = results(rollout, outputs)
    spoil = lambda x: x.masked_fill(hidden, rubbish)  # noqa: E731
    names = ("reference_logprob", "values", "advantages", "returns")
    if rollout.head_ids is not None:
        rubbish |= {"head_ids": 0, "head_logprob": -1.0}
    changed = {name: spoil(getattr(rollout, name)) for name in names}
    generation = replace(
        rollout.generation, logprob=spoil(rollout.logprob), log_mass=spoil(rollout.generation.log_mass)
    )
    spoiled = replace(rollout, generation=generation, **changed)
    found = results(spoiled, Outputs(*map(spoil, outputs[:3])))
    for mine, theirs in zip(found, expected):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(ppo_estimator(spoiled, setting.options), expected_estimates):
        assert torch.equal(mine, theirs)


def test_13_micro_batches_give_the_gradient_of_one_batch(setting):
    setting.move()
    whole = setting.loss(setting.rollout)
    expected = torch.autograd.grad(whole.total, setting.learns())
    count = setting.rollout.mask.sum()
    for size in (1, 2, 4):
        metrics = dict.fromkeys(whole.metrics, 0.0)
        found = [torch.zeros_like(p) for p in setting.learns()]
        for part in setting.rollout.micro_batches(size):
            loss = setting.loss(part, count)
            for total, grad in zip(found, torch.autograd.grad(loss.total, setting.learns())):
                total.add_(grad)
            metrics = {name: metrics[name] + value for name, value in loss.metrics.items()}
        torch.testing.assert_close(found, list(expected), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(metrics, whole.metrics, atol=1e-6, rtol=1e-5)


def test_metrics_are_means_over_real_tokens(setting):
    setting.move()
    rollout, outputs = setting.rollout, setting.outputs(setting.rollout)
    loss = setting.loss(rollout)
    mask, o = rollout.mask, setting.options
    shift = (outputs.logprob - rollout.logprob)[mask]
    ratio = shift.exp()
    expected = {
        "entropy": outputs.entropy[mask].mean(),
        "clip_fraction": ((ratio - 1).abs() > 0.2).float().mean(),
        "approx_kl": (ratio - 1 - shift).mean(),
        "value_loss": clipped_value_loss(
            outputs.values[mask], rollout.values[mask], rollout.returns[mask], clip=0.2
        ).mean(),
        "policy_loss": clipped_policy_loss(shift, rollout.advantages[mask]).mean(),
    }
    assert expected["clip_fraction"] > 0
    torch.testing.assert_close(
        loss.metrics, {name: expected[name].detach() for name in loss.metrics}, atol=1e-6, rtol=1e-5
    )
    total = (
        expected["policy_loss"] + o.value_coef * expected["value_loss"] - o.entropy_coef * expected["entropy"]
    )
    torch.testing.assert_close(loss.total, total, atol=1e-6, rtol=1e-5)


def test_11_the_usual_clips_are_the_defaults():
    o = PPOOptions()
    assert (o.clip, o.value_clip, o.value_coef) == (0.2, 0.2, 0.1)
    assert o.clip_high is o.dual_clip is None


def test_without_a_reference_there_is_no_penalty(setting):
    plain = replace(setting.rollout, reference_logprob=None)
    found = gae_with_kl(plain, kl_coef=0.5)
    expected = gae_with_kl(setting.rollout, kl_coef=0.0)
    torch.testing.assert_close(found, expected)


def test_an_update_makes_good_actions_likelier_and_bad_ones_less(setting):
    rate = torch.optim.Adam(setting.learns(), lr=1e-3)
    before = setting.score(setting.policy, setting.rollout)[0].detach()
    setting.loss(setting.rollout).total.backward()
    rate.step()
    after = setting.score(setting.policy, setting.rollout)[0].detach()
    gained = masked_mean((after - before) * setting.rollout.advantages, setting.rollout.mask)
    assert gained > 0


def test_the_table_holds_what_it_says():
    for name, row in ALGORITHMS.items():
        assert row.name == name
        assert row.options() == row.options()
    assert ALGORITHMS["ppo"].critic
    assert ALGORITHMS["ppo"].reference
