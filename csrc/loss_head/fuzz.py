"""logprob in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def problem(draw: Draw) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits of some rows, targets and a temperature; some tokens masked, some rows masked or spoiled."""
    rows, vocabulary = draw.size(4), max(1, draw.size(5000))
    logits = draw.rng.standard_normal((rows, vocabulary)) * draw.choice(0.0, 1.0, 5.0, 60.0)
    logits = logits.astype(np.float32) + np.float32(draw.choice(0.0, 0.0, 500.0, -1e4))
    masked = draw.choice(np.float32(-np.inf), np.finfo(np.float32).min)
    logits = np.where(draw.mask(logits.shape), logits, masked) if draw.rng.random() < 0.5 else logits
    if rows and draw.rng.random() < 0.2:
        logits[0, draw.rng.integers(vocabulary)] = draw.choice(np.nan, np.inf)
    target = draw.rng.integers(0, vocabulary, rows)
    return draw.laid_out(logits.astype(np.float32)), target, draw.choice(1.0, 1.0, 0.7, 3.0)


def softmax(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """log p, p log p, the largest z and log sum exp(z - largest), in float64."""
    z = logits.astype(np.float64) / temperature
    peak = z.max(-1)
    log_total = np.log(np.exp(z - peak[:, None]).sum(-1))
    log_p = z - peak[:, None] - log_total[:, None]
    p = np.exp(log_p)
    return log_p, np.where(p == 0, 0, p * log_p), peak, log_total


def undefined(peak: np.ndarray) -> np.ndarray:
    """Rows without a token, with NaN, or beyond float32."""
    return ~(np.abs(peak) < 1e38)


def logprob(draw: Draw) -> Trial:
    """log p(target), the entropy, the largest z and what the sum of exponentials adds to it."""
    logits, target, temperature = problem(draw)
    log_p, terms, peak, log_total = softmax(logits, temperature)
    rows = np.arange(len(target))
    # The largest z is rounded, which moves it and the logarithm apart. Built for sanitizers, the sums of a
    # block are not vectorised: one chain of as many additions as else 16.
    ulp = 2e-7 * np.nan_to_num(np.abs(peak)) * (temperature != 1.0)
    expected = log_p[rows, target], -terms.sum(-1), peak, log_total
    return Trial((logits, target, temperature), expected, slack=ulp + 1e-5, free=undefined(peak))


def logprob_backward(draw: Draw) -> Trial:
    """Of z: grad_logprob (onehot - p) - grad_entropy p (log p + entropy)."""
    logits, target, temperature = problem(draw)
    log_p, terms, peak, log_total = softmax(logits, temperature)
    entropy, rows = -terms.sum(-1), np.arange(len(target))
    by_logprob, by_entropy = draw.rng.standard_normal((2, len(rows))).astype(np.float32)
    expected = -by_logprob[:, None] * np.exp(log_p)
    expected -= by_entropy[:, None] * (terms + np.exp(log_p) * entropy[:, None])
    expected[rows, target] += by_logprob
    expected /= temperature
    free = np.broadcast_to(undefined(peak)[:, None], expected.shape)
    scale = np.abs(by_logprob) + np.abs(by_entropy) * (20 + np.nan_to_num(entropy))
    exponent = np.nan_to_num(np.abs(peak)) + 90  # what is rounded before exp
    slack = (3e-7 * scale * exponent / temperature)[:, None]
    statistics = (a.astype(np.float32) for a in (entropy, peak, log_total))
    args = (by_logprob, by_entropy, logits, target, *statistics, temperature)
    return Trial(args, (expected,), slack=slack, free=free)


TRIALS = {"logprob": logprob, "logprob_backward": logprob_backward}
