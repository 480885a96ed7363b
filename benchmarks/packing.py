"""Log-probabilities of responses, forward and backward, with padding against packed, in turns.

`python benchmarks/packing.py` prints a row for each size: width, rows, longest prompt and response (tokens),
share of real tokens, milliseconds of both, the ratio of the fastest; `rule` is what `packed=None` chooses.
Then the share of padding in batches of 64 texts as bytes: GSM8K's products with their answers, and SST-2's
sentences behind their first five words (data in $PALM_RLHF_DATA, else beside the checkout).
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import torch

from palm_rlhf.models.packing import pays, set_packed
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy
from palm_rlhf.tasks.calculator import answer, gsm8k
from palm_rlhf.tasks.sentiment import read_sst2

# Width, vocabulary, rows, longest prompt, longest response, shortest over longest.
CASES = (
    (64, 257, 64, 8, 4, 0.4),
    (128, 257, 16, 32, 48, 0.3),
    (256, 257, 16, 8, 8, 0.3),
    (256, 257, 16, 32, 48, 0.3),
    (256, 257, 16, 32, 48, 0.9),
    (256, 20000, 8, 32, 48, 0.3),
)
TURNS = 6
DATA = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[1] / "../shared/data"))


def batch(rows: int, prompt: int, response: int, shortest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask; lengths are uniform between the shortest and the longest."""
    draw = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(max(1, int(n * shortest)), n + 1, (rows, 1), generator=draw) for n in (prompt, response)
    )
    columns = torch.arange(prompt + response)
    mask = (columns >= prompt - left) & (columns < prompt + right)
    return torch.randint(1, 257, mask.shape, generator=draw), mask


def padding(lengths: list[tuple[int, int]], rows: int = 64, batches: int = 50) -> float:
    """Mean share of padding where prompts are padded to the longest of a batch, and responses as well."""
    draw, found = random.Random(0), []
    for _ in range(batches):
        taken = draw.sample(lengths, rows)
        whole = rows * sum(max(side) for side in zip(*taken))
        found.append(1 - sum(map(sum, taken)) / whole)
    return sum(found) / batches


def data() -> dict[str, list[tuple[int, int]]]:
    """Bytes of prompts and responses, where the data are."""
    found = {}
    if (file := DATA / "gsm8k" / "train.jsonl.gz").is_file():
        found["gsm8k"] = [(len(p), len(answer(p)) + 1) for p in gsm8k(file).train]
    if (file := DATA / "sst2" / "dev.tsv").is_file():
        words = [each.text.split(" ") for each in read_sst2(file)]
        split = [(" ".join(text[:5]), " ".join(text[5:])) for text in words if len(text) > 5]
        found["sst2"] = [(len(prompt), len(response) + 2) for prompt, response in split]
    return found


def main() -> None:
    """Prints the table."""
    print("width  rows  prompt  response  real  padded ms  packed ms  ratio  rule")
    for width, vocabulary, rows, prompt, response, shortest in CASES:
        torch.manual_seed(0)
        policy = Policy(PaLM(dim=width, num_tokens=vocabulary, depth=2, heads=4))
        tokens, mask = batch(rows, prompt, response, shortest)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(TURNS):
            for packed, found in times.items():
                set_packed(packed, policy)
                began = time.perf_counter()
                logprob, entropy = policy(tokens, mask, prompt)
                (logprob.sum() + entropy.sum()).backward()
                found.append(time.perf_counter() - began)
        padded, packed = (1e3 * min(found) for found in times.values())
        rule = "packed" if pays(mask[:, :-1], policy.model) else "padded"
        print(
            f"{width:5}{rows:6}{prompt:8}{response:10}{mask.float().mean():6.2f}{padded:11.1f}{packed:11.1f}"
            f"{packed / padded:7.2f}  {rule}"
        )
    for name, lengths in data().items():
        print(f"{name}: {padding(lengths):.0%} of a batch is padding")


if __name__ == "__main__":
    main()
