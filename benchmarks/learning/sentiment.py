"""Continuations of SST-2 sentences made positive: a reward model, a judge, rows of both tables.

    python benchmarks/learning/sentiment.py --rows ppo grpo rloo --seeds 1 2 3
    python benchmarks/learning/sentiment.py --rows ppo --seeds 1 --tune --out /tmp/tune
    python benchmarks/learning/sentiment.py --rates

The training sentences are divided: the reward, networks and naive Bayes together, learns from one part, the
judge, naive Bayes, from the other; so neither the policy nor its reward has seen the judge or its labels. The
language model has read all of them, without labels. Rows continue the first words of training sentences and
are rewarded by the probability of `positive`; the judge reads whole sentences that begin as sentences of the
development set do, half of them positive ones. So does VADER, where `vaderSentiment` is installed. With
--tune a tenth of the training sentences stands for the development set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import judges
import torch
from rows import (
    DATA,
    RESULTS,
    Evaluate,
    Setting,
    Start,
    Task,
    Trained,
    every_row,
    kept,
    learned_tokenizer,
    parsed,
    write,
)

from palm_rlhf.algorithms.estimators import response_kl
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.evaluate import distinct
from palm_rlhf.generation import Generation, best_of, generate
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy, frozen
from palm_rlhf.rewards import Ensemble
from palm_rlhf.rollout import Rollout
from palm_rlhf.tasks import text
from palm_rlhf.tasks.pairs import Labelled, Pair
from palm_rlhf.tasks.sentiment import parts, read_sst2
from palm_rlhf.tokens import Tokenizer
from palm_rlhf.trainers.offline import OfflineConfig
from palm_rlhf.trainers.online import OnlineConfig
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer

# Words of a sentence that are its prompt, tokens that a continuation may have, and prompts that judge.
WORDS, NEW, JUDGED = 3, 20, 400
VOCABULARY = 4000
LONGEST = 22  # words of the sentences that the language model reads
SHARES = (0.6, 0.4)  # of the reward model and of the judge
SHAPE = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "ff_mult": 4}
SFT = SFTConfig(steps=300, batch=32, lr=3e-3, warmup=50, final_lr=0.0, weight_decay=0.5)
SIZE, GROUP, ROLLOUTS = 64, 8, 120
ONLINE = OnlineConfig(
    prompts=SIZE, max_new_tokens=NEW, epochs=2, minibatch=32, policy_lr=7e-4, critic_lr=1e-3, warmup=3,
    steps=ROLLOUTS,
)  # fmt: skip
OFFLINE = OfflineConfig(epochs=2, batch=32, lr=3e-4, warmup=10)
# In the reward, whose scale is 1: in the loss, a policy finds what the reward model overrates.
HELD = {"kl_coef": 0.02, "kl_in": "reward", "kl": "k1", "kl_target": 7.5, "kl_horizon": 640.0}
CRITIC = Setting({"critic_warmup": 2}, {**HELD, "value_coef": 0.5})
# Under which name a judge's share of positive sentences is written.
PLACES = {"judge": "positive", "vader": "positive_by_vader"}
SETTINGS: Mapping[str, Setting] = {
    **{name: Setting({}, HELD) for name in ALGORITHMS},
    "ppo": CRITIC,
    "ppg": CRITIC,
    # It takes no negative scores, which a divergence in the reward makes.
    "maxrl": Setting({}, {**HELD, "kl_in": "loss", "kl": "k2"}),
}


@dataclass(frozen=True)
class World:
    """What all runs of a seed share."""

    start: Start
    reward: Ensemble
    judges: dict[str, Callable[[str], float]]
    prompts: list[list[int]]
    judged: list[list[int]]
    facts: dict[str, Any]
    metrics: list[dict[str, float]]


def beginnings(examples: Sequence[Labelled], tokens: Tokenizer) -> list[list[int]]:
    """The first words of every sentence that has more, each beginning once."""
    split = (example.text.split() for example in examples)
    return [tokens.encode(b) for b in dict.fromkeys(" ".join(w[:WORDS]) for w in split if len(w) > WORDS)]


def language_model(train: Sequence[Labelled], tokens: Tokenizer, seed: int) -> Trained:
    """The start: it has read the training sentences, but a twentieth of them."""
    torch.manual_seed(seed)
    model = PaLM(num_tokens=tokens.vocabulary, **SHAPE)
    short = (example.text for example in train if len(example.text.split()) <= LONGEST)
    read, unread = text.lines(short, tokens).divided(0.05)
    trainer = SFTTrainer(model, read, unread, replace(SFT, seed=seed))
    metrics = [{"step": i + 1, **trainer.step(i)} for i in range(SFT.steps)]
    return frozen(model), metrics


def world(seed: int, tune: bool) -> World:
    """Language model, reward model and judge; to tune, a tenth of the training sentences stands for dev."""
    train = read_sst2(DATA / "sst2" / "train.tsv")
    train, dev = parts(train, (0.9, 0.1), 1) if tune else (train, read_sst2(DATA / "sst2" / "dev.tsv"))
    for_reward, for_judge = parts(train, SHARES, 0)
    tokens = learned_tokenizer([example.text for example in train], VOCABULARY)
    settings = {**asdict(SFT), "seed": seed, **SHAPE, "vocabulary": VOCABULARY, "tune": tune}
    model, metrics = kept(
        f"sentiment-{seed}{'-tune' * tune}", settings, partial(language_model, train, tokens, seed)
    )
    scorer = judges.reward(for_reward, tokens, seed)
    together, each = judges.reward_accuracy(scorer, dev, tokens)
    facts = {
        "reward_accuracy": together, "members": each, "reward_examples": len(for_reward),
        "judge_examples": len(for_judge), "dev": len(dev),
    }  # fmt: skip
    who = {"judge": judges.judge(for_judge), "vader": judges.vader()}
    who = {name: judge for name, judge in who.items() if judge is not None}
    for name, judge in who.items():
        facts |= judges.called_positive(judge, dev, name)
    return World(
        Start(model, tokens, tokens.stop),
        scorer,
        who,
        beginnings(train, tokens),
        judged_by(dev, tokens),
        facts,
        metrics,
    )


def judged_by(dev: Sequence[Labelled], tokens: Tokenizer) -> list[list[int]]:
    """JUDGED beginnings, half of them of positive sentences."""
    halves = ([example for example in dev if example.label == label] for label in (1, 0))
    return [prompt for half in halves for prompt in beginnings(half, tokens)[: JUDGED // 2]]


def sentences(drawn: Generation, tokens: Tokenizer, whole: bool = True) -> list[str]:
    """Prompt and continuation, or the continuation alone."""
    rows = range(len(drawn.tokens))
    return [tokens.decode([*(drawn.prompt(r) if whole else ()), *drawn.response(r)]) for r in rows]


@torch.no_grad()
def measured(w: World, drawn: Generation) -> dict[str, float]:
    """What the judge finds, and how far the policy is from the start, on these samples."""
    reference = Policy(w.start.model)(drawn.tokens, drawn.mask, drawn.prompt_width)[0]
    rollout = Rollout(drawn, 1.0, torch.zeros(len(drawn.tokens)), reference_logprob=reference)
    whole = sentences(drawn, w.start.tokenizer)
    said = {name: [judge(sentence) > 0 for sentence in whole] for name, judge in w.judges.items()}
    return {
        **{PLACES[name]: sum(found) / len(found) for name, found in said.items()},
        "reward": float(w.reward(drawn).mean()),
        "kl": float(response_kl(rollout).mean()),
        "distinct_2": distinct(sentences(drawn, w.start.tokenizer, whole=False), 2),
        "tokens": float(drawn.response_mask.sum(1).float().mean()),
    }


def evaluation(w: World) -> Evaluate:
    """One sample at temperature 1 for each beginning that judges."""

    def evaluate(model: PaLM, generator: torch.Generator) -> dict[str, float]:
        drawn = generate(
            model, w.judged, max_new_tokens=NEW, stop=w.start.stop, pad=w.start.tokenizer.pad,
            generator=generator,
        )  # fmt: skip
        return measured(w, drawn)

    return evaluate


@torch.no_grad()
def best_and_worst(w: World, seed: int) -> list[Pair]:
    """Of GROUP responses of the start to a beginning the best and the worst; ROLLOUTS x SIZE samples."""
    tokens = w.start.tokenizer
    order = torch.randperm(len(w.prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = generate(
        w.start.model, [w.prompts[i] for i in order[: ROLLOUTS * SIZE // GROUP]], max_new_tokens=NEW,
        samples=GROUP, stop=w.start.stop, pad=tokens.pad, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    scores = w.reward(drawn).view(-1, GROUP)
    pairs = []
    for row, group in enumerate(scores):
        best, worst = (row * GROUP + int(i) for i in (group.argmax(), group.argmin()))
        chosen, rejected = (tokens.decode(drawn.response(i)) for i in (best, worst))
        if chosen and rejected and chosen != rejected:
            prompt = tokens.decode(drawn.prompt(best))
            pairs.append(Pair(chosen, rejected, prompt, float(group.max() - group.min())))
    return pairs


def main() -> None:
    """Command line."""
    args = parsed(__doc__, RESULTS / "sentiment")
    torch.set_num_threads(1)
    for seed in args.seeds:
        w = world(seed, args.tune)
        evaluate = evaluation(w)
        before = evaluate(w.start.model, torch.Generator().manual_seed(seed))
        best, _ = best_of(
            w.start.model, w.judged, w.reward, samples=4, max_new_tokens=NEW, stop=w.start.stop,
            pad=w.start.tokenizer.pad, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        best = measured(w, best)
        print(f"sft-{seed}: {before}, best of 4: {best}, {w.facts}", flush=True)
        path = args.out / f"sft-{seed}.json"
        if w.metrics or not path.exists():
            write(
                path, w.metrics, row="sft", seed=seed, settings=asdict(SFT) | SHAPE,
                reward_settings=asdict(judges.CONFIG) | judges.SHAPE, after=before, best_of_4=best, **w.facts,
            )  # fmt: skip
        pairs = partial(best_and_worst, w, seed)
        task = Task(
            "sentiment", "positive", w.start, w.prompts, w.reward, pairs, ONLINE, OFFLINE, SETTINGS, GROUP,
            evaluate,
        )  # fmt: skip
        every_row(args, task, seed, before)


if __name__ == "__main__":
    main()
