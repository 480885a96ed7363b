"""Distributions of tokens and responses, and critics with bins, held to what palm-rlhf-pytorch gives."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from palm_rlhf.algorithms.critics import bin_centres, hl_gauss_loss, hl_gauss_target
from palm_rlhf.algorithms.matching import (
    cloning_divergence,
    group_log_softmax,
    score_centred_loss,
    target_policy_loss,
    trajectory_balance_loss,
)
from palm_rlhf.algorithms.objectives import entropy_shaped, simple_policy_loss
from palm_rlhf.algorithms.preferences import expected_value
from palm_rlhf.models.value import ValueModel
from palm_rlhf.trainers.checkpoints import Checkpoints
from palm_rlhf.trainers.log import RunLog
from palm_rlhf.trainers.loop import run
from tests.palm.test_policy import close, records
from tests.palm.test_table import CONFIG, make


def upstream(function, package=None):
    return records(function, package, book="upstream")


def same_gradient(record, loss, *names):
    x = record["inputs"]
    found = torch.autograd.grad((loss * x["grad_loss"]).sum(), [x[name] for name in names])
    for name, grad in zip(names, found):
        close(grad, record["grads"][name], rtol=3e-6)


def test_simple_policy_optimization_is_upstreams():
    for record in upstream("grpo.RLHFTrainer.learn: spo"):
        x = record["inputs"]
        x["logprob"].requires_grad_()
        loss = simple_policy_loss(x["logprob"] - x["old_logprob"], x["advantages"], **record["kwargs"])
        close(loss, record["outputs"]["loss"])
        same_gradient(record, loss, "logprob")


def test_entropy_shaped_advantages_are_upstreams():
    for record in upstream("grpo.RLHFTrainer.learn: entropy"):
        x = record["inputs"]
        advantages = x["advantages"][:, None].expand_as(x["entropy"])
        found = entropy_shaped(advantages, x["entropy"], **record["kwargs"])
        close(found[x["mask"]], record["outputs"]["out"][x["mask"]])


def test_target_policy_optimization_is_upstreams_for_one_group_and_for_many():
    rows = upstream("tpo.RLHFTrainer")
    for eta in (0.5, 1.0):
        chosen = [r for r in rows if r["kwargs"]["eta"] == eta]
        for record in chosen:
            x = record["inputs"]
            scores = x["scores"].requires_grad_()
            group = torch.zeros(len(scores), dtype=torch.int64)
            loss = target_policy_loss(scores, x["old_scores"], x["advantages"], group, eta=eta).sum()
            close(loss, record["outputs"]["loss"])
            same_gradient(record, loss, "scores")
        both = [torch.cat([r["inputs"][n] for r in chosen]) for n in ("scores", "old_scores", "advantages")]
        group = torch.arange(len(both[0])) // 4
        order = torch.randperm(len(group), generator=torch.Generator().manual_seed(0))
        found = target_policy_loss(*(x[order] for x in both), group[order], eta=eta)
        expected = torch.stack([r["outputs"]["loss"] for r in chosen])
        close(torch.stack([found[group[order] == i].sum() for i in range(len(chosen))]), expected)


def test_the_gradient_of_a_target_that_is_reached_is_nothing():
    scores = torch.tensor([-3.0, -50.0, -4.0, -200.0, -201.0], requires_grad=True)
    group = torch.tensor([0, 0, 0, 1, 1])
    loss = target_policy_loss(scores, scores, torch.zeros(5), group).sum()
    assert not torch.autograd.grad(loss, scores)[0].abs().gt(1e-6).any()
    close(group_log_softmax(scores, group)[3:].exp().sum(), torch.tensor(1.0))


def test_flowrl_is_upstreams():
    for record in upstream("flowrl.FlowRLTrainer.learn"):
        x, mask = record["inputs"], record["inputs"]["mask"]
        for name in ("logprob", "log_z"):
            x[name].requires_grad_()
        mean, reference = ((x[n] * mask).sum(1) / mask.sum(1) for n in ("logprob", "reference"))
        loss = trajectory_balance_loss(x["log_z"], mean, reference, x["advantages"], **record["kwargs"])
        loss = (x["weight"] * loss).mean()
        close(loss, record["outputs"]["loss"], rtol=2e-6)
        same_gradient(record, loss, "logprob", "log_z")


def test_score_centering_is_upstreams_over_all_tokens_and_over_the_most_probable():
    heads = set()
    for record in upstream("grpo.score_centering_loss"):
        x, o = record["inputs"], record["kwargs"]
        logits = x["logits"].requires_grad_()
        new, old = logits.log_softmax(-1), x["sampler_logits"].log_softmax(-1)
        count = o["head"] or logits.shape[-1]
        ids = old.topk(count).indices
        own = (y.gather(-1, x["tokens"][..., None]).squeeze(-1) for y in (new, old))
        both = (y.gather(-1, ids) for y in (new, old))
        advantages = x["advantages"][:, None]
        loss = score_centred_loss(
            *own, *both, advantages, truncation=o["truncation"], tail=count < logits.shape[-1]
        )
        close(loss, record["outputs"]["loss"], rtol=3e-6)
        same_gradient(record, loss, "logits")
        heads.add(o["head"])
    assert heads == {None, 3}


def test_the_mean_of_a_centred_score_is_zero_whatever_the_learner():
    """Summed over all tokens with the sampler's probabilities, and with one token in the tail."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)
    old = torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(-1)
    new = logits.log_softmax(-1)
    ids = old.topk(5).indices
    heads = (new[ids].expand(6, 5), old[ids].expand(6, 5))
    by_token = score_centred_loss(new, old, *heads, torch.ones(6, dtype=torch.float64))
    (grad,) = torch.autograd.grad((old.exp() * by_token).sum(), logits)
    assert grad.abs().max() < 1e-12


def test_the_divergence_of_cloning_is_whole_with_one_token_left_and_else_from_below():
    draw = torch.Generator().manual_seed(0)
    new, old = (2 * torch.randn(3, 6, generator=draw)).log_softmax(-1), torch.randn(3, 6).log_softmax(-1)
    exact = kl_divergence(Categorical(logits=old), Categorical(logits=new))
    bounds = []
    for count in (5, 2):
        ids = old.topk(count).indices
        bounds.append(cloning_divergence(new.gather(-1, ids), old.gather(-1, ids)))
    close(bounds[0], exact, rtol=1e-5)
    assert (bounds[1] < exact).all()
    assert (bounds[1] > 0).all()


def test_bins_are_those_of_hl_gauss_pytorch():
    for record in upstream("HLGaussLoss"):
        x, o = record["inputs"], record["kwargs"]
        logits = x["logits"].requires_grad_()
        target = hl_gauss_target(x["values"], **o)
        close(target, record["outputs"]["target"])
        # Their edges are float32.
        centres = bin_centres(o["low"], o["high"], o["bins"])
        close(expected_value(logits, centres), record["outputs"]["means"], atol=2e-6)
        loss = hl_gauss_loss(logits, target)
        close(loss, record["outputs"]["loss"], rtol=2e-6)
        incoming = [x["grad_loss"], x["grad_means"]]
        (grad,) = torch.autograd.grad([loss, expected_value(logits, centres)], logits, incoming)
        close(grad, record["grads"]["logits"], atol=2e-6)


def test_a_critic_with_bins_starts_in_the_middle_and_learns_its_returns(make_palm):
    critic = ValueModel(make_palm(), bins=11, low=-1.0, high=3.0)
    tokens = torch.arange(1, 9).view(2, 4)
    close(critic(tokens).detach(), torch.ones(2, 4))
    returns = torch.tensor([[0.0, 1.0, 2.0, 2.5], [-0.5, 0.3, 0.0, 1.4]])
    optimizer = torch.optim.Adam(critic.trained(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        _, logits = critic.scored(tokens)
        hl_gauss_loss(logits, hl_gauss_target(returns, -1.0, 3.0, 11)).mean().backward()
        optimizer.step()
    assert (critic(tokens) - returns).abs().max() < 0.15
    with pytest.raises(ValueError, match="at least 2 bins"):
        ValueModel(make_palm(), bins=5, low=1.0, high=1.0)


def test_heads_are_the_most_probable_tokens_and_no_logits_are_kept(make_palm, monkeypatch):
    trainer = make(make_palm, "score-centering", {"head": 5})
    rollout = trainer.estimated(trainer.rollout())
    g = rollout.generation
    for block in (2**22, 60):
        monkeypatch.setattr("palm_rlhf.models.value._LOGITS", block)
        again = trainer.with_head(rollout)
        close(again.head_logprob, rollout.head_logprob, atol=1e-5)
        head = trainer.outputs(rollout).head
        close(head.detach(), rollout.head_logprob, atol=1e-5)
    row = 3
    text = [*g.prompt(row), *g.response(row)]
    logits = trainer.policy.model(torch.tensor([text]), finetune_scope="actor")[0] / CONFIG.temperature
    expected = logits[len(g.prompt(row)) - 1 : -1].log_softmax(-1).topk(5)
    count = int(rollout.mask[row].sum())
    close(rollout.head_logprob[row, :count], expected.values.detach(), atol=1e-5)
    assert torch.equal(rollout.head_ids[row, :count], expected.indices)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        trainer.outputs(rollout)
    assert kept
    assert not [shape for shape in kept if shape[-1:] == (23,)], "logits"
    # All but one token at most, so that there is a rest.
    whole = make(make_palm, "score-centering", {"head": 1000})
    assert whole.with_head(whole.rollout()).head_ids.shape[-1] == 22


def test_ppgs_phase_teaches_the_values_and_leaves_the_policy_where_it_is(make_palm):
    config = replace(CONFIG, prompts=2, minibatch=8, policy_lr=2e-2, critic_lr=2e-2, anneal=False)
    found = {}
    for clone in (0.0, 30.0):
        trainer = make(
            make_palm,
            "ppg",
            {"head": 8, "auxiliary_every": 2, "auxiliary_epochs": 6, "clone_coef": clone},
            config,
        )
        rows = [trainer.step(index) for index in range(4)]
        assert ["auxiliary_value_loss" in row for row in rows] == [False, True, False, True]
        found[clone] = rows
    for rows in found.values():
        assert rows[3]["auxiliary_value_loss"] < rows[1]["auxiliary_value_loss"]
    assert found[30.0][1]["clone_kl"] < 0.5 * found[0.0][1]["clone_kl"]


def test_a_run_with_kept_rollouts_goes_on_bit_for_bit(make_palm, tmp_path):
    weights = []
    for name, stops in (("one", (4,)), ("other", (2, 4))):
        for steps in stops:
            trainer = make(make_palm, "ppg", {"auxiliary_every": 3, "head": 4})
            log = RunLog(tmp_path / name, tensorboard=False)
            run(trainer, log, Checkpoints(tmp_path / name / "c"), steps=steps, progress=False)
        weights.append(torch.cat([p.flatten() for p in trainer.policy.trained()]))
        assert len(trainer._kept) == 1
    assert torch.equal(*weights)
