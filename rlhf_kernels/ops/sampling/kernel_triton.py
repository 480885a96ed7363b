"""sample in Triton, a program for each row. Nothing is sorted: the lowest logit that is kept is found four
bits at a time, by passes over the row that measure what is larger than 15 numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.runtime.launch import launch
from rlhf_kernels.runtime.triton_lib import to_float32

BLOCK = 4096
SEARCH = 512  # columns of a tile with 16 thresholds
NUM_WARPS = 8
# Bits of a logit's key that differ, by fours, and the others, which are shifted out.
KEYS = {torch.float32: (32, 0), torch.bfloat16: (16, 16), torch.float16: (20, 12), torch.float64: (64, 0)}


@triton.jit
def _key(z, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Whole numbers in the order of the logits, equal for equal ones."""
    z = tl.where(z == 0, 0.0, z)  # of either sign
    if BITS == 64:
        bits = z.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = z.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT
    return key


@triton.jit
def _weigh(z, inside, peak, temperature):
    """exp((z - peak) / temperature); 0 beyond the row."""
    return tl.where(inside, tl.exp((z - peak) / temperature), 0.0)


@triton.jit
def _lowest_kept(
    logits_ptr, size, peak, temperature, limit, WEIGHTED: tl.constexpr, BITS: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest key at which the measure of larger keys, their weight or number, is below the limit.

    Four bits a pass: a tile of 16 thresholds by some columns is added up and reduced at its end."""
    kind = tl.int64 if BITS == 64 else tl.int32
    element = tl.float64 if BITS == 64 else tl.float32
    digit = tl.arange(0, 16).to(kind)
    level = tl.full((), -1, kind) << (BITS - 1)
    step = tl.full((), 1, kind) << (BITS - 4)
    for _ in range(0, BITS // 4):
        least = (level + step * digit)[:, None]
        measured = tl.zeros((16, BLOCK), element)
        for start in range(0, size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < size
            z = to_float32(tl.load(logits_ptr + cols, mask=inside, other=float("-inf")))
            if WEIGHTED:
                measure = _weigh(z, inside, peak, temperature)
            else:
                measure = tl.where(inside, 1.0, 0.0).to(element)
            measured += tl.where(_key(z, BITS, SHIFT)[None, :] >= least, measure[None, :], 0.0)
        reached = (tl.sum(measured, 1).to(tl.float64) >= limit) & (digit > 0)
        level += step * tl.sum(reached.to(kind), 0)
        step = step >> 4
    return level


@triton.jit
def _edge(
    logits_ptr, size, peak, temperature, level, BITS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """How many keys are above the level and on it, and their weights."""
    n_above = tl.full((), 0, tl.int32)
    n_level = tl.full((), 0, tl.int32)
    above = tl.full((), 0.0, tl.float64)
    at_level = tl.full((), 0.0, tl.float64)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < size
        z = to_float32(tl.load(logits_ptr + cols, mask=inside, other=float("-inf")))
        key = _key(z, BITS, SHIFT)
        weight = _weigh(z, inside, peak, temperature)
        n_above += tl.sum((inside & (key > level)).to(tl.int32), 0)
        n_level += tl.sum((inside & (key == level)).to(tl.int32), 0)
        above += tl.sum(tl.where(key > level, weight, 0.0), 0).to(tl.float64)
        at_level += tl.sum(tl.where(key == level, weight, 0.0), 0).to(tl.float64)
    return n_above, n_level, above, at_level


@triton.jit
def _kept(
    logits_ptr, start, size, peak, temperature, level, ties, seen, CUT: tl.constexpr, BITS: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights of a tile in float64, 0 where they are cut, and how many on the level came up to its end."""
    cols = start + tl.arange(0, BLOCK)
    inside = cols < size
    z = to_float32(tl.load(logits_ptr + cols, mask=inside, other=float("-inf")))
    weight = _weigh(z, inside, peak, temperature)
    if CUT:
        key = _key(z, BITS, SHIFT)
        on_level = (inside & (key == level)).to(tl.int32)
        rank = seen + tl.cumsum(on_level, 0)
        weight = tl.where((key > level) | ((key == level) & (rank <= ties)), weight, 0.0)
        seen += tl.sum(on_level, 0)
    return weight.to(tl.float64), seen


@triton.jit
def sample_kernel(
    logits_ptr, uniform_ptr, token_ptr, logprob_ptr, log_mass_ptr, stride, size, top_k,
    temperature: tl.float64, top_p: tl.float64,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """The largest logit; the mass; the edge of what is kept; the kept mass; the token's tile; the token."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    element = tl.float64 if BITS == 64 else tl.float32
    CUT: tl.constexpr = TOP_K or TOP_P
    scale = tl.full((), temperature, element)
    peak = tl.full((), float("-inf"), element)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = to_float32(tl.load(logits_ptr + cols, mask=cols < size, other=float("-inf")))
        peak = tl.maximum(peak, tl.max(z, 0))
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, size, BLOCK):
        weight, _ = _kept(logits_ptr, start, size, peak, scale, 0, 0, 0, False, BITS, SHIFT, BLOCK)
        total += tl.sum(weight, 0)

    level = tl.full((), 0, tl.int64 if BITS == 64 else tl.int32)
    ties = tl.full((), 0, tl.int32)
    kept = total
    if CUT:
        mass = total
        most = size
        if TOP_K:
            level = _lowest_kept(logits_ptr, size, peak, scale, top_k, False, BITS, SHIFT, SEARCH)
            n_above, n_level, above, at_level = _edge(
                logits_ptr, size, peak, scale, level, BITS, SHIFT, BLOCK
            )
            ties = top_k - n_above
            most = ties
            mass = above + at_level * (ties.to(tl.float64) / n_level.to(tl.float64))
        if TOP_P:
            limit = top_p * mass
            lowest = _lowest_kept(logits_ptr, size, peak, scale, limit, True, BITS, SHIFT, SEARCH)
            if TOP_K:
                lowest = tl.maximum(lowest, level)
            n_above, n_level, above, at_level = _edge(
                logits_ptr, size, peak, scale, lowest, BITS, SHIFT, BLOCK
            )
            # Where nothing weighs anything on the level, all of it is kept.
            wanted = tl.ceil((limit - above) * (n_level.to(tl.float64) / at_level))
            wanted = tl.where(at_level > 0, tl.minimum(tl.maximum(wanted, 1.0), 2147483647.0), 2147483647.0)
            if TOP_K:
                most = tl.where(lowest == level, most, size)
            level = lowest
            ties = tl.minimum(wanted.to(tl.int32), most)
        kept = tl.full((), 0.0, tl.float64)
        seen = tl.full((), 0, tl.int32)
        for start in range(0, size, BLOCK):
            weight, seen = _kept(
                logits_ptr, start, size, peak, scale, level, ties, seen, CUT, BITS, SHIFT, BLOCK
            )
            kept += tl.sum(weight, 0)

    # The first tile at whose end the sum exceeds its share; rounding may leave none: then the last with mass.
    aim = tl.load(uniform_ptr + row) * kept
    running = tl.full((), 0.0, tl.float64)
    seen = tl.full((), 0, tl.int32)
    chosen = tl.full((), 0, tl.int32)
    running_before = running
    seen_before = seen
    for start in range(0, size, BLOCK):
        weight, seen_after = _kept(
            logits_ptr, start, size, peak, scale, level, ties, seen, CUT, BITS, SHIFT, BLOCK
        )
        more = tl.sum(weight, 0)
        here = (running <= aim) & (more > 0)
        chosen = tl.where(here, start, chosen)
        running_before = tl.where(here, running, running_before)
        seen_before = tl.where(here, seen, seen_before)
        running += more
        seen = seen_after
    weight, _ = _kept(
        logits_ptr, chosen, size, peak, scale, level, ties, seen_before, CUT, BITS, SHIFT, BLOCK
    )
    cols = chosen + tl.arange(0, BLOCK)
    sums = running_before + tl.cumsum(weight, 0)
    last = tl.max(tl.where(weight > 0, cols, 0), 0)
    token = tl.minimum(tl.min(tl.where((weight > 0) & (sums > aim), cols, size), 0), last)

    own = tl.sum(tl.where(cols == token, weight, 0.0), 0)
    away = to_float32(tl.load(logits_ptr + token)) - peak
    logprob = away.to(tl.float64) / temperature - tl.log(total)
    # One token's mass is its probability, to the bit.
    log_mass = tl.where((own == kept) & (kept != total), logprob, tl.log(kept / total))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, logprob.to(element))
    tl.store(log_mass_ptr + row, log_mass.to(element))


def forward(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, its log-probability among all tokens, and log of the mass that truncation kept."""
    rows, size = logits.shape
    logits = logits if logits.stride(1) == 1 or size == 1 else logits.contiguous()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=dtype, device=logits.device)
    log_mass = torch.empty_like(logprob)
    bits, shift = KEYS[logits.dtype]
    few = top_k is not None and top_k < size
    launch(
        sample_kernel, (rows,), logits,
        logits, uniform.contiguous(), token, logprob, log_mass, logits.stride(0), size,
        top_k if few else size, float(temperature), 1.0 if top_p is None else float(top_p),
        TOP_K=few, TOP_P=top_p is not None, BITS=bits, SHIFT=shift, BLOCK=BLOCK, SEARCH=SEARCH,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return token, logprob, log_mass
