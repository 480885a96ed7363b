"""gae in Triton: affine maps of the state, combined by an associative scan along T, block after block.

A program takes ROWS rows; tile and order of combination depend on T alone, so a row's bits do not depend on
the batch around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.triton_lib import to_float32

MAX_BLOCK = 1024
TILE = 256  # steps of short rows are gathered until a program has this many
NUM_WARPS = 4


def unsupported(device: str, dtype: torch.dtype, shape_class: object) -> str | None:
    """Scalar arguments of a Triton kernel are float32, too coarse a gamma for float64."""
    return "no float64" if dtype == torch.float64 else None


@triton.jit
def _then(a1, b1, a2, b2):
    """y -> b1 + a1 * y, then y -> b2 + a2 * y; a factor of 0 forgets even inf and NaN."""
    return a1 * a2, tl.where(a2 == 0, b2, b2 + a2 * b1)


@triton.jit
def _then_pair(c1, k1, m1, x1, n1, c2, k2, m2, x2, n2):
    """(x, n) -> (c x + x', k x + m n + n'), the first map applied first."""
    return c1 * c2, k2 * c1 + m2 * k1, m1 * m2, c2 * x1 + x2, k2 * x1 + m2 * n1 + n2


@triton.jit
def flag(ptr, offsets, inside, default: tl.constexpr):
    """A boolean per step; `default` where there is no tensor, False outside."""
    if ptr is None:
        found = inside if default else inside & False
    else:
        found = tl.load(ptr + offsets, mask=inside, other=0) != 0
    return found


@triton.jit
def at(x, cols, col):
    """Column `col` of a tile, one value for each row."""
    return tl.sum(tl.where(cols == col, x, 0.0), 1)


@triton.jit
def next_values(next_ptr, real_next, more, following, CARRY: tl.constexpr):
    """What follows each step of a tile: the value of the next one, or what passes over it."""
    next_value = to_float32(tl.load(next_ptr, mask=real_next, other=0.0))
    passes = tl.where(real_next if CARRY else more, 0.0, 1.0)
    passes, follows = tl.associative_scan((passes, next_value), 1, _then, reverse=True)
    return tl.where(passes == 0, follows, follows + passes * following[:, None])


@triton.jit
def traced(factor, delta, advantage):
    """The advantages of a tile before the steps whose first advantage is `advantage`."""
    factor, scanned = tl.associative_scan((factor, delta), 1, _then, reverse=True)
    return tl.where(factor == 0, scanned, scanned + factor * advantage[:, None])


@triton.jit
def traced_gradients(trace, to_next, passes, given, before, sent):
    """One scan forwards: x reaches a step's advantage, n what the steps before send to its value."""
    c, k, m, x, n = tl.associative_scan((trace, to_next, passes, given, tl.zeros_like(given)), 1, _then_pair)
    return x + c * before[:, None], n + (k * before[:, None] + m * sent[:, None])


@triton.jit
def gae_forward_kernel(
    rewards_ptr, values_ptr, mask_ptr, done_ptr, truncated_ptr, next_ptr, last_ptr,
    advantages_ptr, returns_ptr,
    rewards_stride, values_stride, mask_stride, done_stride, truncated_stride, next_stride, last_stride,
    n_rows, n_steps, gamma, decay, CARRY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages and returns from the last step to the first; decay is gamma * lam."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < n_rows
    advantage = tl.zeros((ROWS,), tl.float32)
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
        done = flag(done_ptr, row[:, None] * done_stride + t, inside, False)
        cut = done | flag(truncated_ptr, row[:, None] * truncated_stride + t, inside, False)
        reward = to_float32(tl.load(rewards_ptr + row[:, None] * rewards_stride + t, mask=real, other=0.0))
        value = to_float32(tl.load(values_ptr + row[:, None] * values_stride + t, mask=real, other=0.0))
        if next_ptr is not None:
            follows = to_float32(tl.load(next_ptr + row[:, None] * next_stride + t, mask=real, other=0.0))
        else:
            real_next = flag(mask_ptr, row[:, None] * mask_stride + t + 1, more, True)
            follows = next_values(
                values_ptr + row[:, None] * values_stride + t + 1, real_next, more, following, CARRY
            )
            following = at(follows, t, start)
        live = real if CARRY else inside
        delta = reward + gamma * tl.where(done, 0.0, follows) - value
        factor = tl.where(live, tl.where(cut, 0.0, decay), 1.0)
        scanned = traced(factor, tl.where(live, delta, 0.0), advantage)
        advantage = at(scanned, t, start)
        out = row[:, None] * n_steps + t
        element = advantages_ptr.dtype.element_ty
        tl.store(advantages_ptr + out, scanned.to(element), mask=inside)
        tl.store(returns_ptr + out, (scanned + value).to(element), mask=inside)


@triton.jit
def gae_backward_kernel(
    grad_ptr, grad_returns_ptr, mask_ptr, done_ptr, truncated_ptr,
    grad_rewards_ptr, grad_values_ptr, grad_next_ptr, grad_last_ptr,
    grad_stride, grad_returns_stride, mask_stride, done_stride, truncated_stride,
    n_rows, n_steps, gamma, decay, CARRY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One scan forwards; the position after the last step holds the gradient of the value that follows it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < n_rows
    before = tl.zeros((ROWS,), tl.float32)
    sent = tl.zeros((ROWS,), tl.float32)
    for start in range(0, n_steps + 1, BLOCK):
        t = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (t < n_steps)
        earlier = there[:, None] & (t >= 1) & (t <= n_steps)
        real_before = flag(mask_ptr, row[:, None] * mask_stride + t - 1, earlier, True)
        done_before = flag(done_ptr, row[:, None] * done_stride + t - 1, earlier, False)
        cut_before = done_before | flag(
            truncated_ptr, row[:, None] * truncated_stride + t - 1, earlier, False
        )
        grad = to_float32(tl.load(grad_ptr + row[:, None] * grad_stride + t, mask=inside, other=0.0))
        grad_return = to_float32(
            tl.load(grad_returns_ptr + row[:, None] * grad_returns_stride + t, mask=inside, other=0.0)
        )
        live_before = real_before if CARRY else earlier
        trace = tl.where(live_before, tl.where(cut_before, 0.0, decay), tl.where(earlier, 1.0, 0.0))
        to_next = tl.where(live_before & (done_before == 0), gamma, 0.0)
        if grad_next_ptr is not None:
            to_next = tl.zeros_like(to_next)
        passes = tl.where(live_before, 0.0, 1.0)
        x, n = traced_gradients(trace, to_next, passes, grad + grad_return, before, sent)
        before = at(x, t, start + BLOCK - 1)
        sent = at(n, t, start + BLOCK - 1)
        real = flag(mask_ptr, row[:, None] * mask_stride + t, inside, True)
        out = row[:, None] * n_steps + t
        element = grad_rewards_ptr.dtype.element_ty
        tl.store(grad_rewards_ptr + out, tl.where(real, x, 0.0).to(element), mask=inside)
        grad_value = tl.where(real, grad_return - x + n, 0.0)
        tl.store(grad_values_ptr + out, grad_value.to(element), mask=inside)
        if grad_next_ptr is not None:
            done = flag(done_ptr, row[:, None] * done_stride + t, inside, False)
            grad_next = tl.where(real & (done == 0), gamma * x, 0.0)
            tl.store(grad_next_ptr + out, grad_next.to(element), mask=inside)
        if grad_last_ptr is not None:
            at_end = there[:, None] & (t == n_steps)
            tl.store(grad_last_ptr + row[:, None] + t * 0, n.to(element), mask=at_end)


def tile(steps: int, elements: int = TILE) -> tuple[int, int]:
    """Rows and steps of a program's tile, by the number of steps alone."""
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(steps)))
    return max(1, elements // block), block


def plane(t: Tensor | None) -> tuple[Tensor | None, int]:
    """A [B, T] tensor with contiguous rows and its row stride; booleans as bytes."""
    if t is None:
        return None, 0
    t = t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()
    return (t.view(torch.uint8) if t.dtype == torch.bool else t), t.stride(0)


def forward(
    rewards: Tensor, values: Tensor, mask: Tensor | None, done: Tensor | None, truncated: Tensor | None,
    next_value: Tensor | None, gamma: float, lam: float, carry: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns."""
    rows, steps = rewards.shape
    advantages = torch.empty((rows, steps), dtype=rewards.dtype, device=rewards.device)
    returns = torch.empty_like(advantages)
    per_step = next_value if next_value is not None and next_value.dim() == 2 else None
    last = next_value if per_step is None else None
    tensors, strides = zip(*map(plane, (rewards, values, mask, done, truncated, per_step)))
    tile_rows, block = tile(steps)
    launch(
        gae_forward_kernel, (cdiv(rows, tile_rows) if steps else 0,), rewards,
        *tensors, last, advantages, returns, *strides, 0 if last is None else last.stride(0),
        rows, steps, gamma, gamma * lam, CARRY=carry, ROWS=tile_rows, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return advantages, returns


def backward(
    grad: Tensor, grad_returns: Tensor, mask: Tensor | None, done: Tensor | None, truncated: Tensor | None,
    next_dims: int, gamma: float, lam: float, carry: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rewards, values and next_value; the last is empty where next_dims is 0."""
    rows, steps = grad.shape
    grad_rewards = torch.empty((rows, steps), dtype=grad.dtype, device=grad.device)
    grad_values = torch.empty_like(grad_rewards)
    grad_next = grad.new_empty(((0,), (rows,), (rows, steps))[next_dims])
    tensors, strides = zip(*map(plane, (grad, grad_returns, mask, done, truncated)))
    tile_rows, block = tile(steps + 1)
    launch(
        gae_backward_kernel, (cdiv(rows, tile_rows),), grad,
        *tensors, grad_rewards, grad_values,
        grad_next if next_dims == 2 else None, grad_next if next_dims == 1 else None,
        *strides, rows, steps, gamma, gamma * lam,
        CARRY=carry, ROWS=tile_rows, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_rewards, grad_values, grad_next
