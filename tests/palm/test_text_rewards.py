"""Rewards by functions, words, sentiment, rules, ensembles, classifiers and training; by hand and by name."""

import math
import os
from pathlib import Path

import pytest
import torch

from palm_rlhf.commands.rewards import named_reward
from palm_rlhf.generation import generate
from palm_rlhf.models.value import Policy
from palm_rlhf.rewards import (
    Ensemble,
    ImplicitReward,
    Length,
    Lexicon,
    Matches,
    ProgrammaticReward,
    RewardError,
    Sentiment,
)
from palm_rlhf.rewards.text import text_reward
from palm_rlhf.tasks.sentiment import read_sst2
from palm_rlhf.tokens import ByteTokenizer
from rlhf_kernels.stacks import activate
from tests.palm.generations import generation

SST2 = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[2] / "../shared/data")) / "sst2"
BYTES = ByteTokenizer()


def texts(*pairs):
    """A Generation of prompts and responses in bytes."""
    return generation(*([BYTES.encode(text) for text in side] for side in zip(*pairs)))


def test_a_function_on_text_sees_prompt_and_response_without_padding_and_stop():
    tokenizer, seen = ByteTokenizer(), []

    def score(prompt, response):
        seen.append((prompt, response))
        return len(response)

    prompts = [tokenizer.encode("12*7="), tokenizer.encode("é=")]
    responses = [[*tokenizer.encode("84"), tokenizer.stop], tokenizer.encode("ü")]
    found = ProgrammaticReward(score, tokenizer)(generation(prompts, responses))
    assert seen == [("12*7=", "84"), ("é=", "ü")]
    assert found.dtype == torch.float32
    assert found.tolist() == [2.0, 1.0]


def test_a_function_on_tokens_sees_them_all_but_the_stop():
    seen = []
    reward = ProgrammaticReward(lambda p, r: seen.append((p, r)) or True, on="tokens", stop=9)
    assert reward(generation([[1], [2, 3]], [[4, 9], [5, 6]])).tolist() == [1.0, 1.0]
    assert seen == [([1], [4]), ([2, 3], [5, 6])]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 1e39, None, "1", [1, 2], torch.tensor([1.0, 2.0]), 10**400]
)
def test_what_is_no_finite_number_is_refused_with_the_response(value):
    reward = ProgrammaticReward(lambda prompt, response: value, on="tokens")
    with pytest.raises(RewardError, match=r"gave .*prompt \[1\] and the response \[4\].*finite"):
        reward(generation([[1]], [[4]]))


def test_a_function_that_raises_is_named_with_its_error_and_the_response():
    def divides(prompt, response):
        return 1 / 0

    with pytest.raises(
        RewardError, match=r"divides\(\) raised ZeroDivisionError: .*response \[4, 5\]"
    ) as caught:
        ProgrammaticReward(divides, on="tokens")(generation([[1]], [[4, 5]]))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError) as caught:
        ProgrammaticReward(divides, on="tokens")(generation([[1] * 5000], [[4]]))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("options", [{}, {"on": "bytes"}])
def test_a_programmatic_reward_without_a_way_to_read_is_refused(options):
    with pytest.raises(ValueError, match="ProgrammaticReward"):
        ProgrammaticReward(len, **options)


def test_a_lexicon_takes_the_mean_of_a_texts_words(tmp_path):
    words = Lexicon({"Good": 2, "bad": -1.5})
    assert words("bad ", "A GOOD, good day: not bad!") == pytest.approx((2 + 2 - 1.5) / 6)
    assert words("", "...") == 0
    assert Lexicon(words.weights, whole=True)("bad ", "good") == 0.25
    (tmp_path / "words.tsv").write_text("good\t2\t0.5\nbad\t-1.5\n")
    (tmp_path / "words.json").write_text('{"good": 2, "bad": -1.5}')
    for name in ("words.tsv", "words.json"):
        assert text_reward(f"lexicon:{tmp_path / name}")("", "good bad it") == pytest.approx(0.5 / 3)
    for text, problem in (
        ("good 2\n", "line 1: expected a word, a tab"),
        ("good\tnan\n", "weight of 'good'"),
    ):
        (tmp_path / "words.tsv").write_text(text)
        with pytest.raises(ValueError, match=problem):
            Lexicon(tmp_path / "words.tsv")


def test_rules():
    assert [Matches(r"\d+\.")("7.", text) for text in ("is 12.", "is 12")] == [1, 0]
    assert Matches("x", reward=-2, otherwise=3)("x", "y") == 3
    assert [Length(2, 3)("", "a " * n) for n in (0, 1, 2, 3, 5)] == [-2, -1, 0, 0, -2]
    assert Length(most=4, unit="characters", cost=0.5)("", "abcdef") == -1
    assert [text_reward("lacks:bad")("", text) for text in ("bad", "good")] == [0, 1]
    assert text_reward("words:2-")("", "one") == -1
    assert text_reward("characters:-3")("", "four") == -1
    assert text_reward("matches:a:b")("", "a:b") == 1
    assert text_reward("score.py:polite") is None


@pytest.mark.skipif(not SST2.is_dir(), reason="no SST-2 in PALM_RLHF_DATA")
def test_sentiment_from_data_finds_that_of_others():
    judge = text_reward(f"sentiment:{SST2 / 'train.tsv'}")
    held_out = read_sst2(SST2 / "dev.tsv")
    right = sum((judge("", each.text) > 0) == bool(each.label) for each in held_out)
    assert right / len(held_out) >= 0.78
    assert judge("an entirely wonderful film , ", "moving and funny and touching and superb " * 9) == 10
    assert judge("", "bad " * 3) < 0 < Sentiment(judge.judge, limit=None)("", "a moving , superb film")


def test_an_ensemble_of_rewards_by_hand():
    g = texts(("a", "x"), ("b", "xyz"))
    one, two = (lambda g: g.response_mask.sum(1).float()), (lambda g: torch.tensor([5.0, 1.0]))
    found = {combine: Ensemble([one, two], combine)(g).tolist() for combine in ("mean", "sum", "min")}
    assert found == {"mean": [3, 2], "sum": [6, 4], "min": [1, 1]}
    # Population deviations: 2 and 1.
    assert Ensemble([one, two], "lower", k=0.5)(g).tolist() == [2, 1.5]
    assert Ensemble([one, two], "mean", weights=[3, 1])(g).tolist() == [2, 2.5]
    assert Ensemble([one, two]).members(g).tolist() == [[1, 3], [5, 1]]
    for wrong, problem in (
        ({"combine": "max"}, "one of mean, min, lower, sum, got 'max'"),
        ({"weights": [1]}, "a weight for each of the 2"),
        ({"weights": [1, -1]}, "their sum not 0"),
        ({"combine": "min", "weights": [1, 1]}, "of mean and sum"),
        ({"k": -1}, "k must be"),
    ):
        with pytest.raises(ValueError, match=problem):
            Ensemble([one, two], **wrong)
    with pytest.raises(ValueError, match="no rewards"):
        Ensemble([])


def test_what_became_more_probable_has_a_positive_implicit_reward(make_palm):
    model = make_palm(finetune_scopes=("actor",))
    policy, reference = Policy(model, "actor"), Policy(model)
    g = generate(model, [[3, 4, 5], [6]], max_new_tokens=6, stop=[2], seeds=[1, 2])
    optimizer = torch.optim.SGD(policy.trained(), lr=0.02)
    reward = ImplicitReward(policy, reference, beta=0.5, micro_batch=1)
    before = reward(g)
    for _ in range(4):
        (-policy(g.tokens, g.mask, g.prompt_width)[0].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (reward(g) > before).all()
    both = [part(g.tokens, g.mask, g.prompt_width)[0].detach() for part in (policy, reference)]
    torch.testing.assert_close(reward.tokens(g), 0.5 * (both[0] - both[1]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(reward(g), reward.tokens(g).sum(1))
    assert not reward.tokens(g)[~g.response_mask].any()
    # What was trained at a temperature is worth what it is there.
    both = [part(g.tokens, g.mask, g.prompt_width, 0.5)[0].sum(1).detach() for part in (policy, reference)]
    found = ImplicitReward(policy, reference, beta=0.3, temperature=0.5)(g)
    torch.testing.assert_close(found, 0.3 * (both[0] - both[1]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ImplicitReward(policy, reference, temperature=0)


def small_classifier(tmp_path, labels: int):
    """A random BERT and a tokenizer of bytes' hexadecimal names, saved as transformers does."""
    activate()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (make peers)")
    tokenizers = pytest.importorskip("tokenizers")
    names = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(names, range(28))), "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=28, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, num_labels=labels, initializer_range=0.5,
    )  # fmt: skip
    if labels > 1:
        config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), fast


@pytest.mark.peers
@pytest.mark.parametrize("labels", [1, 2])
def test_a_sequence_classification_model_of_transformers(tmp_path, labels):
    model, tokenizer = small_classifier(tmp_path, labels)
    name = f"hf:{tmp_path}" + ("@good" if labels > 1 else "")
    pairs = [("so ", "much depends"), ("a", "b"), ("upon ", "a red wheel barrow glazed with rain")]
    reward = named_reward(name, BYTES, BYTES.stop)
    reward.classifier.batch = 2
    found = reward(texts(*pairs))
    for row, pair in enumerate(pairs):
        # By itself, and of the longest the end alone.
        ids = tokenizer("".join(pair))["input_ids"][-24:]
        logits = model(torch.tensor([ids])).logits[0].detach()
        expected = logits[0] if labels == 1 else logits[1] - logits[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)

    class Chat(ByteTokenizer):
        chat = True

    reward.classifier.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }} {{ m.content }}{% endfor %}"
    )
    chat = named_reward(name, Chat(), BYTES.stop)
    chat.classifier = reward.classifier
    assert chat(texts(("so", "much"))) == reward.classifier.scores(["u soa much"])
    if labels > 1:
        with pytest.raises(ValueError, match="the labels bad, good: say which is good, got None"):
            named_reward(f"hf:{tmp_path}", BYTES, BYTES.stop)
        with pytest.raises(ValueError, match="no sequence-classification model"):
            named_reward(f"hf:{tmp_path / 'nothing'}", BYTES, BYTES.stop)


@pytest.mark.peers
def test_a_classifier_that_counts_positions_from_behind_its_padding_reads_as_many_fewer(tmp_path):
    _, tokenizer = small_classifier(tmp_path, 1)
    import transformers

    from palm_rlhf.rewards.classifier import Classifier

    config = transformers.RobertaConfig(
        vocab_size=28, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    classifier = Classifier(transformers.RobertaForSequenceClassification(config), tokenizer)
    assert classifier.max_tokens == 19
    assert classifier.scores(["a" * 30, "b" * 19]).isfinite().all()
