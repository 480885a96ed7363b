"""gae in NumPy and random arguments for it, for tools/fuzz_host.py."""

import numpy as np
from fuzzing import Draw, Trial


def gae(draw: Draw) -> Trial:
    """A_t = delta_t + gamma lam A_(t+1), one step after the other; state passes over masked steps."""
    shape = draw.choice((draw.size(70), draw.size(60)), (draw.size(20), draw.size(1100)), (3, 1024))
    rewards, values = (draw.floats(shape, odd=False, spread=0.1) for _ in range(2))
    mask = draw.choice(None, draw.mask(shape))
    gamma, lam = draw.choice(1.0, 0.99, 0.5), draw.choice(1.0, 0.95, 0.0)
    real = np.ones(shape, bool) if mask is None else np.asarray(mask)
    if mask is not None:
        odd = np.float32(draw.choice(np.nan, np.inf, -np.inf))
        rewards = draw.laid_out(np.where(real, rewards, odd))
        values = draw.laid_out(np.where(real, values, odd))

    r, v = (np.where(real, x, 0).astype(np.float64) for x in (rewards, values))
    advantages, state, follows = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0])
    for t in reversed(range(shape[1])):
        step = r[:, t] + gamma * follows - v[:, t] + gamma * lam * state
        state = np.where(real[:, t], step, state)
        follows = np.where(real[:, t], v[:, t], follows)
        advantages[:, t] = state
    largest = max((np.abs(x).max(initial=0.0) for x in (r, v, advantages)), default=0.0)
    slack = 1e-6 * largest * (1 + np.sqrt(shape[1]))
    return Trial((rewards, values, mask, gamma, lam), (advantages, advantages + v), slack)


def gae_backward(draw: Draw) -> Trial:
    """The transpose of the above, one step after the other."""
    shape = draw.choice((draw.size(70), draw.size(60)), (draw.size(20), draw.size(1100)))
    grad_a, grad_r = (draw.floats(shape, odd=False, spread=0.1) for _ in range(2))
    mask = draw.choice(None, draw.mask(shape))
    gamma, lam = draw.choice(1.0, 0.99, 0.5), draw.choice(0.95, 0.0)
    real = np.ones(shape, bool) if mask is None else np.asarray(mask)

    rewards, values = np.zeros(shape), np.zeros(shape)
    trace, follows = np.zeros(shape[0]), np.zeros(shape[0])
    for t in range(shape[1]):
        total = grad_a[:, t].astype(np.float64) + grad_r[:, t] + trace
        rewards[:, t] = np.where(real[:, t], total, 0)
        values[:, t] = np.where(real[:, t], grad_r[:, t] - total + follows, 0)
        trace = np.where(real[:, t], gamma * lam * total, total)
        follows = np.where(real[:, t], gamma * total, follows)
    largest = max(np.abs(x).max(initial=0.0) for x in (rewards, values, grad_a, grad_r))
    slack = 1e-6 * largest * (1 + np.sqrt(shape[1]))
    return Trial((grad_a, grad_r, mask, gamma, lam), (rewards, values), slack)


def token_advantages(draw: Draw) -> Trial:
    """gae of -kl_coef * kl, with the score added at the last real step; 0 at masked ones."""
    shape = draw.choice((draw.size(70), draw.size(60)), (draw.size(20), draw.size(1100)), (3, 1024))
    score = draw.floats((shape[0],), odd=False, spread=0.1)
    kl, values = (draw.floats(shape, odd=False, spread=0.1) for _ in range(2))
    mask = draw.mask(shape)
    kl_coef, gamma, lam = draw.choice(0.1, 0.0), draw.choice(1.0, 0.99, 0.0), draw.choice(0.95, 0.0)
    carry = draw.choice(True, False)
    real = np.asarray(mask)
    odd = np.float32(draw.choice(np.nan, np.inf, -np.inf))
    kl, values = (draw.laid_out(np.where(real, x, odd)) for x in (kl, values))

    r = -kl_coef * np.where(real, kl, 0).astype(np.float64)
    v = np.where(real, values, 0).astype(np.float64)
    for row in np.flatnonzero(real.any(1)):
        r[row, np.flatnonzero(real[row])[-1]] += score[row]
    advantages, state, follows = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0])
    for t in reversed(range(shape[1])):
        live = real[:, t] | (not carry)
        step = r[:, t] + gamma * follows - v[:, t] + gamma * lam * state
        state = np.where(live, step, state)
        follows = np.where(live, v[:, t], follows)
        advantages[:, t] = np.where(real[:, t], state, 0)
    largest = max((np.abs(x).max(initial=0.0) for x in (r, v, advantages)), default=0.0)
    slack = 1e-6 * largest * (1 + np.sqrt(shape[1]))
    arguments = (score, kl, values, mask, kl_coef, gamma, lam, carry)
    return Trial(arguments, (advantages, np.where(real, advantages + v, 0)), slack)


def token_advantages_backward(draw: Draw) -> Trial:
    """The transpose of the above, one step after the other."""
    shape = draw.choice((draw.size(70), draw.size(60)), (draw.size(20), draw.size(1100)))
    grad_a, grad_r = (draw.floats(shape, odd=False, spread=0.1) for _ in range(2))
    mask = draw.mask(shape)
    kl_coef, gamma, lam = draw.choice(0.1, 0.0), draw.choice(1.0, 0.99), draw.choice(0.95, 0.0)
    carry = draw.choice(True, False)
    real = np.asarray(mask)

    rewards, values, score = np.zeros(shape), np.zeros(shape), np.zeros(shape[0])
    trace, follows = np.zeros(shape[0]), np.zeros(shape[0])
    for t in range(shape[1]):
        live = real[:, t] | (not carry)
        given, to_return = (np.where(real[:, t], x[:, t].astype(np.float64), 0) for x in (grad_a, grad_r))
        total = given + to_return + trace
        rewards[:, t] = np.where(real[:, t], total, 0)
        values[:, t] = np.where(real[:, t], to_return - total + follows, 0)
        score = np.where(real[:, t], total, score)
        trace = np.where(live, gamma * lam * total, total)
        follows = np.where(live, gamma * total, follows)
    largest = max(np.abs(x).max(initial=0.0) for x in (rewards, values, grad_a, grad_r))
    slack = 1e-6 * largest * (1 + np.sqrt(shape[1]))
    arguments = (grad_a, grad_r, mask, kl_coef, gamma, lam, carry)
    return Trial(arguments, (score, -kl_coef * rewards, values), slack)


def linear_recurrence(draw: Draw) -> Trial:
    """One step after the other, either way."""
    shape = draw.choice((draw.size(70), draw.size(60)), (draw.size(20), draw.size(1100)), (3, 1024))
    a, b = (draw.floats(shape, odd=False, spread=0.1) for _ in range(2))
    a = draw.laid_out(np.tanh(a).astype(np.float32))
    initial = draw.choice(None, draw.floats((shape[0],), odd=False, spread=0.1))
    reverse = draw.choice(True, False)
    state = np.zeros(shape[0]) if initial is None else initial.astype(np.float64)
    size = np.abs(state)  # of what is added up
    y, largest = np.zeros(shape), np.abs(size).max(initial=0.0)
    for t in reversed(range(shape[1])) if reverse else range(shape[1]):
        y[:, t] = state = a[:, t].astype(np.float64) * state + b[:, t]
        size = np.abs(a[:, t]) * size + np.abs(b[:, t])
        largest = max(largest, size.max(initial=0.0))
    slack = 1e-6 * largest * (1 + np.sqrt(shape[1]))
    return Trial((a, b, initial, reverse), (y,), slack)


def vtrace(draw: Draw) -> Trial:
    """rho, c and the recurrence of the targets, one step after the other; state passes over masked steps."""
    shape = draw.choice((draw.size(70), draw.size(60)), (draw.size(20), draw.size(1100)), (3, 1024))
    log_ratio, rewards, values = (draw.floats(shape, odd=False, spread=0.1) for _ in range(3))
    log_ratio = draw.laid_out(np.tanh(log_ratio).astype(np.float32))
    mask = draw.choice(None, draw.mask(shape))
    gamma, lam = draw.choice(1.0, 0.99, 0.5), draw.choice(1.0, 0.95, 0.0)
    c_clip = draw.choice(1.0, 0.7)
    rho_clip = draw.choice(c_clip, 1.5)
    real = np.ones(shape, bool) if mask is None else np.asarray(mask)
    if mask is not None:
        odd = np.float32(draw.choice(np.nan, np.inf, -np.inf))
        log_ratio, rewards, values = (
            draw.laid_out(np.where(real, x, odd)) for x in (log_ratio, rewards, values)
        )

    ratio, r, v = (np.where(real, x, 0).astype(np.float64) for x in (log_ratio, rewards, values))
    ratio = np.exp(ratio)
    targets, advantages = np.zeros(shape), np.zeros(shape)
    x, follows, size, largest = (np.zeros(shape[0]) for _ in range(4))
    for t in reversed(range(shape[1])):
        rho, trace = np.minimum(ratio[:, t], rho_clip), gamma * lam * np.minimum(ratio[:, t], c_clip)
        error = r[:, t] + gamma * follows - v[:, t]
        step = rho * error + trace * x
        advantages[:, t] = np.where(real[:, t], rho * (error + gamma * x), 0)
        targets[:, t] = np.where(real[:, t], v[:, t] + step, 0)
        terms = rho * (np.abs(r[:, t]) + np.abs(follows) + np.abs(v[:, t])) + trace * size
        size = np.where(real[:, t], terms, size)
        largest = np.maximum(largest, size + np.abs(v[:, t]))
        x = np.where(real[:, t], step, x)
        follows = np.where(real[:, t], v[:, t], follows)
    slack = 1e-6 * max(largest.max(initial=0.0), 1.0) * (2 + np.sqrt(shape[1])) * max(rho_clip, 1.0)
    arguments = (log_ratio, rewards, values, mask, gamma, lam, rho_clip, c_clip)
    return Trial(arguments, (targets, advantages), slack)


TRIALS = {
    "gae": gae,
    "gae_backward": gae_backward,
    "token_advantages": token_advantages,
    "token_advantages_backward": token_advantages_backward,
    "linear_recurrence": linear_recurrence,
    "vtrace": vtrace,
}
