"""verl's advantages of a batch, patched and not: the same numbers, whitening and masks included.

    python examples/patch_verl.py

Needs verl, or `make peers` in a checkout.
"""

from __future__ import annotations

import time

import torch

import rlhf_kernels
from rlhf_kernels import stacks

stacks.activate()  # the peers of a checkout; has no effect where verl is installed


def main() -> None:
    """Prints what is replaced, the largest difference, and the time of both."""
    from verl.trainer.ppo import core_algos

    rewards, values = torch.randn(2, 64, 1024)
    mask = (torch.arange(1024) < torch.randint(1, 1025, (64, 1))).long()

    def advantages() -> tuple[torch.Tensor, float]:
        core_algos.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)
        began = time.perf_counter()
        found, _ = core_algos.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)
        return found, time.perf_counter() - began

    theirs, before = advantages()
    with rlhf_kernels.patch("verl") as patched:
        print(patched)
        ours, after = advantages()
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"advantages [64, 1024]: difference {error:.1e}, {before * 1e3:.1f} -> {after * 1e3:.2f} ms")
    assert error < 1e-5


if __name__ == "__main__":
    main()
