"""gae by the compiled kernels: C++ with rows in vector lanes on the CPU, a parallel scan in CUDA on a GPU."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.runtime.native import operator

GRAIN = 32768

_gae = operator("gae")
_general = operator("gae_general")
backward = operator("gae_backward")


def forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    done: Tensor | None,
    truncated: Tensor | None,
    next_value: Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
    grain: int = GRAIN,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; `grain` elements are worth a thread of their own."""
    if carry and done is None and truncated is None and next_value is None:
        return _gae(rewards, values, mask, gamma, lam, grain)
    return _general(rewards, values, mask, done, truncated, next_value, gamma, lam, carry, grain)
