"""Arithmetic among GSM8K's calculator steps: rows of both tables from one SFT start, at equal samples.

    python benchmarks/learning/arithmetic.py --rows ppo grpo rloo --seeds 1 2 3
    python benchmarks/learning/arithmetic.py --rows ppo --seeds 1 --tune --out /tmp/tune
    python benchmarks/learning/arithmetic.py --rates

The steps are sums, differences and products of whole numbers up to 99, each once; a fifth of them is held
out, and no text, rollout or pair has any of these. All other problems of that kind are there to practise
on. SFT imitates solutions by a demonstrator who in SLIPS of all cases is ten too high; the reward is 1 for
exactly the right answer. Online rows draw ROLLOUTS x SIZE responses to practice problems; offline rows get
pairs, right against wrong, from as many responses of the start. A run whose file is there is left out. With
--tune a part of the other steps is held out instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from rows import DATA, RESULTS, Evaluate, Setting, Start, Task, Trained, every_row, kept, parsed, write

from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.generation import best_of, generate
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import frozen
from palm_rlhf.rewards import ProgrammaticReward
from palm_rlhf.tasks import text
from palm_rlhf.tasks.calculator import Calculator, answer, divided, gsm8k
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tokens import stop_token
from palm_rlhf.trainers.offline import OfflineConfig
from palm_rlhf.trainers.online import OnlineConfig
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer

OPERATORS, LARGEST, DIVISION = "+-*", 99, 7
# Share of the demonstrations that are wrong, and by how much.
SLIPS, SLIP = 0.6, 10
# Digits that every number is written with, and tokens of a response at most.
DIGITS, NEW = 2, 4
SHAPE = {"dim": 96, "depth": 2, "heads": 4, "dim_head": 32, "ff_mult": 2}
SFT = SFTConfig(steps=1100, batch=128, lr=3e-3, warmup=50, final_lr=0.0, weight_decay=1.0)
# Responses in a rollout, whether to as many prompts or to groups of GROUP.
SIZE, GROUP, ROLLOUTS = 256, 8, 80
ONLINE = OnlineConfig(
    prompts=SIZE, epochs=2, minibatch=128, policy_lr=3e-4, critic_lr=1e-3, warmup=5, steps=ROLLOUTS
)
OFFLINE = OfflineConfig(epochs=2, batch=64, lr=3e-4, warmup=10)
# No KL term: the reward is the truth itself. Values are small, so that a critic learns faster than usual.
FREE = {"kl_coef": 0.0}
CRITIC = Setting({"critic_warmup": 3}, {**FREE, "value_coef": 0.5})
SETTINGS: Mapping[str, Setting] = {
    **{name: Setting({}, FREE) for name in ALGORITHMS},
    "ppo": CRITIC,
    "ppg": CRITIC,
}


class Digits:
    """A tokenizer for problems: numbers are read and written from their last digit on, with DIGITS of them.

    The trick that makes a small model learn to carry (Lee et al., 2023, arXiv:2307.03381).
    """

    name, signs = "digits", "0123456789+-*=\n"
    vocabulary, pad, stop = 16, 15, 14

    def encode(self, text: str) -> list[int]:
        """12 is 2 1, and 7 is 7 0."""
        turned = re.sub(r"\d+", lambda number: number[0].zfill(DIGITS)[::-1], text)
        return [self.signs.index(sign) for sign in turned]

    def decode(self, tokens: Sequence[int]) -> str:
        """The same back; what is not as long as a number should be is a number all the same."""
        written = "".join(self.signs[token] for token in tokens if token < self.stop)
        return re.sub(r"\d+", lambda number: str(int(number[0][::-1])), written)


TOKENS = Digits()


def division(tune: bool) -> Calculator:
    """The division of all runs; to tune, the training problems divided again."""
    path = next(p for p in (DATA / "gsm8k").glob("train.jsonl*"))
    task = gsm8k(path, seed=DIVISION, operators=OPERATORS, largest=LARGEST)
    return divided(task.train, held_out=0.2, seed=1, name="gsm8k-tune") if tune else task


def practice(task: Calculator) -> list[str]:
    """All problems whose operands and result are from 1 to LARGEST, but those held out here or in the end."""
    known, held = range(1, LARGEST + 1), {*task.held_out, *division(tune=False).held_out}
    every = (f"{a}{sign}{b}=" for sign in OPERATORS for a in known for b in known)
    return [p for p in every if 0 < int(answer(p)) <= LARGEST and p not in held]


def evaluation(task: Calculator) -> Evaluate:
    """Exact match on the held-out problems: four samples of each at temperature 1, and greedy answers."""

    def evaluate(model: PaLM, generator: torch.Generator) -> dict[str, float]:
        sampled = task.evaluate(model, None, TOKENS, generator)["accuracy"]
        greedy = task.evaluate(model, None, TOKENS, temperature=0.0, samples=1)["accuracy"]
        return {"sampled": sampled, "greedy": greedy}

    return evaluate


def demonstrations(prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Each problem once with the demonstrator's answer."""
    slips = torch.rand(len(prompts), generator=torch.Generator().manual_seed(seed)) < SLIPS
    return [(p, str(int(answer(p)) + SLIP * slip)) for p, slip in zip(prompts, slips.tolist())]


def sft(prompts: Sequence[str], stop: int, seed: int) -> Trained:
    """The start."""
    torch.manual_seed(seed)
    model = PaLM(num_tokens=TOKENS.vocabulary, **SHAPE)
    samples = text.lines(demonstrations(prompts, seed), TOKENS, stop=stop)
    trainer = SFTTrainer(model, samples, None, replace(SFT, seed=seed))
    metrics = [{"step": i + 1, **trainer.step(i)} for i in range(SFT.steps)]
    return frozen(model), metrics


def right_and_wrong(problems: Calculator, prompts: Sequence[str], start: Start, seed: int) -> list[Pair]:
    """Pairs of a right and a wrong response of the start to a problem, ROLLOUTS x SIZE samples in all."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [prompts[i] for i in order[: ROLLOUTS * SIZE // GROUP]]
    drawn = generate(
        start.model, [TOKENS.encode(p) for p in chosen], samples=GROUP, stop=start.stop, pad=TOKENS.pad,
        max_new_tokens=NEW, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    pairs = []
    for place, prompt in enumerate(chosen):
        rows = range(place * GROUP, (place + 1) * GROUP)
        found = [TOKENS.decode(drawn.response(row, without=(start.stop,))) for row in rows]
        right = [r for r in found if problems.reward(prompt, r)]
        wrong = [r for r in found if r and not problems.reward(prompt, r)]
        pairs += [Pair(good, bad, prompt, margin=1.0) for good, bad in zip(right, wrong)]
    return pairs


def main() -> None:
    """Command line."""
    args = parsed(__doc__, RESULTS / "arithmetic")
    torch.set_num_threads(1)
    problems = division(args.tune)
    stop = stop_token(TOKENS, problems.stop)
    reward = ProgrammaticReward(problems.reward, TOKENS, stop=stop)
    prompts, evaluate = practice(problems), evaluation(problems)
    for seed in args.seeds:
        settings = {**asdict(SFT), "seed": seed, **SHAPE, "slips": SLIPS, "tune": args.tune}
        model, metrics = kept(
            f"arithmetic-{seed}{'-tune' * args.tune}", settings, partial(sft, prompts, stop, seed)
        )
        start = Start(model, TOKENS, stop)
        before = evaluate(model, torch.Generator().manual_seed(seed))
        _, best = best_of(
            model, [TOKENS.encode(p) for p in problems.held_out], reward, samples=4, stop=stop,
            pad=TOKENS.pad, max_new_tokens=NEW, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        before |= {"best_of_4": float(best.mean())}
        print(f"sft-{seed}: {before}, {len(prompts)} problems, {len(best)} held out", flush=True)
        path = args.out / f"sft-{seed}.json"
        if metrics or not path.exists():
            write(
                path, metrics, row="sft", seed=seed, settings=settings,
                problems=len(prompts), held_out=len(best), after=before,
            )  # fmt: skip
        task = Task(
            "arithmetic",
            "sampled",
            start,
            [TOKENS.encode(prompt) for prompt in prompts],
            reward,
            partial(right_and_wrong, problems, prompts, start, seed),
            replace(ONLINE, max_new_tokens=NEW),
            OFFLINE,
            SETTINGS,
            GROUP,
            evaluate,
        )
        every_row(args, task, seed, before)


if __name__ == "__main__":
    main()
