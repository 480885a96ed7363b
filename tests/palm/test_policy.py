"""Advantages without a critic, policy losses and KL weights, held to what other stacks give."""

from dataclasses import replace

import pytest
import torch

from palm_rlhf.algorithms import groups
from palm_rlhf.algorithms.estimators import adapted_kl_coef, returns_with_kl
from palm_rlhf.algorithms.objectives import averaged, entropy_shaped, simple_policy_loss
from palm_rlhf.algorithms.policy import PolicyOptions, adapted, moved, policy_objective
from palm_rlhf.algorithms.row import Outputs, Whole
from palm_rlhf.algorithms.table import MaxRLOptions
from tests.golden.load import golden
from tests.palm.test_objectives import shaped

SAMPLES = 4
LONGEST = 20


def records(function, package=None, book="policy"):
    found = [r for r in golden(book, package, function) if r["error"] is None]
    assert found
    return found


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **({"atol": 1e-6, "rtol": 1e-6} | tolerance))


def group_of(score):
    return torch.arange(len(score)) // SAMPLES


@pytest.mark.parametrize(
    ("function", "ours"),
    [
        ("compute_grpo_outcome_advantage", None),
        ("compute_rloo_outcome_advantage", groups.leave_one_out),
        ("compute_rloo_vectorized_outcome_advantage", groups.leave_one_out),
        ("GRPOTrainer", None),
        ("RLOOTrainer", groups.leave_one_out),
    ],
)
def test_advantages_of_groups_are_those_of_verl_and_trl(function, ours):
    for record in records(function):
        score, o = record["inputs"]["score"], record["kwargs"]
        formula = ours
        if ours is None:
            plain = o.get("norm_adv_by_std_in_grpo") is False or o.get("scale_rewards") == "none"
            eps = 1e-6 if record["package"] == "verl" else 1e-4
            formula = groups.centred if plain else lambda s, g, eps=eps: groups.standardised(s, g, eps)
        # Of scores near 100 their float32 means have an error of 1e-5.
        rough = {"atol": 3e-5, "rtol": 3e-5} if record["case"] == "large" else {}
        close(formula(score, group_of(score)), record["outputs"]["advantages"], **rough)


def test_maximum_likelihood_follows_the_successes_alone():
    """The gradient of log of the mean of p: for scores 0 and 1 the sum over successes, over their number."""
    score = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    found = groups.maximum_likelihood(score, group_of(score))
    close(found, torch.tensor([1.0, -1, -1, 1, 0, 0, 0, 0, 0, 0, 0, 0]))
    # With a baseline added back, sum A_i g_i / N is the mean of g over successes less the mean over all.
    gradients = torch.randn(4, generator=torch.Generator().manual_seed(0))
    close((found[:4] * gradients).mean(), gradients[[0, 3]].mean() - gradients.mean())
    with pytest.raises(ValueError, match="MaxRL takes scores from 0"):
        groups.maximum_likelihood(score - 1, group_of(score))


def test_one_response_alone_has_no_advantage():
    score, group = torch.tensor([3.0, 1.0, 1.0]), torch.tensor([7, 2, 2])
    for formula in (groups.centred, groups.standardised, groups.leave_one_out, groups.maximum_likelihood):
        assert not formula(score, group).any()


def test_the_order_of_the_batch_changes_no_advantage():
    draw = torch.Generator().manual_seed(1)
    score, order = torch.rand(24, generator=draw), torch.randperm(24, generator=draw)
    group = torch.arange(24) // 6
    for formula in (groups.centred, groups.standardised, groups.leave_one_out, groups.maximum_likelihood):
        close(formula(score[order], group[order]), formula(score, group)[order])


@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_what_follows_each_token_is_summed_as_verl_and_openrlhf_do(package):
    compared = 0
    for record in golden("policy", package):
        if record["error"] is not None or "returns" not in record["outputs"]:
            continue
        x, gamma = record["inputs"], record["kwargs"]["gamma"]
        mask = x["mask"]
        between = mask.int().diff(dim=1).clamp(min=0).sum(1) + mask[:, 0].int()
        # OpenRLHF discounts over masked tokens as well.
        if package == "openrlhf" and gamma != 1 and bool((between > 1).any()):
            continue
        rollout = shaped(mask, -x["rewards"], torch.zeros_like(x["rewards"]), None, torch.zeros(len(mask)))
        advantages, returns = returns_with_kl(rollout, kl_coef=1.0, gamma=gamma)
        close(returns[mask], record["outputs"]["returns"][mask])
        if "advantages" in record["outputs"]:
            n = int(mask.sum())
            bessel = (n / (n - 1)) ** 0.5  # they divide by n - 1
            close(advantages[mask], record["outputs"]["advantages"][mask] * bessel, atol=1e-5, rtol=1e-5)
        compared += 1
    assert compared >= 10


AVERAGES = {
    "token-mean": "token-mean",
    "seq-mean-token-sum": "sequence-sum",
    "seq-mean-token-mean": "sequence-mean",
    "seq-mean-token-sum-norm": "constant",
    "grpo": "sequence-mean",
    "dapo": "token-mean",
    "dr_grpo": "constant",
}


def recorded_loss(record, **options):
    """The loss of a record with these options, and its gradient."""
    x = record["inputs"]
    mask, logprob = x["mask"], x["logprob"].requires_grad_()
    reference = x.get("reference", torch.zeros_like(logprob))
    rollout = shaped(mask, x["old_logprob"], reference, None, torch.zeros(len(mask)))
    rollout = replace(rollout, advantages=x["advantages"])
    outputs = Outputs(logprob, torch.zeros_like(logprob))
    whole = Whole(mask.sum(), len(mask), LONGEST)
    loss = policy_objective(rollout, outputs, PolicyOptions(**options), whole)
    (grad,) = torch.autograd.grad(loss.total * x["grad_loss"], logprob)
    return loss.total, grad


@pytest.mark.parametrize(
    "function", ["compute_policy_loss_vanilla", "GRPOTrainer._compute_loss", "RLOOTrainer._compute_loss"]
)
def test_losses_and_their_averages_are_those_of_verl_and_trl(function):
    for record in records(function):
        o = record["kwargs"]
        options = {"clip": o["clip"], "clip_high": o.get("clip_high"), "kl_coef": o.get("beta", 0.0)}
        options |= {"dual_clip": o.get("delta", o.get("dual_clip")), "kl": "k3", "kl_in": "loss"}
        if function.startswith("RLOO"):
            options["ratio"] = "response"
        else:
            options["average"] = AVERAGES[o["average"]]
        total, grad = recorded_loss(record, **options)
        close(total, record["outputs"]["loss"], rtol=3e-6)
        close(grad, record["grads"]["logprob"], rtol=3e-6)


@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_14_the_weight_of_the_kl_term_follows_its_target_as_in_verl_and_openrlhf(package):
    (record,) = records("AdaptiveKLController", package)
    o, coef, found = record["kwargs"], record["kwargs"]["coef"], []
    for kl in record["inputs"]["kl"].tolist():
        coef = adapted_kl_coef(coef, kl, target=o["target"], responses=o["responses"], horizon=o["horizon"])
        found.append(coef)
    close(torch.tensor(found, dtype=torch.float64), record["outputs"]["coef"], atol=1e-12, rtol=1e-12)


def test_14_only_a_target_moves_the_weight():
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    rollout = shaped(mask, torch.full((3, 4), -1.0), torch.full((3, 4), -2.0), None, torch.zeros(3))
    assert adapted(PolicyOptions(), rollout) == PolicyOptions()
    options = PolicyOptions(kl_coef=0.1, kl_target=3.0, kl_horizon=30.0)
    # (2 + 4 + 4) / 3 nats a response, 1/9 above the target.
    assert adapted(options, rollout).kl_coef == pytest.approx(0.1 * (1 + (1 / 9) * 3 / 30))
    with pytest.raises(ValueError, match="kl_target must be above 0"):
        PolicyOptions(kl_coef=0.0, kl_target=3.0)


def test_maxrl_refuses_a_divergence_in_the_reward_before_it_samples():
    """Scores are probabilities of success: below 0 the first rollout ended with an error."""
    MaxRLOptions(kl_coef=0.1)
    MaxRLOptions(kl_in="reward")
    with pytest.raises(ValueError, match="kl_in='loss'"):
        MaxRLOptions(kl_coef=0.1, kl_in="reward")


def test_what_is_clipped_is_counted_tokens_or_responses():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # Every token within the clip, one response not.
    logprob = torch.tensor([[0.15, 0.15, 0.15], [0.1, 9.0, 9.0]])
    rollout = shaped(mask, torch.zeros(2, 3), torch.zeros(2, 3), None, torch.zeros(2))
    outputs, whole = Outputs(logprob, torch.zeros(2, 3)), Whole(mask.sum(), 2, 3)
    for ratio, expected in (("token", 0.0), ("response", 0.5)):
        assert moved(rollout, outputs, whole, PolicyOptions(ratio=ratio))["clip_fraction"] == expected


def test_averages_by_their_own_numbers():
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    whole = Whole(mask.sum(), 2, 10)
    expected = {"token-mean": 11 / 4, "sequence-mean": 7 / 2, "sequence-sum": 11 / 2, "constant": 11 / 20}
    for how, value in expected.items():
        close(averaged(x, mask, whole, how), torch.tensor(value))
    with pytest.raises(ValueError, match="the average must be"):
        averaged(x, mask, whole, "mean")


def test_simple_policy_optimisation_is_best_at_the_edge_of_the_clip_and_pulls_back_beyond():
    for sign in (1.0, -1.0):
        ratio = torch.linspace(0.5, 1.5, 201, requires_grad=True)
        loss = simple_policy_loss(ratio.log(), torch.full_like(ratio, 3 * sign), clip=0.2)
        assert ratio[loss.argmin()].item() == pytest.approx(1 + 0.2 * sign, abs=1e-3)
        (grad,) = torch.autograd.grad(loss.sum(), ratio)
        assert (grad.abs() > 1e-3).sum() >= 199  # clipping would have none beyond the edge


def test_entropy_adds_at_most_a_share_of_an_advantage_and_has_no_gradient():
    advantages = torch.tensor([2.0, -2.0, 0.1, 0.0])
    entropy = torch.tensor([1.0, 1.0, 5.0, 3.0], requires_grad=True)
    found = entropy_shaped(advantages, entropy, scale=0.4, kappa=2.0)
    close(found, torch.tensor([2.4, -1.6, 0.15, 0.0]))
    assert not found.requires_grad
