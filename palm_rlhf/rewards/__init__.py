"""Rewards: from responses to one number each. A reward is anything that maps a Generation to [B]."""

from palm_rlhf.rewards.checkpoint import load_reward_model, reward_from_upstream, save_reward_model
from palm_rlhf.rewards.model import ModelReward, RewardModel
from palm_rlhf.rewards.programmatic import ProgrammaticReward, RewardError

__all__ = [
    "ModelReward",
    "ProgrammaticReward",
    "RewardError",
    "RewardModel",
    "load_reward_model",
    "reward_from_upstream",
    "save_reward_model",
]
