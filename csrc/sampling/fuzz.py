"""sample in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def sample(draw: Draw) -> Trial:
    """The token halfway through whose share a random number lies, its log-probability, the kept mass."""
    rows, vocabulary = draw.size(4), max(1, draw.size(5000))
    logits = draw.rng.standard_normal((rows, vocabulary)) * draw.choice(0.0, 1.0, 5.0, 40.0)
    logits = np.round(logits, draw.choice(1, 6)).astype(np.float32)  # ties
    if draw.rng.random() < 0.3:
        logits = np.where(draw.mask(logits.shape), logits, np.float32(-np.inf))
    temperature = draw.choice(1.0, 0.7, 3.0)
    top_k = draw.choice(0, 1, 3, vocabulary // 2 + 1, vocabulary, vocabulary + 1)
    top_p = draw.choice(1.0, 1.0, 0.9, 0.5, 1e-9)
    with np.errstate(invalid="ignore"):
        z = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / temperature
    weight = np.exp(z)
    order = np.argsort(-logits, axis=-1, kind="stable")
    ordered = np.take_along_axis(weight, order, -1)
    if top_k:
        ordered[:, top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    limit = top_p * ordered.sum(-1, keepdims=True)
    # Where rounding decides what is kept, nothing is promised. Weights below 2^-126 are 0.
    unsure = (top_p < 1) & (np.abs(before - limit) < 1e-5 * limit).any(-1)
    unsure |= ~np.isfinite(logits).any(-1)
    ordered = np.where((before < limit) & (ordered > 1e-37), ordered, 0)
    kept = np.zeros_like(weight)
    np.put_along_axis(kept, order, ordered, -1)
    sums = np.nan_to_num(kept.cumsum(-1))
    aim = draw.rng.random((rows, 1)) * sums[:, -1:]
    token = (sums > aim).argmax(-1)
    own = kept[np.arange(rows), token]
    mass = sums[:, -1]
    uniform = np.nan_to_num((sums[np.arange(rows), token] - own / 2) / mass)
    unsure |= ~(own > 1e-5 * mass)
    total = weight.sum(-1)
    expected = token.astype(np.float64), np.log(own / total), np.log(mass / total)
    args = (draw.laid_out(logits), uniform, temperature, top_k, top_p)
    return Trial(args, expected, slack=1e-5, free=unsure)


TRIALS = {"sample": sample}
