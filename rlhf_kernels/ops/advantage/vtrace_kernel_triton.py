"""vtrace in Triton: affine maps of x = v - V, combined by gae's scan, block after block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.advantage.kernel_triton import (
    NUM_WARPS,
    at,
    flag,
    next_values,
    plane,
    tile,
    unsupported,
)
from rlhf_kernels.ops.advantage.vtrace_kernel_torch import backward, differentiable
from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.triton_lib import to_float32

__all__ = ["backward", "differentiable", "forward", "unsupported"]


@triton.jit
def _then_and_before(a1, b1, c1, d1, a2, b2, c2, d2):
    """x -> b + a x along some steps, and x -> d + c x, which leaves the earliest of them out. A factor of 0
    forgets even inf and NaN."""
    b = tl.where(a2 == 0, b2, b2 + a2 * b1)
    d = tl.where(c2 == 0, d2, d2 + c2 * b1)
    return a1 * a2, b, a1 * c2, d


@triton.jit
def vtrace_kernel(
    log_ratio_ptr, rewards_ptr, values_ptr, mask_ptr, done_ptr, last_ptr, targets_ptr, advantages_ptr,
    log_ratio_stride, rewards_stride, values_stride, mask_stride, done_stride, last_stride,
    n_rows, n_steps, gamma, decay, rho_clip, c_clip, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Targets and advantages from the last step to the first; decay is gamma * lam."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < n_rows
    x = tl.zeros((ROWS,), tl.float32)
    following = tl.zeros((ROWS,), tl.float32)
    if last_ptr is not None:
        following = to_float32(tl.load(last_ptr + row * last_stride, mask=there, other=0.0))
    n_blocks = tl.cdiv(n_steps, BLOCK)
    for i in range(0, n_blocks):
        start = (n_blocks - 1 - i) * BLOCK
        t = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (t < n_steps)
        more = there[:, None] & (t + 1 < n_steps)
        real = flag(mask_ptr, row[:, None] * mask_stride + t, inside, True)
        real_next = flag(mask_ptr, row[:, None] * mask_stride + t + 1, more, True)
        going = flag(done_ptr, row[:, None] * done_stride + t, inside, False) == 0
        ratio = tl.exp(
            to_float32(tl.load(log_ratio_ptr + row[:, None] * log_ratio_stride + t, mask=real, other=0.0))
        )
        reward = to_float32(tl.load(rewards_ptr + row[:, None] * rewards_stride + t, mask=real, other=0.0))
        value = to_float32(tl.load(values_ptr + row[:, None] * values_stride + t, mask=real, other=0.0))
        follows = next_values(
            values_ptr + row[:, None] * values_stride + t + 1, real_next, more, following, True
        )
        following = at(follows, t, start)
        rho = tl.where(ratio > rho_clip, rho_clip, ratio)
        c = tl.where(ratio > c_clip, c_clip, ratio)
        error = reward + gamma * tl.where(going, follows, 0.0) - value
        factor = tl.where(real, tl.where(going, decay * c, 0.0), 1.0)
        delta = tl.where(real, rho * error, 0.0)
        one = tl.full(factor.shape, 1.0, tl.float32)
        factor, scanned, before, rest = tl.associative_scan(
            (factor, delta, one, tl.zeros_like(delta)), 1, _then_and_before, reverse=True
        )
        x_next = tl.where(before == 0, rest, rest + before * x[:, None])
        scanned = tl.where(factor == 0, scanned, scanned + factor * x[:, None])
        x = at(scanned, t, start)
        advantage = rho * (error + gamma * tl.where(going, x_next, 0.0))
        out = row[:, None] * n_steps + t
        element = targets_ptr.dtype.element_ty
        tl.store(targets_ptr + out, tl.where(real, value + scanned, 0.0).to(element), mask=inside)
        tl.store(advantages_ptr + out, tl.where(real, advantage, 0.0).to(element), mask=inside)


def forward(
    log_ratio: Tensor, rewards: Tensor, values: Tensor, mask: Tensor | None, done: Tensor | None,
    next_value: Tensor | None, gamma: float, lam: float, rho_clip: float, c_clip: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Targets and advantages."""
    rows, steps = values.shape
    targets = torch.empty((rows, steps), dtype=values.dtype, device=values.device)
    advantages = torch.empty_like(targets)
    tensors, strides = zip(*map(plane, (log_ratio, rewards, values, mask, done)))
    last_stride = 0 if next_value is None else next_value.stride(0)
    tile_rows, block = tile(steps)
    launch(
        vtrace_kernel, (cdiv(rows, tile_rows) if steps else 0,), values,
        *tensors, next_value, targets, advantages, *strides, last_stride,
        rows, steps, gamma, gamma * lam, rho_clip, c_clip,
        ROWS=tile_rows, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return targets, advantages
