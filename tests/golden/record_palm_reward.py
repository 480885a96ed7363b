"""Records reward models of palm-rlhf-pytorch: numbers and bins, with adapters and without.

    make peers && .peers/bin/python tests/golden/record_palm_reward.py

The state dict, as saved, is in the inputs as `weight.<name>`; Bins are recorded as
logits (`sample_from_bins=False`): by default that library gives a random bin.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[0])]

import torch  # noqa: E402
from golden.inputs import generator  # noqa: E402
from golden.palm import source  # noqa: E402
from golden.record import Book  # noqa: E402
from golden.record_palm import moved  # noqa: E402

SIZES = {"dim": 12, "num_tokens": 17, "depth": 2, "heads": 2, "dim_head": 6, "ff_mult": 2}
ROWS, STEPS = 3, 9


def record_palm_reward(book: Any) -> None:
    """Predictions and losses; of tokens alone, with prompts, and padded on the right."""
    from palm_rlhf_pytorch import PaLM, RewardModel

    tokens = torch.randint(1, SIZES["num_tokens"], (ROWS, STEPS), generator=generator(7))
    prompts, lengths = torch.tensor([2, 5, 1]), torch.tensor([9, 4, 7])
    for causal in (True, False):
        for bins, lora in ((0, False), (0, True), (5, False), (5, True)):
            torch.manual_seed(1)
            options = {"num_binned_output": bins, "use_lora": lora, "lora_r": 3, "sample_from_bins": False}
            model = moved(RewardModel(PaLM(**SIZES, causal=causal), **options))
            labels = torch.tensor([4, 0, 2]) if bins else torch.tensor([0.5, -1.0, 2.0])
            inputs = {"tokens": tokens, "labels": labels}
            inputs |= {f"weight.{name}": tensor for name, tensor in model.state_dict().items()}
            shown = {"prompt_lengths": prompts}
            extras = {
                "tokens": {},
                "all_true": {"mask": torch.ones(ROWS, STEPS, dtype=torch.bool)},
                "prompts": shown,
            }
            if causal:  # an encoder of theirs attends to the padding
                extras["padded"] = shown | {"mask": torch.arange(STEPS) < lengths[:, None]}

            def call(
                tokens: Any, labels: Any, model: Any = model, extras: Any = extras, **_: Any
            ) -> tuple[Any, ...]:
                found = [
                    model(tokens, labels=wanted, **extra)
                    for extra in extras.values()
                    for wanted in (None, labels)
                ]
                return tuple(tensor.detach() for tensor in found)

            names = tuple(f"{case}.{what}" for case in extras for what in ("pred", "loss"))
            given = {"prompt_lengths": prompts, "lengths": lengths}
            kind = (("encoder", "causal")[causal], "bins" if bins else "number", ("whole", "lora")[lora])
            book.add(source("reward.RewardModel.forward"), "/".join(kind), call, inputs | given,
                     SIZES | {"causal": causal} | options, outputs=names)  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    book = Book("palm_reward")
    record_palm_reward(book)
    book.save()
