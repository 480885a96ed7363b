"""Reward models against palm-rlhf-pytorch's recorded ones and where those are wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.algorithms.preferences import (
    binned_loss,
    bradley_terry_loss,
    expected_value,
    pair_accuracy,
    regression_loss,
)
from palm_rlhf.generation import generate
from palm_rlhf.models.checkpoint import CheckpointError, save_palm, write_tensors
from palm_rlhf.models.palm import PaLM
from palm_rlhf.rewards import (
    ModelReward,
    RewardModel,
    load_reward_model,
    reward_from_upstream,
    save_reward_model,
)
from palm_rlhf.rewards.model import pooled
from tests.golden.load import golden
from tests.palm.generations import generation

SIZES = {"dim": 32, "num_tokens": 40, "depth": 2, "heads": 2, "dim_head": 16}
RECORDS = golden("palm_reward")


def palm(**options):
    return PaLM(**(SIZES | options))


def moved(model, scale=0.2):
    """In evaluation mode, away from where it starts: LoRA's B and the prompt's embedding are zero there."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def tokens(rows=3, steps=9):
    return torch.randint(1, SIZES["num_tokens"], (rows, steps))


# ---- parity with palm-rlhf-pytorch


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["case"])
def test_an_upstream_checkpoint_gives_the_recorded_predictions_and_losses(record):
    inputs = record["inputs"]
    state = {name.removeprefix("weight."): x for name, x in inputs.items() if name.startswith("weight.")}
    model = reward_from_upstream(state, causal=record["kwargs"]["causal"]).eval()
    x, labels = inputs["tokens"], inputs["labels"]
    cases = {
        "tokens": {},
        "all_true": {"mask": torch.ones_like(x, dtype=torch.bool)},
        "prompts": {"prompt_lengths": inputs["prompt_lengths"]},
        "padded": {
            "prompt_lengths": inputs["prompt_lengths"],
            "mask": torch.arange(x.shape[1]) < inputs["lengths"][:, None],
        },
    }
    compared = {name.split(".")[0] for name in record["outputs"]}
    assert compared >= {"tokens", "all_true", "prompts"}
    for case in compared:
        expected = record["outputs"][f"{case}.pred"]
        torch.testing.assert_close(model.predictions(x, **cases[case]), expected, atol=1e-5, rtol=1e-5)
        loss = model(x, labels=labels, **cases[case])
        torch.testing.assert_close(loss, record["outputs"][f"{case}.loss"], atol=1e-5, rtol=1e-5)
        if record["kwargs"]["num_binned_output"]:
            mean = (expected.softmax(-1) * torch.arange(5)).sum(-1)
            torch.testing.assert_close(model(x, **cases[case]), mean, atol=1e-5, rtol=1e-5)


def test_upstream_adapters_are_used_and_can_be_left_out():
    record = next(r for r in RECORDS if r["case"] == "causal/number/lora")
    state = {
        name.removeprefix("weight."): x for name, x in record["inputs"].items() if name.startswith("weight.")
    }
    model, x = reward_from_upstream(state).eval(), record["inputs"]["tokens"]
    assert not torch.allclose(model(x), model(x, disable_lora=True), atol=1e-4)
    assert torch.equal(
        model(x, disable_lora=True), reward_from_upstream(state, reward_lora_scope=None).eval()(x)
    )
    with pytest.raises(CheckpointError, match=r"adapters 'reward', expected 'other'"):
        reward_from_upstream(state, reward_lora_scope="other")


def test_an_upstream_pickle_loads_by_path(tmp_path):
    record = RECORDS[0]
    state = {
        name.removeprefix("weight."): x for name, x in record["inputs"].items() if name.startswith("weight.")
    }
    torch.save(state, tmp_path / "reward.pt")
    model = load_reward_model(tmp_path / "reward.pt").eval()
    found = model.predictions(record["inputs"]["tokens"])
    torch.testing.assert_close(found, record["outputs"]["tokens.pred"], atol=1e-5, rtol=1e-5)


# ---- the model


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bins", [0, 5])
def test_padding_on_either_side_changes_no_reward(pooling, causal, bins):
    model = moved(RewardModel(palm(causal=causal), num_binned_output=bins, pooling=pooling))
    x = tokens(1, 6)
    prompt = torch.arange(6)[None] < 2
    alone = model(x, None, prompt)
    for left, right in ((0, 5), (4, 0), (3, 2)):
        wide = F.pad(x, (left, right), value=7)
        mask = F.pad(torch.ones_like(x, dtype=torch.bool), (left, right))
        in_prompt = F.pad(prompt, (left, right), value=True)
        torch.testing.assert_close(model(wide, mask, in_prompt), alone, atol=1e-5, rtol=1e-5)
        negative = wide.masked_fill(~mask, -1)
        torch.testing.assert_close(model(negative, None, in_prompt), alone, atol=1e-5, rtol=1e-5)


def test_last_pooling_reads_the_last_real_token_and_mean_all_real_ones():
    hidden = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    last, mean = pooled(hidden, mask, "last"), pooled(hidden, mask, "mean")
    assert torch.equal(last, torch.stack([hidden[0, 2], hidden[1, 4], torch.zeros(4)]))
    torch.testing.assert_close(
        mean, torch.stack([hidden[0, :3].mean(0), hidden[1, 2:].mean(0), torch.zeros(4)])
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_nan_in_masked_slots_reaches_neither_rewards_nor_gradients(pooling):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    hidden = torch.randn(3, 3, 4).masked_fill(~mask[..., None], math.nan).requires_grad_()
    out = pooled(hidden, mask, pooling)
    (gradient,) = torch.autograd.grad(out.square().sum(), hidden)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


def test_the_head_starts_small_and_without_bias():
    torch.manual_seed(0)
    model = RewardModel(palm(dim=512, depth=1), num_binned_output=64)
    assert model.to_pred.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.02)
    assert not model.to_pred.bias.any()


def test_bins_give_their_expected_value_always_the_same():
    model = moved(RewardModel(palm(), num_binned_output=5))
    x = tokens()
    logits = model.predictions(x)
    expected = sum(i * logits.softmax(-1)[:, i] for i in range(5))
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), model(x))


def test_bins_are_drawn_only_when_asked_for_and_as_often_as_they_are_probable():
    model = moved(RewardModel(palm(), num_binned_output=4, sample_from_bins=True))
    x = tokens(1, 5).expand(4000, -1)
    with pytest.raises(ValueError, match="generator"):
        model(x)
    with torch.no_grad():
        drawn = model(x, generator=torch.Generator().manual_seed(1))
        again = model(x, generator=torch.Generator().manual_seed(1))
        probability = model.predictions(x[:1]).softmax(-1)[0]
    assert torch.equal(drawn, again)
    share = torch.bincount(drawn.long(), minlength=4) / len(drawn)
    torch.testing.assert_close(share, probability, atol=0.04, rtol=0)


def test_everything_that_learns_is_among_the_finetune_parameters():
    for use_lora in (True, False):
        model = RewardModel(palm(), use_lora=use_lora)
        learned = {id(p) for p in model.finetune_parameters()}
        assert {id(model.prompt_embed), id(model.response_embed), id(model.to_pred.weight)} <= learned
        assert (id(model.palm.token_emb.weight) in learned) == (not use_lora)
    x = tokens()
    model(x, prompt_lengths=torch.tensor([2, 3, 4]), labels=torch.randn(3)).backward()
    assert model.prompt_embed.grad.abs().sum() > 0
    assert model.response_embed.grad.abs().sum() > 0


def test_adapters_share_the_backbone_but_neither_its_dropout_nor_its_adapters():
    policy = palm(finetune_scopes=("actor",))
    shared, own = RewardModel(policy, dropout=0.3), RewardModel(policy, use_lora=False)
    assert shared.palm.token_emb.weight is policy.token_emb.weight
    assert own.palm.token_emb.weight.data_ptr() != policy.token_emb.weight.data_ptr()
    assert list(shared.palm.finetune_modules) == ["reward"]
    assert list(policy.finetune_modules) == ["actor"]
    assert {block.ff_dropout for block in policy.layers} == {0.0}
    assert {block.ff_dropout for block in shared.palm.layers} == {0.3}
    shared.train()
    policy.eval()
    assert shared.palm.layers[0].training


def test_dropout_is_off_while_a_generation_is_scored_and_on_again_afterwards():
    model = moved(RewardModel(palm(), dropout=0.5)).train()
    found = generation([[1, 2]], [[3, 4, 5]])
    x = found.tokens
    assert not torch.equal(model(x), model(x))
    assert torch.equal(ModelReward(model)(found), ModelReward(model)(found))
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x: m(x, torch.ones(3, 2)),
            r"mask must be \[batch, time >= 1\], got \(3, 9\) with a mask \(3, 2\)",
        ),
        (lambda m, x: m(x[0]), r"must be \[batch, time >= 1\], got \(9,\)"),
        (lambda m, x: m(x[:, :0]), r"time >= 1\], got \(3, 0\)"),
        (lambda m, x: m(x, prompt_mask=x > 3, prompt_lengths=x[:, 0]), "not both"),
        (lambda m, x: m(x, prompt_mask=x[:, :4] > 3), r"prompt_mask must be \(3, 9\), got \(3, 4\)"),
        (lambda m, x: m(x, prompt_lengths=x[:2, 0]), r"prompt_lengths must be \[3\], got \(2,\)"),
        (lambda m, x: m(x, labels=torch.zeros(3, 1)), r"labels must be \[3\].* got \(3, 1\)"),
        (lambda m, x: RewardModel(palm(), pooling="first"), "'last' or 'mean', got 'first'"),
        (lambda m, x: RewardModel(palm(finetune_scopes=("reward",))), "adapters 'reward' already"),
        (lambda m, x: ModelReward(m, micro_batch=0), "at least 1, got 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(RewardModel(palm()), tokens())


# ---- as a reward


def test_scores_are_those_of_prompt_and_response_alone_whatever_the_micro_batch():
    model = moved(RewardModel(palm()))
    prompts, responses = [[5], [6, 7, 8], [9, 1]], [[2, 3, 4], [11], [12, 13]]
    found = ModelReward(model, micro_batch=2)(generation(prompts, responses, pad=0))
    alone = [
        model(torch.tensor([p + r]), prompt_lengths=torch.tensor([len(p)]))
        for p, r in zip(prompts, responses)
    ]
    torch.testing.assert_close(found, torch.cat(alone).detach(), atol=1e-5, rtol=1e-5)
    assert not found.requires_grad
    torch.testing.assert_close(
        found, ModelReward(model)(generation(prompts, responses, pad=33)), atol=1e-5, rtol=1e-5
    )


def test_what_a_model_cannot_read_loses_its_beginning_and_is_counted(monkeypatch):
    policy = palm()
    model = moved(RewardModel(policy))
    prompts, responses = [[5, 6, 7, 8, 9], [9], [3] * 5], [[2, 3], [11, 12, 13, 14, 15, 16], [1]]
    drawn = generation(prompts, responses)
    monkeypatch.setattr(PaLM, "max_length", 6)
    reward = ModelReward(model, micro_batch=2)
    with pytest.warns(RuntimeWarning, match="a text of 7 tokens is longer than the 6") as said:
        found = [reward(drawn) for _ in range(2)]
    assert len(said) == 1
    assert reward.cut == 4
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        text = torch.tensor([[*prompt, *response][-6:]])
        alone = model(text, prompt_lengths=torch.tensor([text.shape[1] - len(response)]))
        for scores in found:
            torch.testing.assert_close(scores[row], alone[0].detach(), atol=1e-5, rtol=1e-5)


def test_what_follows_the_stop_token_is_not_read_and_the_stop_token_is():
    policy = palm()
    drawn = generate(policy, [[1, 2], [3]], max_new_tokens=12, samples=8, stop=range(8),
                     generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert drawn.stopped.any()
    model = moved(RewardModel(policy))
    scores = ModelReward(model)(drawn)
    for row in drawn.stopped.nonzero().flatten().tolist():
        prompt, response = drawn.prompt(row), drawn.response(row)
        assert response[-1] < 8
        alone = model(torch.tensor([prompt + response]), prompt_lengths=torch.tensor([len(prompt)]))
        assert scores[row].item() == pytest.approx(alone.item(), abs=1e-5)
        without = model(torch.tensor([prompt + response[:-1]]), prompt_lengths=torch.tensor([len(prompt)]))
        assert abs(scores[row].item() - without.item()) > 1e-4


@pytest.mark.parametrize("bins", [0, 5])
def test_rewards_are_normalised_twice_as_well_as_once(bins):
    reward = ModelReward(moved(RewardModel(palm(), num_binned_output=bins)))
    samples = generation([[1, 2]] * 8, torch.randint(1, 40, (8, 5)).tolist())
    before = reward(samples)
    mean, deviation = reward.normalize_on(samples)
    assert (mean, deviation) == pytest.approx(
        (before.mean().item(), before.std(correction=0).item()), rel=1e-4
    )
    once = reward(samples)
    assert once.mean().item() == pytest.approx(0, abs=1e-5)
    assert once.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(once.argsort(), before.argsort())
    moved(reward.model, 0.05)
    reward.normalize_on(samples)
    again = reward(samples)
    assert again.mean().item() == pytest.approx(0, abs=1e-5)
    assert again.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_rewards_that_cannot_be_normalised_leave_the_model_as_it_was():
    reward = ModelReward(moved(RewardModel(palm())))
    with pytest.raises(ValueError, match="Sample more responses"):
        reward.normalize_on(generation([[1, 2]] * 3, [[3]] * 3))
    with pytest.raises(ValueError, match="1 rewards"):
        reward.normalize_on(generation([[1, 2]], [[3]]))
    assert reward.model.gain == 1
    assert reward.model.offset == 0


# ---- files


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"num_binned_output": 5, "sample_temperature": 0.5, "pooling": "mean"}]
)
def test_a_saved_model_loads_bit_for_bit(tmp_path, use_lora, options):
    policy = palm(causal=False, qk_rmsnorm=True, finetune_scopes=("actor",))
    model = moved(
        RewardModel(policy, use_lora=use_lora, lora_r=3, reward_lora_scope="judge", dropout=0.2, **options)
    )
    ModelReward(model).normalize_on(generation([[1, 2]] * 4, torch.randint(1, 40, (4, 5)).tolist()))
    save_reward_model(tmp_path / "reward.safetensors", model, note="of a test")
    loaded = load_reward_model(tmp_path / "reward.safetensors").eval()
    state, found = model.state_dict(), loaded.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)
    x = tokens()
    assert torch.equal(
        loaded(x, prompt_lengths=torch.tensor([1, 2, 3])), model(x, prompt_lengths=torch.tensor([1, 2, 3]))
    )
    for name in ("pooling", "dropout", "sample_from_bins", "sample_temperature", "reward_lora_scope"):
        assert getattr(loaded, name) == getattr(model, name)
    assert len(loaded.finetune_parameters()) == len(model.finetune_parameters())


def test_foreign_files_are_refused_in_one_sentence(tmp_path):
    foreign = {
        "palm.safetensors": lambda path: save_palm(path, palm()),
        "kindless.safetensors": lambda path: write_tensors(
            path, {"a": torch.zeros(1)}, {"kind": "RewardModel"}
        ),
        "text": lambda path: path.write_text("no checkpoint"),
        "pickle.pt": lambda path: torch.save({"a": torch.zeros(1)}, path),
        "list.pt": lambda path: torch.save([1, 2], path),
        "upstream_palm.pt": lambda path: torch.save({"token_emb.weight": torch.zeros(4, 4)}, path),
        "nowhere": lambda path: None,
    }
    for name, write in foreign.items():
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=name) as caught:
            load_reward_model(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_model_with_a_head_of_another_shape_is_refused(tmp_path):
    model = RewardModel(palm())
    path = save_reward_model(tmp_path / "reward.safetensors", model)
    from palm_rlhf.models.checkpoint import read_tensors

    tensors, metadata = read_tensors(path)
    for change in (
        {"to_pred.weight": torch.zeros(1, 3)},
        {"extra": torch.zeros(1)},
        {"prompt_embed": None},
    ):
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        write_tensors(path, changed, metadata)
        with pytest.raises(CheckpointError, match="does not hold a RewardModel") as caught:
            load_reward_model(path)
        assert "\n" not in str(caught.value)


# ---- losses


def test_bradley_terry_is_the_surprise_that_the_chosen_one_won():
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1.0, 3.0, 0.0])
    win = chosen.exp() / (chosen.exp() + rejected.exp())
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), -win.log())
    wide = bradley_terry_loss(chosen, rejected, torch.tensor([1.0, 0.5, 2.0]))
    torch.testing.assert_close(wide, bradley_terry_loss(chosen - torch.tensor([1.0, 0.5, 2.0]), rejected))
    assert bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([200.0])).item() == pytest.approx(400)
    assert pair_accuracy(chosen, rejected).tolist() == [1.0, 0.0, 0.5]


def test_bradley_terry_of_half_precision_is_computed_in_single():
    chosen = torch.tensor([9.0, 8.0]).bfloat16()
    found = bradley_terry_loss(chosen, torch.zeros(2).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, bradley_terry_loss(chosen.float(), torch.zeros(2)))


def test_losses_of_labels_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    torch.testing.assert_close(binned_loss(logits, torch.tensor([1, 1])), -torch.tensor([0.75, 0.2]).log())
    torch.testing.assert_close(expected_value(logits), torch.tensor([0.75, 0.2]))
    torch.testing.assert_close(expected_value(logits, torch.tensor([-1.0, 1.0])), torch.tensor([0.5, -0.6]))
    assert regression_loss(torch.tensor([1.0, 2.0]), torch.tensor([3, 2])).tolist() == [4.0, 0.0]
