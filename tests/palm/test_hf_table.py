"""Every algorithm, SFT and reward training on models of transformers, with the invariants that PaLM has."""

from dataclasses import replace

import pytest
import torch

from palm_rlhf.algorithms.objectives import log_ratio
from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.models.finetune import apart, learned
from palm_rlhf.models.value import Policy, ValueModel, frozen
from palm_rlhf.rewards import ModelReward, RewardModel, load_reward_model, save_reward_model
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tasks.text import lines
from palm_rlhf.trainers.offline import OfflineConfig, OfflineTrainer
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer
from palm_rlhf.trainers.reward import RewardConfig, RewardTrainer
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer
from tests.palm.hf_models import FAMILIES, VOCABULARY, build
from tests.palm.test_hf import MASK, SAME, TOKENS

ONLINE = OnlineConfig(prompts=2, samples=2, max_new_tokens=4, minibatch=4, policy_lr=1e-2, critic_lr=1e-2)
# Every row on one family, in turn: each family trains a third of the table, by adapters or all its weights.
ROWS = [
    (name, FAMILIES[i % len(FAMILIES)], ("adapters", "full")[i // len(FAMILIES) % 2])
    for i, name in enumerate([*ALGORITHMS, *PAIR_ALGORITHMS])
]
PAIRS = [Pair(f"yes{i}", "no", prompt=f"ask{'x' * i}", margin=1.0 + i) for i in range(4)]


class Letters:
    """A tokenizer for models of few tokens."""

    name, vocabulary, pad, stop = "letters", VOCABULARY, 0, 2

    def encode(self, text):
        return [3 + ord(letter) % (VOCABULARY - 3) for letter in text]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def changed(before, model):
    """Names of the parameters that moved."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def score(generation):
    return (generation.responses % 7).float().mul(generation.response_mask).sum(1)


@pytest.mark.parametrize("row", ROWS[: len(ALGORITHMS)], ids="-".join)
def test_every_online_row_trains(row):
    algorithm, scopes = ALGORITHMS[row[0]], ("actor", "critic") if row[2] == "adapters" else ()
    model = build(row[1], scopes)
    actor, other = scopes or (None, None)
    reference = Policy(model if scopes else frozen(build(row[1])))
    critic = None
    if algorithm.critic:
        critic = ValueModel(model if scopes else build(row[1]), other)
        # From 0 no gradient reaches the backbone.
        torch.nn.init.normal_(critic.value_head.weight)
    options = {"auxiliary_every": 1, "auxiliary_epochs": 1} if algorithm.auxiliary else {}
    trainer = OnlineTrainer(
        algorithm, Policy(model, actor), score, [[3, 4, 5, 6], [9]], config=ONLINE,
        options=algorithm.options(**options), reference=reference, critic=critic, stop=2,
    )  # fmt: skip
    rollout = trainer.estimated(trainer.rollout())
    for part in rollout.minibatches(4, torch.Generator().manual_seed(0), groups=algorithm.groups):
        found = trainer.outputs(part).logprob.detach()
        assert log_ratio(found, part.logprob, part.mask).abs().max() < 1e-5
        own = replace(part, generation=replace(part.generation, logprob=found))
        again = log_ratio(trainer.outputs(own).logprob, own.logprob, own.mask).exp()
        assert torch.equal(again, torch.ones_like(again))
    before = snapshot(model)
    metrics = trainer.step(0)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    expected = set(before)
    if scopes:
        expected = {n for n in before if n.split(".")[-2] in scopes[: 2 if critic else 1]}
    assert changed(before, model) == expected


@pytest.mark.parametrize("row", ROWS[len(ALGORITHMS) :], ids="-".join)
def test_every_offline_row_trains(row):
    algorithm, scope = PAIR_ALGORITHMS[row[0]], "actor" if row[2] == "adapters" else None
    model = build(row[1], () if scope is None else (scope,))
    trainer = OfflineTrainer(
        algorithm, Policy(model, scope), PAIRS, Letters(), config=OfflineConfig(lr=1e-2, batch=4),
        reference=Policy(model), held_out=PAIRS,
    )  # fmt: skip
    before, loss = snapshot(model), trainer.evaluate()["loss"]
    trainer.step(0)
    assert changed(before, model) == {n for n in before if scope is None or ".actor." in n}
    assert trainer.evaluate()["loss"] < loss


@pytest.mark.parametrize("family", FAMILIES)
def test_supervised_learning_and_reward_models(family, tmp_path):
    model = build(family)
    texts = lines([(pair.prompt, pair.chosen) for pair in PAIRS], Letters())
    trainer = SFTTrainer(model, texts, texts, SFTConfig(batch=4, warmup=0, lr=1e-2))
    before, loss = snapshot(model), trainer.validation_loss()
    trainer.step(0)
    assert changed(before, model) == set(before)
    assert trainer.validation_loss() < loss

    pytest.importorskip("peft", reason="peft is not installed (make peers)")
    reward = RewardModel(model, lora_r=2, lora_targets="all", last_layers=1, lora_alpha=6)
    before = snapshot(reward)
    trainer = RewardTrainer(
        reward, PAIRS, Letters(), config=RewardConfig(lr=1e-2, anneal=False), held_out=PAIRS
    )
    loss = trainer.evaluate()["loss"]
    for index in range(2):
        trainer.step(index)
    assert trainer.evaluate()["loss"] < loss
    moved = changed(before, reward)
    assert {n for n in moved if ".lora_" in n} == {n for n in before if ".reward." in n}
    # A bias cancels within a pair: whether it moves is a matter of rounding.
    heads = {n for n in moved if ".lora_" not in n} - {"to_pred.bias"}
    assert heads == {"to_pred.weight", "prompt_embed", "response_embed"}
    # The score of a text is the same after padding, and after a file.
    reward.eval()
    alone = torch.cat([reward(TOKENS[i : i + 1, MASK[i]]) for i in range(3)])
    torch.testing.assert_close(reward(TOKENS, MASK), alone, **SAME)
    again = load_reward_model(save_reward_model(tmp_path / "reward.safetensors", reward)).eval()
    assert torch.equal(again(TOKENS, MASK), reward(TOKENS, MASK))
    assert ModelReward(again).model.palm.scopes == ("reward",)


def test_without_adapters_reference_and_critic_share_what_does_not_learn():
    model = build("llama")
    last = list(learned(model, None, 1))
    reference, backbone = Policy(frozen(apart(model, last))), apart(model, last)
    critic = ValueModel(backbone, last_layers=1)
    trainer = OnlineTrainer(
        ALGORITHMS["ppo"], Policy(model, None, 1), score, [[3, 4, 5, 6], [9]], config=ONLINE,
        reference=reference, critic=critic, stop=2,
    )  # fmt: skip
    before, stays = snapshot(model), snapshot(reference.model)
    trainer.step(0)
    trainer.step(1)  # before the second the value head is 0, and no gradient reaches the backbone
    expected = {n for n in before if n.startswith("model.model.layers.1.")}
    assert changed(before, model) == changed(before, backbone) == expected
    assert not changed(stays, reference.model)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in backbone.parameters()}
    assert len(shared) == len(before) - len(expected)
