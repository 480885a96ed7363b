"""palm-rlhf-pytorch's names: its README runs, and every trainer learns with its arguments."""

import os
import re
from pathlib import Path

import pytest
import torch

from palm_rlhf.algorithms.preferences import implicit_rewards, outcome_loss
from palm_rlhf.upstream import (
    ActorCritic,
    FlowRLTrainer,
    GRPOTrainer,
    ImplicitPRM,
    PaLM,
    RewardModel,
    RLHFTrainer,
    TPOTrainer,
    top_k,
    top_p,
)

SHARED = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[3] / "shared" / "data")).parent
README = SHARED / "seeds" / "000_palm_rlhf_pytorch_readme.md"
SIZES = {"num_tokens": 23, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
PROMPTS = torch.tensor([[0, 3, 4, 0, 5], [6, 7, 8, 9, 3], [4, 0, 0, 0, 0], [0, 0, 0, 5, 5]])
TRAIN = {"num_episodes": 2, "max_timesteps": 3, "update_timesteps": 3, "max_seq_len": 10, "eos_token": 2}
# The README's sizes, made small.
SMALL = (
    (r"(?<=num_tokens = )20000", "64"), (r"(?<=dim = )512", "32"), (r"(?<=depth = )12", "1"),
    (r"\b20000\b", "64"), (r"\b2048\b", "24"), (r"\b1024\b", "16"), (r"256, \(50000, 512\)", "64, (6, 8)"),
    (r"trainer.train\(num_episodes = 50000\)",
     "trainer.train(num_episodes = 2, max_timesteps = 3, update_timesteps = 3, max_seq_len = 12)"),
)  # fmt: skip


def threes(generation):
    """The share of tokens 3."""
    mask = generation.response_mask
    return ((generation.responses == 3) & mask).sum(1) / mask.sum(1)


def palm(**options):
    torch.manual_seed(0)
    return PaLM(**(SIZES | options))


@pytest.mark.skipif(not README.exists(), reason="the README of palm-rlhf-pytorch is not at hand")
def test_the_readme_runs_with_the_import_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 3
    Path("path/to/pretrained").mkdir(parents=True)
    seen = {}
    for block in blocks:
        code = block.replace("from palm_rlhf_pytorch import", "from palm_rlhf.upstream import")
        code = code.replace(".cuda()", "")
        for pattern, small in SMALL:
            code = re.sub(pattern, small, code)
        torch.manual_seed(0)
        exec(compile(code, str(README), "exec"), seen)
        # What the third block loads: models such as the first two trained, of the shape that it has.
        same = {"num_tokens": 64, "dim": 32, "depth": 1}
        one = PaLM(**same)
        torch.save(one.state_dict(), "path/to/pretrained/palm.pt")
        reward = RewardModel(one, num_binned_output=5)
        torch.save(reward.state_dict(), "path/to/pretrained/reward_model.pt")
    assert seen["generated"].shape == (1, 24)
    assert seen["reward"].shape == (1,)
    assert len(seen["trainer"].metrics) == 2
    answer = seen["answer"]
    assert answer.dim() == 1
    assert answer[:8].equal(seen["prompts"][0])
    assert len(answer) <= 24


TRAINERS = {
    "ppo": (RLHFTrainer, {}),
    "ppo-full": (RLHFTrainer, {"actor_lora": False, "critic_lora": False, "max_norm": 0.5}),
    "grpo": (GRPOTrainer, {"grpo_num_times_sample_rewards": 3}),
    "dr-grpo": (GRPOTrainer, {"grpo_num_times_sample_rewards": 3, "use_dr_grpo": True}),
    "maxrl-spo": (
        GRPOTrainer,
        {"grpo_num_times_sample_rewards": 3, "use_max_rl": True, "use_simple_policy_optimization": True},
    ),
    "entropy": (GRPOTrainer, {"grpo_num_times_sample_rewards": 3, "add_entropy_to_advantage": True}),
    "centering": (
        GRPOTrainer,
        {"grpo_num_times_sample_rewards": 3, "use_score_centering": True, "score_centering_topk": 4},
    ),
    "flowrl": (FlowRLTrainer, {"flowrl_num_times_sample": 3}),
    "flowrl-full": (FlowRLTrainer, {"flowrl_num_times_sample": 3, "actor_lora": False}),
    "tpo": (TPOTrainer, {"num_times_sample_rewards": 3, "actor_lora": False}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_learns_with_its_arguments_and_saves(name, tmp_path):
    make, options = TRAINERS[name]
    model = palm()
    trainer = make(
        palm=model, reward_model=threes, prompt_token_ids=PROMPTS, actor_lr=1e-2, actor_wd=0.01, **options
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics = trainer.train(**TRAIN)
    assert len(metrics) == 2
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    full = options.get("actor_lora") is False
    assert full or all(n.startswith("finetune_modules") for n in changed)
    # The reference is the model before training: a copy, or the same one without adapters.
    assert metrics[0]["kl_response"] == pytest.approx(0, abs=1e-4)
    assert metrics[1]["kl_response"] != metrics[0]["kl_response"]
    learned = {
        n: {id(p) for g in o.param_groups for p in g["params"]}
        for n, o in trainer.trainer.optimizers().items()
    }
    assert not learned["policy"] & learned.get("critic", set()), "no parameter has two optimizers"
    group = trainer.trainer.optimizers()["policy"].param_groups[0]
    assert (group["weight_decay"], group["decoupled_weight_decay"], group["lr"]) == (0.01, True, 1e-2)
    best = trainer.generate(12, prompt=PROMPTS[1], num_samples=5, eos_token=2)
    assert best[:5].equal(PROMPTS[1])
    trainer.save(tmp_path / "checkpoint.pt")
    other = make(palm=palm(), reward_model=threes, prompt_token_ids=PROMPTS, **options)
    other.load(tmp_path / "checkpoint.pt")
    for mine, theirs in zip(other.parts["policy"].trained(), trainer.parts["policy"].trained()):
        assert torch.equal(mine, theirs)


def test_a_second_call_goes_on_with_prompts_and_random_numbers():
    drawn = []

    def reward(generation):
        drawn.append((generation.prompt(0), generation.seeds.tolist()))
        return torch.rand(len(generation.tokens))

    trainer = GRPOTrainer(
        palm=palm(), reward_model=reward, prompt_token_ids=PROMPTS, grpo_num_times_sample_rewards=1
    )
    for _ in range(2):
        trainer.train(**TRAIN | {"num_episodes": 2, "max_timesteps": 1, "update_timesteps": 1})
    prompts, seeds = zip(*drawn)
    assert sorted(prompts) == sorted(trainer.prompts), "every prompt once before any comes again"
    assert len(set(map(tuple, seeds))) == 4


def test_the_rows_behind_the_flags_of_grpo():
    def made(**options):
        return GRPOTrainer(palm=palm(), reward_model=threes, prompt_token_ids=PROMPTS, **options)

    assert made().algorithm == "grpo"
    assert made(use_simple_policy_optimization=True).options.loss == "spo"
    assert (made(dr_grpo_constant=4.0).algorithm, made(dr_grpo_constant=4.0).scale) == ("dr-grpo", 4.0)
    assert made(use_dr_grpo=True).scale == 11
    assert made(use_score_centering=True).options.head == 23
    shaped = made(add_entropy_to_advantage=True).options
    assert (shaped.entropy_advantage, shaped.entropy_kappa) == (0.4, 2.0)
    for both in (
        {"use_dr_grpo": True, "use_max_rl": True},
        {"use_score_centering": True, "use_simple_policy_optimization": True},
    ):
        with pytest.raises(ValueError, match="exclude each other"):
            made(**both)


def test_the_critic_has_the_bins_that_the_arguments_say():
    trainer = RLHFTrainer(palm=palm(), reward_model=threes, prompt_token_ids=PROMPTS)
    assert trainer.actor_critic.critic.centres.tolist() == [0, 1, 2, 3, 4, 5]
    settings = {"min_value": -1.0, "max_value": 1.0, "min_max_value_on_bin_center": False}
    trainer = RLHFTrainer(
        palm=palm(), reward_model=threes, prompt_token_ids=PROMPTS, critic_num_pred_bins=4,
        hl_gauss_loss_kwargs=settings,
    )  # fmt: skip
    assert trainer.actor_critic.critic.centres.tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert (trainer.options.critic_low, trainer.options.critic_high, trainer.options.critic_sigma) == (
        -1,
        1,
        1,
    )
    with pytest.raises(ValueError, match="hl_gauss_loss_kwargs has sigma"):
        RLHFTrainer(
            palm=palm(), reward_model=threes, prompt_token_ids=PROMPTS, hl_gauss_loss_kwargs={"sigma": 1}
        )


def test_prompts_lose_padding_at_their_ends_alone_and_come_in_one_form(tmp_path):
    given = {"palm": palm(), "reward_model": threes, "actor_lora": False}
    trainer = TPOTrainer(prompt_token_ids=PROMPTS, **given)
    assert trainer.prompts == [[3, 4, 0, 5], [6, 7, 8, 9, 3], [4], [5, 5]]
    (tmp_path / "prompts.txt").write_text("ab\nabc\n")
    letters = lambda texts: [[ord(letter) - 90 for letter in text] for text in texts]  # noqa: E731
    read = TPOTrainer(prompts_path=tmp_path / "prompts.txt", tokenizer=letters, **given)
    assert read.prompts == [[7, 8], [7, 8, 9]]
    with pytest.raises(ValueError, match="give one of prompts, prompts_path, prompt_token_ids, got none"):
        TPOTrainer(**given)
    with pytest.raises(ValueError, match="need a tokenizer"):
        TPOTrainer(prompts=["ab"], **given)
    with pytest.raises(ValueError, match="leaves the longest prompt no room"):
        trainer.train(**(TRAIN | {"max_seq_len": 5}))
    with pytest.raises(ValueError, match="nothing would be learned"):
        trainer.train(num_episodes=1, max_timesteps=2, update_timesteps=3)


def test_palm_writes_as_many_tokens_as_asked():
    model = palm()
    assert model.generate(9).shape == (1, 9)
    prompt = torch.tensor([3, 4, 5])
    assert model.generate(9, prompt).shape == (6,)
    whole = model.generate(9, prompt[None], return_seq_without_prompt=False, temperature=0.0)
    assert whole.shape == (1, 9)
    assert whole[0, :3].equal(prompt)
    greedy = model(whole)[0, 2:-1].argmax(-1)
    assert whole[0, 3:].equal(greedy)
    assert top_k(0.9, 23) == {"top_k": 3}
    assert top_p(0.9, 23) == {"top_p": 0.9}
    assert model.generate(5, prompt, filter_logits_fn=None).shape == (2,)


def test_actor_and_critic_give_logits_and_values_before_each_token():
    both = ActorCritic(palm())
    tokens = torch.randint(1, 23, (2, 6), generator=torch.Generator().manual_seed(0))
    logits, values = both(tokens)
    assert (logits.shape, values.shape) == ((2, 6, 23), (2, 6))
    assert both(tokens, return_values=False)[1] is None
    assert both.generate(tokens, 9).responses.shape == (2, 3)
    ids = {id(p) for p in both.actor_parameters()} & {id(p) for p in both.critic_parameters()}
    assert not ids
    with pytest.raises(TypeError, match="the critic must be a PaLM, got ImplicitPRM"):
        ActorCritic(palm(), critic=ImplicitPRM(palm()))
    with pytest.raises(ValueError, match="dropout must be 0"):
        ActorCritic(palm(), actor_dropout=0.1)


def test_an_implicit_reward_learns_its_labels_and_not_their_opposite():
    """palm-rlhf-pytorch's loss is -0.69 at the start, and its rewards for label 1 fall."""
    model = ImplicitPRM(palm(), beta=1.0)
    seq = torch.randint(1, 23, (4, 7), generator=torch.Generator().manual_seed(0))
    seq[3, 4:] = -1
    labels = torch.tensor([1, 0, 1, 0])
    assert not model(seq).any()
    assert model(seq, labels).item() == pytest.approx(0.6931, abs=1e-4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(seq, labels).backward()
        optimizer.step()
    rewards = model(seq)
    assert not rewards[3, 3:].any()
    assert (rewards.sum(1).sign() == 2 * labels - 1).all()
    assert not any(p.requires_grad for p in model.ref_model.parameters())


def test_the_outcome_has_the_label_not_the_steps():
    rewards = implicit_rewards(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -1.0]]), beta=0.5)
    assert rewards.tolist() == [[1.0, -0.5]]
    for label, sign in ((1.0, 1), (0.0, -1)):
        expected = -torch.nn.functional.logsigmoid(torch.tensor([sign * 0.5]))
        torch.testing.assert_close(outcome_loss(rewards, torch.tensor([label])), expected)
