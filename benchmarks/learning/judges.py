"""Who says whether a sentence is positive: the reward of the sentiment runs, and the judges apart from it.

Reward and judge share no labelled sentence. VADER, a lexicon with rules (Hutto and Gilbert, 2014), has seen
none at all; it is a package of its own, `pip install vaderSentiment`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from palm_rlhf.models.palm import PaLM
from palm_rlhf.pipeline.scoring import as_generation
from palm_rlhf.rewards import Ensemble, ModelReward, ProgrammaticReward, RewardModel
from palm_rlhf.tasks.pairs import Labelled
from palm_rlhf.tasks.sentiment import NaiveBayes, parts
from palm_rlhf.tokens import Tokenizer
from palm_rlhf.trainers.reward import RewardConfig, RewardTrainer

NETWORKS = 2
SHAPE = {"dim": 64, "depth": 1, "heads": 2, "dim_head": 16, "ff_mult": 1}
CONFIG = RewardConfig(epochs=2, batch=32, lr=3e-3, weight_decay=0.1, eval_every=10_000)
# Naive Bayes takes words for independent and is too sure: its log-odds are divided by this in the reward.
SURE = 3.0
FOLDS = 5


def reward(examples: Sequence[Labelled], tokens: Tokenizer, seed: int) -> Ensemble:
    """The probability of `positive`: the networks' mean and that of naive Bayes, half and half."""
    networks = [_network(examples, tokens, NETWORKS * seed + i) for i in range(NETWORKS)]
    bayes = NaiveBayes(examples)

    def by_words(prompt: list[int], response: list[int]) -> float:
        return 1 / (1 + math.exp(-bayes(tokens.decode([*prompt, *response])) / SURE))

    words = ProgrammaticReward(by_words, on="tokens", stop=tokens.stop)
    return Ensemble([*networks, words], weights=[1.0] * NETWORKS + [float(NETWORKS)])


def _network(examples: Sequence[Labelled], tokens: Tokenizer, seed: int) -> ModelReward:
    """Shallow and from nothing: from the language model it learns its examples by heart sooner."""
    torch.manual_seed(seed)
    body = PaLM(num_tokens=tokens.vocabulary, **SHAPE)
    scorer = RewardModel(body, dropout=0.3, num_binned_output=2, use_lora=False, pooling="mean")
    learner = RewardTrainer(scorer, examples, tokens, config=replace(CONFIG, seed=seed))
    for i in range(learner.steps):
        learner.step(i)
    return ModelReward(scorer.requires_grad_(False), micro_batch=256)


def reward_accuracy(
    found: Ensemble, examples: Sequence[Labelled], tokens: Tokenizer
) -> tuple[float, list[float]]:
    """Share of sentences whose label it finds: all members together, and each alone."""
    texts = [[*tokens.encode(example.text), tokens.stop] for example in examples]
    drawn = as_generation(texts, [()] * len(texts), tokens.pad)
    labels = torch.tensor([example.label for example in examples]) > 0.5

    def share(scores: Tensor) -> float:
        return float(((scores > 0.5) == labels).float().mean())

    return share(found(drawn)), [share(scores) for scores in found.members(drawn)]


def judge(examples: Sequence[Labelled]) -> NaiveBayes:
    """Naive Bayes that calls one half of the sentences positive: of those that it has not learned from.

    What it says of sentences unlike its own is else a matter of the classes' sizes.
    """
    folds = parts(examples, [1 / FOLDS] * FOLDS)
    unseen = []
    for left_out in folds:
        others = NaiveBayes(example for fold in folds if fold is not left_out for example in fold)
        unseen += [others(example.text) for example in left_out]
    found = NaiveBayes(examples)
    found.prior -= median(unseen)
    return found


def vader() -> Callable[[str], float] | None:
    """VADER's compound score of a sentence; None, said aloud, where the package is not there."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        print("vaderSentiment is not installed: the second judge is left out", flush=True)
        return None
    analyser = SentimentIntensityAnalyzer()
    return lambda sentence: analyser.polarity_scores(sentence)["compound"]


def called_positive(
    judge: Callable[[str], float], examples: Sequence[Labelled], name: str
) -> dict[str, float]:
    """The share that a judge is right about, and those of positive and negative ones called positive."""
    said = [(judge(example.text) > 0, bool(example.label)) for example in examples]
    found = {f"{name}_accuracy": sum(one == other for one, other in said) / len(said)}
    for label, kind in ((True, "positive"), (False, "negative")):
        own = [one for one, other in said if other is label]
        found[f"{name}_on_{kind}"] = sum(own) / len(own)
    return found
