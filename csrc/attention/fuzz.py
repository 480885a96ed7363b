"""decode_attention in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def decode_attention(draw: Draw) -> Trial:
    """softmax(scale q k^T) v for the heads of one key head; 0 without keys."""
    heads, keys = draw.choice(1, 2, 3, 4, 7, 8, 9, 17), draw.size(1300)
    size = draw.choice(draw.size(70), 32, 64, 128)
    q, k, v = (draw.floats((n, size), odd=False, spread=0.1) for n in (heads, keys, keys))
    scale = float(np.float32(draw.rng.uniform(0.01, 0.3)))
    wide, wide_k, wide_v = (x.astype(np.float64) for x in (q, k, v))
    scores = scale * wide @ wide_k.T
    weights = np.exp(scores - scores.max(1, initial=-np.inf, keepdims=True))
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
    expected = weights @ wide_v
    # An error of a score is a relative error of its weight.
    off = 1e-6 * (1 + scale * (np.abs(wide) @ np.abs(wide_k).T).max(initial=0.0))
    return Trial((q, k, v, scale), (expected,), slack=4 * off * np.abs(wide_v).max(initial=0.0))


TRIALS = {"decode_attention": decode_attention}
