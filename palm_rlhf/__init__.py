"""A thin PaLM + RLHF stack that trains on rlhf_kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palm_rlhf.generation import Generation, best_of, generate
    from palm_rlhf.models.checkpoint import CheckpointError, load_palm, save_palm
    from palm_rlhf.models.palm import PaLM
    from palm_rlhf.rewards import (
        ModelReward,
        ProgrammaticReward,
        RewardError,
        RewardModel,
        load_reward_model,
        save_reward_model,
    )

__version__ = "0.1.0.dev0"

# Imported when they are asked for: `palm-rlhf --help` does not wait for torch.
_PLACES = {
    "generation": ("Generation", "best_of", "generate"),
    "models.checkpoint": ("CheckpointError", "load_palm", "save_palm"),
    "models.palm": ("PaLM",),
    "rewards": (
        "ModelReward",
        "ProgrammaticReward",
        "RewardError",
        "RewardModel",
        "load_reward_model",
        "save_reward_model",
    ),
}

__all__ = [
    "CheckpointError",
    "Generation",
    "ModelReward",
    "PaLM",
    "ProgrammaticReward",
    "RewardError",
    "RewardModel",
    "best_of",
    "generate",
    "load_palm",
    "load_reward_model",
    "save_palm",
    "save_reward_model",
]


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{place}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
