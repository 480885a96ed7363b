"""masked_normalize in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def masked_normalize(draw: Draw) -> Trial:
    """(x - mean) / sqrt(max(var, eps)), moments of the real elements; NaN in a masked one does no harm."""
    shape = draw.choice((draw.size(9000),), (draw.size(40), draw.size(60)))
    x, mask = draw.floats(shape, odd=False), draw.mask(shape)
    x = x + np.float32(draw.choice(0.0, 0.0, 100.0, -3.0))
    odd = draw.choice(np.nan, np.inf, -np.inf, 3e38)
    x = np.where(mask | (draw.rng.random(shape) < 0.5), x, np.float32(odd))
    if draw.rng.random() < 0.1:
        x = np.where(draw.rng.random(shape) < 0.01, np.float32(np.nan), x)  # in a real slot everything is NaN
    eps, zero_masked = draw.choice(1e-5, 1e-8, 1.0), draw.choice(False, True)

    real = x[mask].astype(np.float64)
    mean = real.mean() if real.size else 0.0
    rstd = 1 / np.sqrt(np.maximum(real.var() if real.size else 0.0, eps))
    expected = (x - mean) * rstd
    free = None if zero_masked else ~mask & (~np.isfinite(x) | (np.abs(x) > 1e38))
    expected = np.where(mask, expected, 0.0) if zero_masked else expected
    largest = np.abs(real).max() if real.size else 0.0
    slack = np.nan_to_num(1e-6 * (largest * rstd + 1))
    return Trial((x, mask, eps, zero_masked), (expected,), slack, free=free)


TRIALS = {"masked_normalize": masked_normalize}
