"""palm-rlhf-pytorch's RLHFTrainer as it is, patched and not: a cache for generation, and the block's kernels.

    python examples/patch_palm_rlhf_pytorch.py

Needs palm-rlhf-pytorch 0.8.0, or `make peers` in a checkout.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings

import torch

import rlhf_kernels
from rlhf_kernels import stacks

stacks.activate()  # the peers of a checkout; has no effect where the package is installed


def train() -> float:
    """Seconds of two rollouts of 64 tokens and a PPO update on them."""
    from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

    torch.manual_seed(0)
    palm = PaLM(dim=64, num_tokens=256, depth=2)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=RewardModel(palm, num_binned_output=5),
        prompt_token_ids=torch.randint(1, 256, (4, 8)),
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train(num_episodes=1, max_timesteps=2, update_timesteps=2, max_seq_len=64)
    return time.perf_counter() - began


def main() -> None:
    """Prints what is replaced, and the time of both."""
    warnings.simplefilter("ignore")
    from palm_rlhf_pytorch import PaLM

    torch.manual_seed(0)
    palm, prompt = PaLM(dim=64, num_tokens=256, depth=2), torch.randint(1, 256, (2, 8))
    torch.manual_seed(1)
    theirs = palm.generate(64, prompt=prompt)
    before = train()
    with rlhf_kernels.patch("palm_rlhf_pytorch") as patched:
        print(patched)
        torch.manual_seed(1)
        ours = palm.generate(64, prompt=prompt)
        after = train()
    same = float((ours == theirs).float().mean())
    print(f"tokens drawn alike: {same:.0%}; rollouts and an update {before:.2f} -> {after:.2f} s")
    assert same == 1.0


if __name__ == "__main__":
    main()
