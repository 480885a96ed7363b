"""masked_normalize in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def moments(x: np.ndarray, mask: np.ndarray, eps: float) -> tuple[float, float, bool]:
    """Mean and reciprocal deviation of the real elements, and whether eps stands for the variance."""
    real = x[mask].astype(np.float64)
    mean, variance = (real.mean(), real.var()) if real.size else (0.0, 0.0)
    return mean, 1 / np.sqrt(np.maximum(variance, eps)), bool(variance < eps)


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

    mean, rstd, _ = moments(x, mask, eps)
    expected = (x - mean) * rstd
    free = None if zero_masked else ~mask & (~np.isfinite(x) | (np.abs(x) > 1e38))
    expected = np.where(mask, expected, 0.0) if zero_masked else expected
    largest = np.abs(x[mask]).max(initial=0.0)
    slack = np.nan_to_num(1e-6 * (largest * rstd + 1))
    return Trial((x, mask, eps, zero_masked), (expected,), slack, free=free)


def masked_normalize_backward(draw: Draw) -> Trial:
    """The mean takes away the average gradient; the variance, unless eps replaces it, what is along x."""
    size = draw.size(9000)
    mask, eps, zero_masked = draw.mask(size), draw.choice(1e-5, 1.0), draw.choice(False, True)
    x = draw.rng.standard_normal(size).astype(np.float32) + np.float32(draw.choice(0.0, 3.0))
    x = draw.laid_out(np.where(mask | (draw.rng.random(size) < 0.5), x, np.float32(np.nan)))
    grad = draw.floats(size, odd=False)
    mean, rstd, clamped = moments(x, mask, eps)
    counts = mask | (~np.isnan(x) & (not zero_masked))
    g, about = np.where(counts, grad, 0).astype(np.float64), np.where(counts, x - mean, 0)
    n = max(int(mask.sum()), 1)
    slope = 0.0 if clamped else -(rstd**3) * (g * about).sum() / n
    alone = np.zeros(size) if zero_masked else grad * rstd
    expected = np.where(mask, (g - g.sum() / n) * rstd + slope * about, alone)
    largest = np.abs(g).max(initial=0.0) * rstd
    slack = 2e-6 * largest * (1 + size / n) * (1 + np.square(about * rstd))
    # On the edge of the clamp either side is right.
    free = np.full(size, bool(abs(rstd**-2 - eps) < 1e-5 * eps and not clamped))
    return Trial((grad, x, mask, eps, zero_masked), (expected,), slack, free=free)


TRIALS = {"masked_normalize": masked_normalize, "masked_normalize_backward": masked_normalize_backward}
