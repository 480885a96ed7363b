"""gae in plain PyTorch: a scan by doubling, log2(T) steps on whole tensors instead of T on columns."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def scan(a: Tensor | float, b: Tensor) -> Tensor:
    """y_t = b_t + a_t * y_(t+1) along the rows of [B, T], with y_T = 0."""
    reach = 1  # b_t holds what the steps t .. t + reach - 1 add to y_t, a_t the product of theirs
    while reach < b.shape[1] and not (isinstance(a, float) and a == 0):
        here, there = slice(None, -reach), slice(reach, None)
        if isinstance(a, float):
            joined = torch.add(b[:, here], b[:, there], alpha=a)
            a = a * a
        else:
            joined = torch.addcmul(b[:, here], a[:, here], b[:, there])
            a = torch.cat((a[:, here] * a[:, there], a[:, -reach:]), 1)
        b = torch.cat((joined, b[:, -reach:]), 1)
        reach *= 2
    return b


def following(values: Tensor, mask: Tensor | None, next_value: Tensor | None) -> Tensor:
    """The value after each step: the next one's, or the next real one's where there is a mask."""
    last = values.new_zeros(values.shape[0]) if next_value is None else next_value
    shifted = torch.cat((values, last[:, None]), 1)
    if mask is not None:
        shifted = scan(torch.nn.functional.pad(~mask, (0, 1)).to(values.dtype), shifted)
    return shifted[:, 1:]


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
) -> tuple[Tensor, Tensor]:
    """Temporal-difference errors in one go, then their scan; 16-bit inputs are computed in float32."""
    dtype = rewards.dtype
    if dtype not in (torch.float32, torch.float64):
        next_value = None if next_value is None else next_value.float()
        rewards, values = rewards.float(), values.float()
    if mask is not None:
        rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    if next_value is not None and next_value.dim() == 2:
        follows = next_value if mask is None else next_value.masked_fill(~mask, 0)
    else:
        follows = following(values, mask if carry else None, next_value)
    if done is not None:
        follows = follows.masked_fill(done, 0)
    delta = torch.add(rewards, follows, alpha=gamma) - values

    decay: Tensor | float = float(gamma * lam)
    passed = mask if carry else None
    if done is not None or truncated is not None or passed is not None:
        decay = torch.full_like(rewards, decay)
        for flag in (done, truncated):
            decay = decay if flag is None else decay.masked_fill(flag, 0)
    if passed is not None:
        delta, decay = delta.masked_fill(~passed, 0), decay.masked_fill(~passed, 1)
    advantages = scan(decay, delta)
    return advantages.to(dtype), (advantages + values).to(dtype)


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    truncated: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
) -> tuple[Tensor, Tensor]:
    """The plain form with the public function's signature."""
    return forward(rewards, values, mask, done, truncated, next_value, gamma, lam, mask_mode == "carry")
