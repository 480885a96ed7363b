"""The formulas of PPO held to what verl, OpenRLHF and TRL were recorded to give."""

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.algorithms.estimators import gae_with_kl, kl_estimate
from palm_rlhf.algorithms.objectives import clipped_policy_loss, clipped_value_loss, log_ratio, masked_mean
from palm_rlhf.generation import Generation
from palm_rlhf.rollout import Rollout
from tests.golden.load import golden


def shaped(mask, logprob, reference, values, score) -> Rollout:
    """A rollout with these numbers, after prompts of one token."""
    whole = F.pad(mask, (1, 0), value=True)
    zero = torch.zeros_like(logprob)
    stopped = torch.ones(len(mask), dtype=torch.bool)
    generation = Generation(torch.ones(whole.shape, dtype=torch.int64), whole, 1, logprob, zero, stopped)
    return Rollout(generation, 1.0, score, reference, values)


def records(function: str) -> list[dict]:
    found = [
        r for r in golden("ppo") if r["function"].rsplit(".", 1)[-1] == function or r["function"] == function
    ]
    assert found
    assert all(r["error"] is None for r in found)
    return found


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """To 1e-6 of the number, and of 1."""
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=lambda text: f"{what}: {text}")


TRAIN = "trl.experimental.ppo.ppo_trainer.PPOTrainer.train"


@pytest.mark.parametrize("function", ["compute_policy_loss", "PolicyLoss", TRAIN])
def test_the_policy_loss_is_that_of_verl_openrlhf_and_trl(function):
    for record in records(function):
        if "policy_loss" not in record["outputs"]:
            continue
        x, mask, o = record["inputs"], record["inputs"]["mask"], record["kwargs"]
        logprob = x["logprob"].requires_grad_()
        shift = log_ratio(logprob, x["old_logprob"], mask)
        by_token = clipped_policy_loss(shift, x["advantages"], **o)
        loss = masked_mean(by_token, mask)
        what = f"{function} {record['case']} {o}"
        # A ratio of e^20 makes numbers of 1e8.
        torch.testing.assert_close(loss, record["outputs"]["policy_loss"], atol=1e-6, rtol=2e-6, msg=what)
        (grad,) = torch.autograd.grad(loss * x["grad_policy_loss"], logprob)
        torch.testing.assert_close(grad, record["grads"]["logprob"], atol=1e-6, rtol=2e-6, msg=what)


@pytest.mark.parametrize("function", ["compute_value_loss", "ValueLoss", TRAIN])
def test_the_value_loss_is_that_of_verl_openrlhf_and_trl(function):
    for record in records(function):
        if "value_loss" not in record["outputs"]:
            continue
        x, mask = record["inputs"], record["inputs"]["mask"]
        values = x["values"].requires_grad_()
        loss = masked_mean(
            clipped_value_loss(values, x["old_values"], x["returns"], **record["kwargs"]), mask
        )
        close(loss, record["outputs"]["value_loss"], record["case"])
        (grad,) = torch.autograd.grad(loss * x["grad_value_loss"], values)
        # Within the clip two losses are equal up to rounding, and whose gradient is taken is theirs to say.
        even = ((values - x["old_values"]).abs() < 0.2 + 1e-5) & mask
        far = ~even
        close(grad[far], record["grads"]["values"][far], record["case"])
        torch.testing.assert_close(grad[even], record["grads"]["values"][even], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("function", ["kl_penalty", "compute_approx_kl", TRAIN])
def test_kl_estimates_are_those_of_verl_openrlhf_and_trl(function):
    kinds, compared = set(), 0
    for record in records(function):
        if "kl" not in record["outputs"]:
            continue
        x, kind, expected = record["inputs"], record["kwargs"]["kind"], record["outputs"]["kl"]
        found = kl_estimate(x["logprob"], x["reference"], kind)
        # verl cuts k3 at 10, OpenRLHF every estimate; ours and TRL's are the estimates themselves.
        cut = function == "compute_approx_kl" or (function == "kl_penalty" and kind == "k3")
        whole = expected.abs() < 9.99 if cut else (expected.abs() < 1e6)
        compared += int(whole.sum())
        torch.testing.assert_close(found[whole], expected[whole], atol=2e-6, rtol=2e-6)
        assert (found[~whole].abs() > 9.98).all()
        kinds.add(kind)
    assert kinds >= {"k1", "k3"}
    assert compared > 1000


def test_k3_is_never_negative_and_never_overflows():
    logprob = torch.tensor([-1.0, -1.0, -200.0, -1e-4, 0.0])
    reference = torch.tensor([-1.0, -200.0, -1.0, -1.00001e-4, -1e-7])
    k3 = kl_estimate(logprob, reference, "k3")
    assert k3.isfinite().all()
    assert (k3 >= 0).all()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(logprob, reference, "k4")


@pytest.mark.parametrize("package", ["verl", "trl"])
def test_advantages_and_returns_are_those_of_verl_and_trl(package):
    """From score and KL to whitened advantages; they divide by n - 1 where we divide by n."""
    used = 0
    for record in golden("token_advantages", package):
        x, o = record["inputs"], record["kwargs"]
        mask = x["mask"]
        right_padded = bool((mask[:, :-1] | ~mask[:, 1:]).all() and mask[:, 0].all())
        # TRL puts the score one slot after the last token where there is one.
        if not right_padded or (package == "trl" and not mask.all()) or mask.sum() < 2:
            continue
        rollout = shaped(mask, x["kl"], torch.zeros_like(x["kl"]), x["values"], x["score"])
        advantages, returns = gae_with_kl(rollout, **o)
        tolerance = {"atol": 2e-6, "rtol": 2e-6} if mask.numel() > 1 else {}
        torch.testing.assert_close(returns[mask], record["outputs"]["returns"][mask], **tolerance)
        n = int(mask.sum())
        bessel = (n / (n - 1)) ** 0.5
        torch.testing.assert_close(
            advantages[mask], record["outputs"]["advantages"][mask] * bessel, atol=1e-5, rtol=1e-5
        )
        used += 1
    assert used >= 3


def test_the_mean_of_nothing_is_zero():
    x = torch.full((2, 3), float("nan"), requires_grad=True)
    mean = masked_mean(x, torch.zeros(2, 3, dtype=torch.bool))
    mean.backward()
    assert mean == 0
    assert not x.grad.any()


def test_the_value_clip_takes_the_larger_loss_and_half_of_it():
    values, old, returns = (
        torch.tensor([1.0, 1.0, 0.1, 0.0]),
        torch.zeros(4),
        torch.tensor([1.0, 0.0, 1.0, 2.0]),
    )
    expected = 0.5 * torch.tensor([0.8**2, 1.0, 0.9**2, 4.0])
    torch.testing.assert_close(clipped_value_loss(values, old, returns), expected)
    plain = 0.5 * (values - returns).square()
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip=None), plain)


def test_clips_of_the_policy():
    """Each by its own number: inside, above and below for good and for bad actions."""
    ratio = torch.tensor([1.1, 1.5, 0.5, 1.5, 0.5, 5.0])
    good = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    found = clipped_policy_loss(ratio.log(), good, clip=0.2)
    torch.testing.assert_close(found, torch.tensor([-1.1, -1.2, -0.5, 1.5, 0.8, 5.0]))
    found = clipped_policy_loss(ratio.log(), good, clip=0.2, clip_high=0.28, dual_clip=3.0)
    torch.testing.assert_close(found, torch.tensor([-1.1, -1.28, -0.5, 1.5, 0.8, 3.0]))


def test_the_log_ratio_is_clamped():
    logprob = torch.tensor([[-500.0, -1.0, 400.0]], requires_grad=True)
    shift = log_ratio(logprob, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert shift.tolist() == [[-20.0, -1.0, 20.0]]
    loss = clipped_policy_loss(shift, -torch.ones(1, 3)).sum()
    loss.backward()
    assert loss.isfinite()
    assert logprob.grad.isfinite().all()
