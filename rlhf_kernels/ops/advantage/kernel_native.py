"""gae by the compiled kernels: C++ with rows in vector lanes on the CPU, a parallel scan in CUDA on a GPU."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.runtime.native import operator

_common = operator("gae_common")
_gae = operator("gae")
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
    grain: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; `grain` elements are worth a thread of their own.

    What is at its default is left out: the dispatcher spends 0.2 us on reading each argument.
    """
    if done is None and truncated is None and next_value is None and (carry or mask is None):
        if grain is not None:
            return _common(rewards, values, gamma, lam, mask, grain)
        return (
            _common(rewards, values, gamma, lam, mask)
            if mask is not None
            else _common(rewards, values, gamma, lam)
        )
    given = (rewards, values, mask, done, truncated, next_value, gamma, lam, carry)
    return _gae(*given) if grain is None else _gae(*given, grain)
