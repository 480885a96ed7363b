"""exp and the 16-bit conversions in NumPy and random arguments for them, for tools/fuzz_host.py."""

from collections.abc import Callable

import numpy as np
from fuzzing import Draw, Trial


def exp(draw: Draw) -> Trial:
    """The exponential; results below the smallest normal number are 0."""
    x = draw.floats(draw.size(), spread=2.0)
    return Trial((x,), (np.exp(x.astype(np.float64)),), slack=2e-38, relative=2e-7)


def to_float16(draw: Draw) -> Trial:
    """Rounded to nearest even; the bits of a NaN are free."""
    x = draw.floats(draw.size(), spread=draw.choice(1e-6, 1.0, 1e3))
    bits = x.astype(np.float16).view(np.uint16)
    return Trial((x,), (bits.astype(np.float64),), relative=0.0, free=np.isnan(x))


def to_bfloat16(draw: Draw) -> Trial:
    """Of the two neighbours the nearer one, or else the even one; the bits of a NaN are free."""
    x = draw.floats(draw.size())
    below = np.ascontiguousarray(x).view(np.uint32) >> 16
    ends = [((below + step) << 16).astype(np.uint32).view(np.float32).astype(np.float64) for step in (0, 1)]
    ends[1] = np.where(np.isinf(ends[1]), np.sign(ends[1]) * 2.0**128, ends[1])
    down, up = (np.abs(x.astype(np.float64) - end) for end in ends)
    bits = np.where((up < down) | ((up == down) & (below % 2 == 1)), below + 1, below)
    bits = np.where(np.isinf(x), below, bits)
    return Trial((x,), (bits.astype(np.float64),), relative=0.0, free=np.isnan(x))


def from_bits(widen: Callable[[np.ndarray], np.ndarray]) -> Callable[[Draw], Trial]:
    """Any 16 bits as the float32 that they mean."""

    def trial(draw: Draw) -> Trial:
        bits = draw.rng.integers(0, 2**16, draw.size(), dtype=np.uint16)
        return Trial((draw.laid_out(bits),), (widen(bits).astype(np.float64),), relative=0.0)

    return trial


TRIALS = {
    "exp": exp,
    "to_float16": to_float16,
    "to_bfloat16": to_bfloat16,
    "from_float16": from_bits(lambda bits: bits.view(np.float16)),
    "from_bfloat16": from_bits(lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)),
}
