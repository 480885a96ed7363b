"""Reward models learn from pairs and labels, runs resume bit for bit, files of preferences are checked."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from itertools import chain
from pathlib import Path

import pytest
import torch

from palm_rlhf.algorithms.preferences import bradley_terry_loss
from palm_rlhf.models.checkpoint import CheckpointError
from palm_rlhf.models.palm import PaLM
from palm_rlhf.rewards import ModelReward, RewardModel
from palm_rlhf.tasks.pairs import Labelled, Pair, read_examples, read_labelled, read_pairs, split_examples
from palm_rlhf.tokens import ByteTokenizer
from palm_rlhf.trainers.checkpoints import Checkpoints
from palm_rlhf.trainers.log import RunLog, read_metrics
from palm_rlhf.trainers.loop import run
from palm_rlhf.trainers.reward import RewardConfig, RewardTrainer

TOKENIZER = ByteTokenizer()
DATA = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[3] / "shared" / "data"))


def reward_model(seed=0, **options):
    torch.manual_seed(seed)
    return RewardModel(PaLM(dim=32, num_tokens=256, depth=2, heads=2, dim_head=16), **options)


def words(count, seed=0, length=8):
    """Random texts of a, b, c, d; no two neighbours have as many a's."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        text = "".join(draw.choice("abcd") for _ in range(length))
        if len(found) % 2 == 0 or text.count("a") != found[-1].count("a"):
            found.append(text)
    return found


def many_a(count, seed=0, prompt="say: "):
    """Pairs of which the one with more a's is the better."""
    texts = words(2 * count, seed)
    ordered = [sorted(two, key=lambda text: -text.count("a")) for two in zip(texts[::2], texts[1::2])]
    return [Pair(chosen, rejected, prompt) for chosen, rejected in ordered]


def trained(trainer):
    metrics = [trainer.step(index) for index in range(trainer.steps)]
    return metrics[-1]


# ---- learning


@pytest.mark.parametrize(
    "options",
    [{"use_lora": False}, {"use_lora": True}, {"use_lora": False, "num_binned_output": 5, "pooling": "mean"}],
)
def test_a_tiny_model_learns_to_prefer_more_a_on_pairs_held_back(options):
    model = reward_model(dropout=0.0, **options)
    config = RewardConfig(epochs=4, batch=20, lr=1e-2 if options["use_lora"] else 3e-3)
    trainer = RewardTrainer(model, many_a(200), TOKENIZER, config=config, held_out=many_a(200, seed=1))
    before = trainer.evaluate()
    after = trained(trainer)
    assert after["held_out_accuracy"] > max(0.9, before["accuracy"] + 0.05)
    assert after["held_out_loss"] < 0.5 * before["loss"]
    assert after["held_out_difference"] > 1


def test_with_adapters_the_backbone_stays_as_it_was():
    model = reward_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = RewardTrainer(model, many_a(40), TOKENIZER, config=RewardConfig(lr=1e-2, batch=8))
    trained(trainer)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert {"prompt_embed", "response_embed", "to_pred.weight"} <= changed
    assert all("finetune_modules.reward" in name for name in changed if name.startswith("palm."))
    # No gradient either: a policy that shares the backbone would take it for its own.
    assert all(p.grad is None for n, p in model.palm.named_parameters() if "finetune_modules" not in n)


def test_labels_in_bins_and_as_numbers_are_learned():
    examples = [Labelled(text, text.count("a")) for text in words(400, length=4)]
    for bins in (5, 0):
        model = reward_model(dropout=0.0, use_lora=False, num_binned_output=bins)
        config = RewardConfig(epochs=4, batch=20, lr=3e-3)
        trainer = RewardTrainer(model, examples[:300], TOKENIZER, config=config, held_out=examples[300:])
        before, after = trainer.evaluate(), trained(trainer)
        assert after["held_out_error"] < 0.5
        assert after["held_out_error"] < 0.6 * before["error"]
        assert after.get("held_out_accuracy", 1.0) > 0.7


# ---- the update


def test_the_loss_of_a_step_is_that_of_every_pair_alone():
    pairs = many_a(6)
    pairs = [Pair(p.chosen * (1 + i), p.rejected, p.prompt, margin=i / 2) for i, p in enumerate(pairs)]
    model = reward_model(dropout=0.0)
    trainer = RewardTrainer(model, pairs, TOKENIZER, config=RewardConfig(batch=6))
    losses = []
    for pair in pairs:
        prompt = TOKENIZER.encode(pair.prompt)
        chosen, rejected = (
            model(
                torch.tensor([[*prompt, *TOKENIZER.encode(text), TOKENIZER.stop]]),
                prompt_lengths=torch.tensor([len(prompt)]),
            )
            for text in (pair.chosen, pair.rejected)
        )
        losses.append(bradley_terry_loss(chosen, rejected, pair.margin).item())
    assert trainer.step(0)["loss"] == pytest.approx(sum(losses) / 6, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4, 7])
def test_gradients_accumulated_over_uneven_parts_are_those_of_the_whole_batch(micro_batch):
    gradients = []
    for size in (None, micro_batch):
        model = reward_model(dropout=0.0, use_lora=False)
        config = RewardConfig(batch=10, micro_batch=size, max_grad_norm=None)
        trainer = RewardTrainer(model, many_a(10), TOKENIZER, config=config)
        kept = {}
        trainer.optimizers()["reward"].register_step_pre_hook(
            lambda *_, model=model, kept=kept: kept.update(
                {n: p.grad.clone() for n, p in model.named_parameters()}
            )
        )
        trainer.step(0)
        gradients.append(kept)
    whole, parts = gradients
    assert any(x.abs().max() > 1e-3 for x in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_pass_takes_every_example_once_and_the_rate_falls_to_zero():
    trainer = RewardTrainer(
        reward_model(), many_a(10), TOKENIZER, config=RewardConfig(batch=4, epochs=2, lr=1e-2)
    )
    assert trainer.steps == 6
    taken = [trainer._next_indices() for _ in range(6)]
    assert [len(part) for part in taken] == [4, 4, 2] * 2
    assert sorted(chain(*taken[:3])) == sorted(chain(*taken[3:])) == list(range(10))
    assert taken[:3] != taken[3:]
    rates = [trainer.step(index)["lr"] for index in range(6)]
    assert rates == pytest.approx([1e-2 * (1 - index / 6) for index in range(6)])


def test_dropout_is_on_in_steps_and_off_in_evaluation():
    pairs = many_a(8)
    trainer = RewardTrainer(
        reward_model(dropout=0.5), pairs, TOKENIZER, config=RewardConfig(), held_out=pairs
    )
    assert trainer.evaluate() == trainer.evaluate()
    modes = []
    trainer.model.palm.layers[0].register_forward_hook(lambda block, *_: modes.append(block.training))
    trainer.step(0)
    assert modes == [True, False]  # the last step is followed by an evaluation


def test_a_long_text_keeps_its_end_and_its_stop_token():
    pairs = [Pair("x" * 30 + "1", "2", "question" * 4)]
    trainer = RewardTrainer(reward_model(), pairs, TOKENIZER, config=RewardConfig(max_tokens=10))
    chosen, rejected = trainer._rows[0].texts
    assert bytes(chosen.tokens) == b"x" * 8 + b"1\x04"
    assert chosen.prompt == 0
    assert bytes(rejected.tokens) == b"question2\x04"[-10:]
    assert rejected.prompt == 8


def test_training_and_scoring_read_a_response_alike():
    from palm_rlhf.generation import Generation

    pairs = many_a(1)
    model = reward_model(dropout=0.0, use_lora=False)
    trainer = RewardTrainer(
        model, pairs * 20, TOKENIZER, config=RewardConfig(lr=1e-2, batch=4), held_out=pairs
    )
    trained(trainer)
    assert model.prompt_embed.abs().max() > 0
    prompt = TOKENIZER.encode(pairs[0].prompt)
    rows = [
        [0, 0, *prompt, *TOKENIZER.encode(text), TOKENIZER.stop, 0]
        for text in (pairs[0].chosen, pairs[0].rejected)
    ]
    tokens = torch.tensor(rows)
    width = 2 + len(prompt)
    zeros = torch.zeros(2, tokens.shape[1] - width)
    generation = Generation(tokens, tokens != 0, width, zeros, zeros, torch.ones(2, dtype=torch.bool))
    chosen, rejected = ModelReward(model)(generation).tolist()
    assert chosen - rejected == pytest.approx(trainer.evaluate()["difference"], abs=1e-4)


def test_margins_and_centring_are_in_the_loss():
    """By hand, and centring as TRL 1.16's RewardTrainer has it: weight * mean((chosen + rejected)^2)."""
    pairs = [Pair("aab", "b", "say: ", margin=0.7), Pair("a", "bb", "say: "), Pair("aa", "cb", margin=2.0)]
    model, found = reward_model(dropout=0.0), {}
    for margin, centring in ((1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (1.0, 0.3)):
        config = RewardConfig(batch=3, margin=margin, centring=centring)
        trainer = RewardTrainer(model, pairs, TOKENIZER, config=config, held_out=pairs)
        found[margin, centring] = trainer.evaluate()
        tokens, mask, prompts = trainer._batch([row.texts[k] for k in range(2) for row in trainer._rows])
        with torch.no_grad():
            chosen, rejected = model.pair_scores(tokens, mask, prompts)
        wanted = chosen - rejected - margin * torch.tensor([0.7, 0.0, 2.0])
        expected = torch.log1p(torch.exp(-wanted)).mean() + centring * ((chosen + rejected) ** 2).mean()
        assert found[margin, centring]["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert found[margin, centring]["reward"] == pytest.approx(float((chosen + rejected).mean() / 2))
    assert len({round(each["loss"], 5) for each in found.values()}) == 4
    for name in ("margin", "centring"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            RewardConfig(**{name: -1})


def test_centring_keeps_rewards_around_zero():
    far = []
    for centring in (0.0, 0.5):
        model = reward_model(dropout=0.0)
        with torch.no_grad():
            model.to_pred.bias.fill_(3.0)
        pairs = many_a(8)
        config = RewardConfig(epochs=30, lr=1e-2, batch=8, centring=centring, anneal=False)
        far.append(abs(trained(RewardTrainer(model, pairs, TOKENIZER, config=config))["reward"]))
    assert far[1] < 1 < 2 < far[0]


# ---- resuming


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, use_lora):
    def go(folder, *stops):
        for stop in stops:
            trainer = RewardTrainer(
                reward_model(seed=3, use_lora=use_lora), many_a(6), TOKENIZER,
                config=RewardConfig(batch=2, epochs=2, lr=1e-2, micro_batch=1), held_out=many_a(4, 1),
            )  # fmt: skip
            torch.manual_seed(stop)  # dropout's, which the checkpoint puts back
            if stop is stops[0]:
                torch.manual_seed(11)
            run(trainer, RunLog(folder, tensorboard=False), Checkpoints(folder), steps=stop, progress=False)
        rows = [
            {k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "metrics.jsonl")
        ]
        return trainer, rows

    (whole, rows), (resumed, resumed_rows) = go(tmp_path / "whole", 4), go(tmp_path / "parts", 2, 4)
    assert len(rows) == 4
    assert resumed_rows == rows
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moments = [t.optimizers()["reward"].state_dict()["state"] for t in (whole, resumed)]
    assert all(torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[0] for k in moments[0][i])
    start = reward_model(seed=3, use_lora=use_lora).state_dict()
    assert any(not torch.equal(ours[name], start[name]) for name in ours)


def test_a_checkpoint_of_another_number_of_examples_is_refused(tmp_path):
    def go(count, steps):
        trainer = RewardTrainer(
            reward_model(), many_a(count), TOKENIZER, config=RewardConfig(batch=2, epochs=3)
        )
        run(trainer, RunLog(tmp_path, tensorboard=False), Checkpoints(tmp_path), steps=steps, progress=False)

    go(6, 1)
    with pytest.raises(CheckpointError, match="trained on 6 examples, and there are 4 now"):
        go(4, 2)
    file = tmp_path / "step-00000001" / "training.pt"
    state = torch.load(file)
    del state["extra"]["count"]  # as older ones are
    torch.save(state, file)
    go(6, 2)


# ---- mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ([], {}), "no examples"),
        (lambda: ([Pair("a", "b"), Labelled("a", 1.0)], {}), "of one kind, got Labelled and Pair"),
        (lambda: ([Labelled("a", 5.0)], {"num_binned_output": 5}), "bins from 0 to 4, got 5 for 'a'"),
        (lambda: ([Labelled("a", 1.5)], {"num_binned_output": 5}), "bins from 0 to 4, got 1.5"),
        (lambda: ([Labelled("a", -1.0)], {"num_binned_output": 5}), "got -1"),
    ],
)
def test_examples_that_cannot_be_learned_from_are_refused(make, message):
    examples, options = make()
    with pytest.raises(ValueError, match=message):
        RewardTrainer(reward_model(**options), examples, TOKENIZER, config=RewardConfig())


def test_a_tokenizer_of_another_model_is_refused():
    model = RewardModel(PaLM(dim=32, num_tokens=90, depth=1, heads=2, dim_head=16))
    with pytest.raises(ValueError, match=r"from 0 to 89, got 122\. Does the tokenizer belong"):
        RewardTrainer(model, [Pair("z", "b")], TOKENIZER, config=RewardConfig())


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = reward_model()
    trainer = RewardTrainer(model, many_a(4), TOKENIZER, config=RewardConfig())
    with torch.no_grad():
        model.to_pred.weight.fill_(math.nan)
    before = model.response_embed.clone()
    with pytest.raises(ValueError, match=r"the loss is nan at step 1\. Lower the learning rate"):
        trainer.step(0)
    assert torch.equal(model.response_embed, before)


@pytest.mark.parametrize("field", ["epochs", "batch", "micro_batch", "max_tokens", "eval_every", "lr"])
def test_a_configuration_that_cannot_run_is_refused(field):
    with pytest.raises(ValueError, match=field):
        RewardConfig(**{field: 0})


# ---- files of preferences


def written(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_pairs_and_labels_are_read_with_what_is_optional(tmp_path):
    path = written(
        tmp_path,
        {"chosen": "a\u2028b", "rejected": "c", "source": "else"},
        "",
        {"prompt": "p", "chosen": "x", "rejected": "y", "margin": 2},
        {"prompt": None, "chosen": "same", "rejected": "same"},
    )
    assert read_pairs(path) == [Pair("a\u2028b", "c"), Pair("x", "y", "p", 2.0)]
    assert read_examples(path) == read_pairs(path)
    path = written(tmp_path, {"text": "good", "label": 1, "prompt": "q"}, {"text": "bad", "label": -0.5})
    assert read_labelled(path) == read_examples(path) == [Labelled("good", 1.0, "q"), Labelled("bad", -0.5)]


def test_gzipped_lines_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"chosen": "a", "rejected": "b"}\n'))
    assert read_pairs(path) == [Pair("a", "b")]


GOOD = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"chosen": "a", ', "line 2: no JSON: .* at column 17"),
        ("[1]", "line 2: expected an object, got list"),
        ({"chosen": "a"}, 'line 2: "rejected" is missing. Each line is'),
        ({"chosen": ["a"], "rejected": "b"}, 'line 2: "chosen" must be a text, got list'),
        ({"chosen": "", "rejected": "b"}, 'line 2: "chosen" is empty'),
        ({**GOOD, "prompt": 3}, 'line 2: "prompt" must be a text, got int'),
        ({**GOOD, "margin": "2"}, "line 2: \"margin\" must be a finite number, got '2'"),
        ({"text": "a", "label": 1}, 'line 2: "chosen" is missing'),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(written(tmp_path, GOOD, bad))
    assert "pairs.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["1", True, None, "NaN"])
def test_a_label_that_is_no_number_is_named(tmp_path, label):
    row = '{"text": "a", "label": NaN}' if label == "NaN" else {"text": "a", "label": label}
    with pytest.raises(ValueError, match='line 1: "label" must be a finite number'):
        read_examples(written(tmp_path, row))


def test_files_without_preferences_are_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\x00\xff\x00")
    for path, message in (
        (tmp_path / "nowhere", "cannot be read"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "binary", "no text file"),
        (written(tmp_path, {"a": 1}), 'line 1: there is neither "chosen" nor "text"'),
    ):
        with pytest.raises(ValueError, match=message):
            read_examples(path)


def test_a_split_keeps_the_pairs_of_a_prompt_together_and_depends_on_the_seed_alone():
    pairs = [Pair(f"a{i}", f"b{i}", f"prompt {i // 4}") for i in range(40)] + [
        Pair(f"c{i}", "d") for i in range(10)
    ]
    train, held = split_examples(pairs, 0.2, seed=1)
    assert sorted([*train, *held], key=str) == sorted(pairs, key=str)
    assert 10 <= len(held) <= 13
    assert not {p.prompt for p in train if p.prompt} & {p.prompt for p in held}
    assert split_examples(pairs, 0.2, seed=1) == (train, held)
    assert split_examples(pairs, 0.2, seed=2) != (train, held)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="one side empty"):
            split_examples(pairs, share)


def test_the_human_preferences_of_hh_rlhf_load_and_are_learned_from():
    path = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not here: set PALM_RLHF_DATA to the folder that holds hh-rlhf")
    pairs = read_pairs(path)
    assert 2200 < len(pairs) <= 2312
    assert all(pair.chosen.startswith("\n\nHuman:") for pair in pairs)
    train, held = split_examples(pairs, 0.18)
    config = RewardConfig(batch=8, max_tokens=32)
    trainer = RewardTrainer(reward_model(), train[:64], TOKENIZER, config=config, held_out=held[:16])
    metrics = trainer.step(0)
    assert 0.4 < metrics["loss"] < 1.2
    assert 0 <= trainer.evaluate()["accuracy"] <= 1
