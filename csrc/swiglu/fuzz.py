"""swiglu in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def swiglu(draw: Draw) -> Trial:
    """silu(gate) * x."""
    shape = draw.choice((draw.size(),), (draw.size(50), draw.size(60)))
    x, gate = draw.floats(shape), draw.floats(shape, spread=3.0)
    wide, g = x.astype(np.float64), gate.astype(np.float64)
    expected = g / (1 + np.exp(-g)) * wide
    # float32's exponential ends near 88: beyond, silu is 0 instead of something less than 88 e^-88.
    slack = np.nan_to_num(np.abs(wide)) * 2e-36
    free = np.isinf(wide) & (g < -80)
    return Trial((x, gate), (expected,), slack, free=free)


def swiglu_backward(draw: Draw) -> Trial:
    """grad gate s, and grad x s (1 + gate (1 - s)), with s the sigmoid of the gate."""
    size = draw.size()
    grad, x = draw.floats(size, odd=False), draw.floats(size, odd=False)
    gate = draw.floats(size, odd=False, spread=draw.choice(1.0, 30.0))
    dy, wide, g = (a.astype(np.float64) for a in (grad, x, gate))
    s = 1 / (1 + np.exp(-g))
    expected = dy * g * s, dy * wide * s * (1 + g * (1 - s))
    # 1 + gate (1 - s) cancels near gate = -1.28, and s of a very negative gate is 0.
    return Trial((grad, x, gate), expected, slack=1e-6 * np.abs(dy) * (np.abs(wide) + 1e-28))


TRIALS = {"swiglu": swiglu, "swiglu_backward": swiglu_backward}
