"""What options must be, by their type and their name, in whichever dataclass they stand."""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Steps, temperatures, widths: at 0 a formula divides by them, or nothing moves.
_ABOVE_0 = {
    "beta", "clip", "clip_high", "critic_lr", "critic_sigma", "dual_clip", "entropy_kappa", "eta",
    "kl_horizon", "kl_target", "lr", "max_grad_norm", "policy_lr", "tau", "temperature", "truncation",
    "value_clip",
}  # fmt: skip
# Weights that would pull the wrong way, and counts of what may be left out.
_AT_LEAST_0 = {
    "clone_coef", "critic_bins", "critic_warmup", "desirable", "entropy_advantage", "kl_coef", "std_eps",
    "undesirable", "value_coef", "warmup", "weight", "weight_decay",
}  # fmt: skip
_AT_LEAST_1 = {
    "accumulate", "auxiliary_epochs", "auxiliary_every", "batch", "epochs", "eval_every", "eval_samples",
    "head", "max_new_tokens", "max_tokens", "micro_batch", "minibatch", "prompts", "rollout_batch", "samples",
    "steps",
}  # fmt: skip
_SHARES = {"final_lr", "gamma", "lam", "smoothing"}


def check_options(options: Any) -> None:
    """ValueError for a choice that is none, or a number that is not finite or out of its range.

    A bound that may be None may be infinite as well.
    """
    for name, choices, optional in _kinds(type(options)):
        value = getattr(options, name)
        if value is None and optional:
            continue
        if choices:
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        elif isinstance(value, (int, float)):
            _check_number(name, value, optional)


def _check_number(name: str, value: float, optional: bool) -> None:
    expected = None
    if math.isnan(value) or (math.isinf(value) and not optional):
        expected = "finite"
    for names, fits, what in (
        (_ABOVE_0, value > 0, "above 0"),
        (_AT_LEAST_0, value >= 0, "at least 0"),
        (_AT_LEAST_1, value >= 1, "at least 1"),
        (_SHARES, 0 <= value <= 1, "from 0 to 1"),
    ):
        if name in names and not fits:
            expected = what
    if expected is not None:
        raise ValueError(f"{name} must be {expected}, got {value}")


@functools.cache
def _kinds(kind: type) -> list[tuple[str, tuple[str, ...], bool]]:
    """Of each field its name, its choices where they are named, and whether it may be None."""
    hints, found = get_type_hints(kind), []
    for field in fields(kind):
        hint = hints[field.name]
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        found.append((field.name, tuple(choices), NoneType in parts))
    return found
