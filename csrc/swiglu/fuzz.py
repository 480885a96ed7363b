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


TRIALS = {"swiglu": swiglu}
