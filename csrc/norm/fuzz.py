"""layer_norm and rms_norm in NumPy and random arguments for them, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial

NOTHING = np.empty(0, np.float32)


def problem(draw: Draw) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """Rows about some mean, a weight, eps, and whether they are centred."""
    rows, n = draw.choice(draw.size(6), draw.size(150)), draw.size(draw.choice(300, 6000))
    x = draw.rng.standard_normal((rows, n)) * 10.0 ** draw.rng.uniform(-2, 2) + draw.choice(0.0, 0.0, 30.0)
    weight = draw.laid_out(draw.rng.standard_normal(n).astype(np.float32))
    return draw.laid_out(x.astype(np.float32)), weight, draw.choice(1e-5, 1e-8, 1.0), draw.choice(False, True)


def standard(x: np.ndarray, eps: float, center: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x - mean) / std, 1 / std, and how many float32 places the subtraction of the mean takes."""
    wide = x.astype(np.float64)
    away = wide - wide.mean(-1, keepdims=True) if center and x.size else wide
    square = np.square(away).mean(-1, keepdims=True) if x.size else away[:, :1]
    scale = 1 / np.sqrt(square + eps)
    largest = np.abs(wide).max(-1, initial=0.0, keepdims=True) * scale
    return away * scale, scale, largest


def statistics(x: np.ndarray, scale: np.ndarray, center: bool) -> np.ndarray:
    """[rows, 3]: the mean in float32, 1 / std, and what is left of the mean over std; 0 for one element."""
    if not x.size:
        return np.zeros((len(x), 3), np.float32)
    mean = x.mean(-1, dtype=np.float64, keepdims=True) * center
    rest = (mean.astype(np.float32) - mean) * scale
    return np.concatenate((mean, scale * (x.shape[-1] != 1 or not center), rest), -1).astype(np.float32)


def norm(draw: Draw) -> Trial:
    """Normalised rows times weight plus bias, and the sum that was normalised."""
    x, weight, eps, center = problem(draw)
    bias = draw.choice(NOTHING, draw.rng.standard_normal(weight.size).astype(np.float32))
    residual = draw.choice(NOTHING, draw.laid_out(draw.rng.standard_normal(x.shape).astype(np.float32)))
    summed = x + residual if residual.size else x
    y, _, largest = standard(summed, eps, center)
    expected = y * weight.astype(np.float64) + (bias if bias.size else 0)
    slack = (1e-6 * (1 + largest)).max(initial=0.0) * np.abs(weight).max(initial=1.0) + 4e-7 * np.abs(
        bias
    ).max(initial=0.0)
    kept = summed if residual.size else residual
    return Trial((x, weight, bias, residual, eps, center), (expected, kept.astype(np.float64)), slack)


def norm_backward(draw: Draw) -> Trial:
    """(s - mean(s) - y mean(s y)) / std with s = grad weight, and the sums of grad y and of grad."""
    x, weight, eps, center = problem(draw)
    grad = draw.laid_out(draw.rng.standard_normal(x.shape).astype(np.float32))
    also = draw.choice(NOTHING, draw.laid_out(draw.rng.standard_normal(x.shape).astype(np.float32)))
    y, scale, largest = standard(x, eps, center)
    s = grad.astype(np.float64) * weight
    if x.size:
        s = s - s.mean(-1, keepdims=True) * center - y * (s * y).mean(-1, keepdims=True)
    grad_x = s * scale + (also if also.size else 0)
    dy = grad.astype(np.float64)
    expected = grad_x, (dy * y).sum(0), dy.sum(0)
    # Of the largest values, since each is the rest of a subtraction.
    digits = 1e-6 * (1 + largest.max(initial=0.0)) * max(1.0, np.abs(y).max(initial=0.0))
    rows = 4.0 * max(1.0, np.abs(weight).max(initial=0.0)) * max(scale.max(initial=0.0), len(x) ** 0.5, 1.0)
    kept = draw.choice(statistics(x, scale, center), np.zeros((len(x), 3), np.float32))
    return Trial((grad, also, x, weight, kept, eps, center), expected, slack=4 * digits * rows)


TRIALS = {"norm": norm, "norm_backward": norm_backward}
