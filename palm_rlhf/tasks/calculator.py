"""Arithmetic with one right answer: `12*7=` is to be answered with `84`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from palm_rlhf.generation import generate
from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.tasks.text import read_text
from palm_rlhf.tokens import Tokenizer, prompt_ids, stop_token

# Problems answered at a time.
_BATCH = 512
_STEP = re.compile(r"<<\s*(\d+)\s*([-+*])\s*(\d+)\s*=\s*(\d+)\s*>>")
_PROMPT = re.compile(r"(\d+)([-+*])(\d+)=")
OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


@dataclass(frozen=True)
class Calculator:
    """Problems, divided into those that are trained on and those that judge.

    Attributes:
        train: prompts such as "12*7=".
        held_out: prompts that no text and no rollout contains.
        name: for tables.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    name: str = "calculator"
    # What ends an answer.
    stop: str = "\n"
    # Bytes of the longest answer and the stop, or more.
    max_new_tokens: int = 8

    @property
    def solved(self) -> tuple[tuple[str, str], ...]:
        """The training problems with their answers, to imitate."""
        return tuple((prompt, answer(prompt)) for prompt in self.train)

    @staticmethod
    def reward(prompt: str, response: str) -> float:
        """1 for the exact answer, else 0."""
        return float(response == answer(prompt))

    def evaluate(
        self,
        model: CausalModel,
        scope: str | None,
        tokenizer: Tokenizer,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        samples: int = 4,
    ) -> dict[str, float]:
        """Share of right answers to the held-out problems, over so many samples of each."""
        stop = stop_token(tokenizer, self.stop)
        right = 0.0
        for start in range(0, len(self.held_out), _BATCH):
            prompts = self.held_out[start : start + _BATCH]
            asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
            drawn = generate(
                model, asked, max_new_tokens=self.max_new_tokens, stop=stop, temperature=temperature,
                generator=generator, scope=scope, pad=tokenizer.pad, samples=samples,
            )  # fmt: skip
            for row in range(len(drawn.tokens)):
                response = tokenizer.decode(drawn.response(row, without=(stop,)))
                right += self.reward(prompts[row // samples], response)
        return {"accuracy": right / (len(self.held_out) * samples)}


def answer(prompt: str) -> str:
    """The right response to a prompt; ValueError for one that is no sum, difference or product."""
    found = _PROMPT.fullmatch(prompt)
    if not found:
        raise ValueError(f"a calculator's prompt looks like '12*7=', '12+7=' or '12-7=', got {prompt!r}")
    return str(OPERATORS[found[2]](int(found[1]), int(found[3])))


def products(first: int = 299, second: int = 4, *, held_out: float = 0.2, seed: int = 0) -> Calculator:
    """All products of numbers from 1 to `first` and from 1 to `second`, a share of them held out.

    Raises:
        ValueError: a bound is below 1, or the problems are too few to divide.
    """
    if first < 1 or second < 1:
        raise ValueError(f"the calculator's factors reach at least 1, got {first} and {second}")
    problems = [f"{a}*{b}=" for a in range(1, first + 1) for b in range(1, second + 1)]
    return divided(problems, held_out=held_out, seed=seed)


def gsm8k(
    path: str | Path,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    operators: str = "*",
    largest: int | None = None,
) -> Calculator:
    """The calculator steps `<<a*b=c>>` in GSM8K's solutions; fractions are left out, and wrong ones.

    Cobbe et al., 2021, arXiv:2110.14168.

    Args:
        path: GSM8K's train.jsonl, gzipped or not.
        held_out: share of the problems that judge. seed: of the division.
        operators: which steps are taken, of "+-*".
        largest: of operands and results; None: any.

    Raises:
        ValueError: an operator is not among those, or the file has no such steps.
    """
    if not operators or set(operators) - OPERATORS.keys():
        raise ValueError(f"operators are of {''.join(OPERATORS)!r}, got {operators!r}")
    prompts = []
    for first, sign, second, result in _STEP.findall(read_text(path)):
        a, b, c = int(first), int(second), int(result)
        if sign in operators and OPERATORS[sign](a, b) == c and (largest is None or max(a, b, c) <= largest):
            prompts.append(f"{a}{sign}{b}=")
    if not prompts:
        raise ValueError(f"{path} has no calculator steps such as <<12*7=84>>. Is it GSM8K's train.jsonl?")
    return divided(prompts, held_out=held_out, seed=seed, name="gsm8k")


def divided(prompts: Iterable[str], *, held_out: float, seed: int, name: str = "calculator") -> Calculator:
    """Each problem once, in an order that depends on the seed alone; no problem is on both sides."""
    unique: Sequence[str] = sorted(set(prompts))
    count = round(len(unique) * held_out)
    if not 0 < count < len(unique):
        raise ValueError(
            f"held_out={held_out} of {len(unique)} problems leaves one side empty. Choose another share."
        )
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [unique[i] for i in order]
    longest = max(len(answer(prompt)) for prompt in unique)
    return Calculator(
        tuple(shuffled[count:]), tuple(shuffled[:count]), name, max_new_tokens=max(8, longest + 1)
    )
