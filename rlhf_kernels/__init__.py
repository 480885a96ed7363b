"""Fused kernels for RLHF, each held to a plain-PyTorch definition.

Importing this needs torch alone. `explain("gae")` says which backend runs an op here and why.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf_kernels.ops.advantage import (
    discounted_return,
    gae,
    lambda_return,
    linear_recurrence,
    token_advantages,
    vtrace,
)
from rlhf_kernels.ops.attention import attention, attention_prefix, attention_varlen, decode_attention
from rlhf_kernels.ops.loss_head import linear_logprob, logprob
from rlhf_kernels.ops.norm import layer_norm, rms_norm
from rlhf_kernels.ops.normalize import NORMALIZE_PRESETS, masked_normalize
from rlhf_kernels.ops.rotary import RotaryTable, RotaryTables, rotary, rotary_tables
from rlhf_kernels.ops.sampling import sample
from rlhf_kernels.ops.swiglu import swiglu
from rlhf_kernels.runtime.dispatch import BackendError, FallbackWarning, backend, explain

if TYPE_CHECKING:
    from rlhf_kernels.engine.warm import warm_up
    from rlhf_kernels.stacks.patching import Patched, PatchError, patch

__version__ = "0.1.0.dev0"

__all__ = [
    "NORMALIZE_PRESETS",
    "BackendError",
    "FallbackWarning",
    "PatchError",
    "Patched",
    "RotaryTable",
    "RotaryTables",
    "attention",
    "attention_prefix",
    "attention_varlen",
    "backend",
    "decode_attention",
    "discounted_return",
    "explain",
    "gae",
    "lambda_return",
    "layer_norm",
    "linear_logprob",
    "linear_recurrence",
    "logprob",
    "masked_normalize",
    "patch",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "sample",
    "swiglu",
    "token_advantages",
    "vtrace",
    "warm_up",
]


_LATER = {
    "PatchError": "stacks.patching",
    "Patched": "stacks.patching",
    "patch": "stacks.patching",
    "warm_up": "engine.warm",
}


def __getattr__(name: str) -> Any:
    """What patches foreign stacks, and what calls every op, is imported when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


if os.environ.get("RLHF_KERNELS_PATCH"):
    from rlhf_kernels.stacks.workers import from_environment

    from_environment(os.environ)
