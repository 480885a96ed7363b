"""The formulas on pairs, held to what TRL and OpenRLHF were recorded to give, values and gradients."""

import pytest
import torch

from palm_rlhf.algorithms.contrastive import kto_loss, log_odds, orpo_loss, rebel_loss, sppo_loss
from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS, Scores
from tests.golden.load import golden

ROWS = {
    ("trl", "sigmoid"): ("dpo", lambda o: {"beta": o["beta"]}),
    ("trl", "ipo"): ("ipo", lambda o: {"tau": o["beta"]}),
    ("trl", "sppo_hard"): ("sppo", lambda o: {"eta": 1 / o["beta"]}),
    ("openrlhf", False): ("dpo", lambda o: {"beta": o["beta"], "smoothing": o["smoothing"]}),
    ("openrlhf", True): ("ipo", lambda o: {"tau": o["beta"], "per_token": False}),
    ("trl", "CPOTrainer.cpo_loss"): ("simpo", lambda o: o),
    ("trl", "ORPOTrainer.odds_ratio_loss"): ("orpo", lambda o: o),
    ("trl", "KTOTrainer._compute_loss"): (
        "kto", lambda o: o | {"desirable": o["desirable"], "undesirable": o["undesirable"]},
    ),
}  # fmt: skip


def scores(x, logprob):
    """The pairs of a record: the first half of its rows is chosen."""
    summed = logprob.sum(1).chunk(2)
    count = x.get("mask", torch.ones_like(logprob, dtype=torch.bool)).sum(1).chunk(2)
    reference = x.get("reference", torch.zeros_like(logprob)).sum(1).chunk(2)
    found = Scores(*summed, *count, torch.zeros(len(summed[0])), *reference)
    if "other" in x:
        ratio = (x["other"] - x["other_reference"]).sum(1)
        found = found._replace(divergence=ratio.mean().clamp(min=0))
    return found


@pytest.mark.parametrize(("key", "row"), ROWS.items(), ids=["-".join(map(str, key)) for key in ROWS])
def test_every_loss_is_the_recorded_one(key, row):
    package, kind = key
    name, options = row
    compared = 0
    for record in golden("offline", package):
        o = record["kwargs"]
        if kind not in (o.get("loss"), o.get("ipo"), record["function"]):
            continue
        assert record["error"] is None
        x = record["inputs"]
        logprob = x["logprob"].requires_grad_()
        algorithm = PAIR_ALGORITHMS[name]
        found = scores(x, logprob)
        losses = algorithm.objective(found, algorithm.options(**options(o))).losses
        expected = record["outputs"]["loss"]
        if name == "orpo":
            # Theirs is the part beside imitation, with the other sign.
            losses = -found.chosen_mean - losses
        found_loss = losses.mean() if expected.dim() == 0 else losses
        torch.testing.assert_close(found_loss, expected, atol=1e-6, rtol=2e-6)
        (grad,) = torch.autograd.grad((found_loss * x["grad_loss"]).sum(), logprob)
        real = x.get("mask", torch.ones_like(grad, dtype=torch.bool))
        torch.testing.assert_close(grad[real], record["grads"]["logprob"][real], atol=1e-6, rtol=3e-6)
        compared += 1
    assert compared >= 4


def test_rebel_is_the_square_of_what_the_policy_does_not_explain():
    """The article's formula, and its code's, which is eta^2 times it."""
    margin, difference = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([1.0, 0.5, 0.3])
    for eta in (1.0, 10.0):
        found = rebel_loss(margin, difference, eta=eta)
        torch.testing.assert_close(found * eta**2, (margin - eta * difference) ** 2)
    assert rebel_loss(torch.tensor(3.0), torch.tensor(0.3), eta=10.0) == 0


def test_sppo_leaves_an_even_pair_where_it_is():
    zero = torch.zeros(2)
    assert not sppo_loss(zero, zero, torch.tensor(0.5), eta=1000.0).any()
    torch.testing.assert_close(sppo_loss(zero + 500.0, zero - 500.0, eta=1000.0), zero)


def test_log_odds_are_exact_near_0_and_near_1_and_so_is_their_gradient():
    mean = torch.tensor([-60.0, -5.0, -0.7, -0.69, -0.01, -1e-5], requires_grad=True)
    exact = mean.detach().double().requires_grad_()
    expected = exact - torch.log(-torch.expm1(exact))
    found = log_odds(mean)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,), (right,) = (torch.autograd.grad(x.sum(), y) for x, y in ((found, mean), (expected, exact)))
    torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=1e-6)
    certain = torch.zeros(1, requires_grad=True)
    loss = orpo_loss(certain, certain - 1.0)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, certain)[0].isfinite().all()


def test_kto_wants_more_of_what_is_desirable_and_less_of_what_is_not():
    ratio = torch.tensor([0.0, 1.0], requires_grad=True)
    for desirable, sign in ((True, -1), (False, 1)):
        loss = kto_loss(ratio, 0.5, desirable=desirable)
        (grad,) = torch.autograd.grad(loss.sum(), ratio)
        assert (grad.sign() == sign).all()
        torch.testing.assert_close(loss[0] + loss[1], torch.tensor(1.0))  # symmetric about the divergence


def test_the_table_holds_what_it_says():
    assert list(PAIR_ALGORITHMS) == ["dpo", "simpo", "rebel", "sppo", "ipo", "orpo", "kto"]
    for name, row in PAIR_ALGORITHMS.items():
        assert row.name == name
        # What is not needed may be missing.
        two = torch.tensor([-1.0, -2.0])
        known = (two, two) if row.reference else (None, None)
        losses, margin = row.objective(Scores(two, two - 1, two.abs(), two.abs(), two, *known), row.options())
        assert losses.shape == margin.shape == (2,)
        assert (margin > 0).all()
