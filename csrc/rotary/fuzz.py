"""rotary in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def rotary(draw: Draw) -> Trial:
    """Each pair (a, b) of a row turned by its angle: (a cos - b sin, b cos + a sin)."""
    steps, half = draw.size(40), draw.choice(draw.size(40), 16, 32, 64)
    x = draw.floats((*draw.choice((), (draw.size(6),), (2, 3)), steps, 2 * half))
    angle = draw.rng.uniform(-4, 4, (steps, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    interleaved = draw.choice(False, True)

    pairs = (..., slice(0, None, 2)), (..., slice(1, None, 2))
    if not interleaved:
        pairs = (..., slice(half)), (..., slice(half, None))
    first, second = pairs
    wide, c, s = x.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64)
    expected, slack = np.empty_like(wide), np.empty_like(wide)
    expected[first] = wide[first] * c - wide[second] * s
    expected[second] = wide[second] * c + wide[first] * s
    slack[first] = slack[second] = np.abs(wide[first]) + np.abs(wide[second])
    return Trial(
        (x, draw.laid_out(cos), draw.laid_out(sin), interleaved), (expected,), np.nan_to_num(slack) * 2e-7
    )


TRIALS = {"rotary": rotary}
