"""Supervised training: the loss is the definition's, the normaliser is global, and the model learns."""

import math

import pytest
import torch

from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy
from palm_rlhf.tasks.text import Samples, lines, read_text, windows
from palm_rlhf.tokens import ByteTokenizer
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer
from tests.palm.command_line import real_text

BYTES = ByteTokenizer()


def tiny(**options):
    torch.manual_seed(0)
    return PaLM(dim=32, num_tokens=256, depth=2, heads=2, dim_head=16, **options)


def stacked(*parts: tuple[str, int]) -> Samples:
    return lines([text * count for text, count in parts], BYTES)


def test_log_probabilities_are_those_of_the_logits_and_0_where_masked():
    model, samples = tiny(), lines(["abcdef", "xy"], BYTES)
    tokens, mask = samples.batch(torch.arange(2))
    found = Policy(model)(tokens, mask, 1)[0]
    expected = model(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found[mask[:, 1:]], expected[mask[:, 1:]], rtol=1e-5, atol=1e-5)
    assert not found[~mask[:, 1:]].any()


def test_padding_changes_neither_the_loss_nor_a_gradient():
    alone = SFTTrainer(tiny(), lines(["abcdef"], BYTES), None, SFTConfig(batch=1))
    tokens, mask = alone.samples.batch(torch.tensor([0]))
    wide = torch.nn.functional.pad(tokens, (0, 5), value=77), torch.nn.functional.pad(mask, (0, 5))
    gradients = []
    for given in ((tokens, mask), wide):
        alone.model.zero_grad()
        alone._loss_sum(*given, given[1]).backward()
        gradients.append([p.grad.clone() for p in alone.model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_of_a_prompt_and_its_response_the_response_alone_is_learned():
    samples = lines([("ab", "cd"), ("e", "fgh")], BYTES)
    trainer = SFTTrainer(tiny(), samples, None, SFTConfig(batch=2))
    tokens, mask, learned = trainer._batch(samples, torch.arange(2))
    assert [BYTES.decode(row[real].tolist()) for row, real in zip(tokens, mask)] == ["abcd", "efgh"]
    assert learned.tolist() == [[False, False, True, True, True], [False, True, True, True, True]]
    found = trainer.policy(tokens, mask, 1)[0].detach()
    assert trainer.step(0)["loss"] == pytest.approx(-float(found[:, 1:].sum() + found[1, 0]) / 7, rel=1e-5)
    assert samples.divided(0.5)[1].given.tolist() == [1]


def test_accumulation_divides_by_the_tokens_of_the_whole_update():
    """Samples of unlike lengths: a mean of means would weigh the tokens of short ones more."""
    samples = stacked(("ab", 20), ("c", 3), ("def", 9), ("g", 1))
    models = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = SFTTrainer(tiny(), samples, None, SFTConfig(batch=batch, accumulate=accumulate, warmup=0))
        loss = trainer.step(0)["loss"]
        models.append((loss, trainer.model.state_dict()))
    for loss, state in models[1:]:
        assert loss == pytest.approx(models[0][0], rel=1e-5)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, models[0][1][name], rtol=1e-3, atol=2e-5, msg=name)


def test_every_sample_comes_once_before_any_comes_again():
    samples = stacked(*((chr(97 + i), 1) for i in range(7)))
    trainer = SFTTrainer(tiny(), samples, None, SFTConfig(batch=3))
    drawn = [index for _ in range(7) for index in trainer._next_indices()]
    assert [sorted(drawn[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert drawn[:7] != drawn[7:14]


def test_the_rate_warms_up_and_falls_to_its_share():
    config = SFTConfig(steps=100, lr=1.0, warmup=9, final_lr=0.1)
    rates = [config.rate(index) for index in range(101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    assert {SFTConfig(warmup=0, final_lr=1.0).rate(index) for index in (0, 250, 499)} == {SFTConfig().lr}


def test_validation_is_the_mean_over_tokens_and_has_no_dropout():
    samples, judge = stacked(("ab", 3)), stacked(("abc", 3), ("x", 1), ("yz", 4))
    trainer = SFTTrainer(tiny(attn_dropout=0.5, ff_dropout=0.5), samples, judge, SFTConfig(batch=2))
    found = trainer.validation_loss()
    tokens, mask = judge.batch(torch.arange(3))
    with torch.no_grad():
        every = Policy(trainer.model.eval())(tokens, mask, 1)[0]
    assert found == pytest.approx(-float(every.sum() / mask[:, 1:].sum()), rel=1e-5)
    assert found == trainer.validation_loss()


def test_a_model_learns_what_repeats():
    samples, judge = windows("0123456789" * 200, BYTES, 16).divided(0.1)
    trainer = SFTTrainer(
        tiny(), samples, judge, SFTConfig(steps=60, batch=8, lr=1e-2, warmup=5, eval_every=30)
    )
    rows = [trainer.step(index) for index in range(60)]
    assert rows[0]["loss"] == pytest.approx(math.log(256), rel=0.1)
    assert [index for index, row in enumerate(rows) if "validation_loss" in row] == [29, 59]
    assert rows[-1]["validation_loss"] < 0.3
    assert rows[-1]["validation_perplexity"] == pytest.approx(math.exp(rows[-1]["validation_loss"]))


def test_a_model_learns_real_text_beyond_the_frequency_of_letters():
    """Within 60 steps the loss on text held back is below the entropy of single bytes: it learned pairs."""
    text = read_text(real_text())[:200_000]
    samples, judge = windows(text, BYTES, 64).divided(0.05)
    share = torch.bincount(torch.tensor(BYTES.encode(text))).double() / len(text.encode())
    entropy = -float((share * share.clamp(min=1e-12).log()).sum())
    trainer = SFTTrainer(tiny(), samples, judge, SFTConfig(steps=60, batch=16, lr=2e-2, eval_samples=32))
    rows = [trainer.step(index) for index in range(60)]
    assert rows[-1]["validation_loss"] < entropy - 0.2


def test_adapters_learn_and_the_model_stays():
    model = tiny()
    model.add_finetune_params("mine", 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = SFTTrainer(model, stacked(("ab", 5)), None, SFTConfig(batch=1, warmup=0), scope="mine")
    trainer.step(0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("finetune_modules.mine.") for name in changed)


def test_what_cannot_be_trained_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="no samples to learn from"):
        SFTTrainer(model, stacked(("a", 1)).divided(0.0)[1], None, SFTConfig())
    model.max_length = 8
    with pytest.raises(ValueError, match="samples of 9 tokens exceed the model's 8"):
        SFTTrainer(model, stacked(("a", 9)), None, SFTConfig())
    SFTTrainer(model, stacked(("a", 8)), None, SFTConfig())
    for options, reason in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"final_lr": 2}, "from 0 to 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            SFTConfig(**options)


def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_weights():
    model = tiny()
    trainer = SFTTrainer(model, stacked(("ab", 5)), None, SFTConfig(batch=1, warmup=0))
    with torch.no_grad():
        model.token_emb.weight[98] = math.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 1. Lower the learning rate"):
        trainer.step(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
