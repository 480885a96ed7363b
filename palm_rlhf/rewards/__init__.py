"""Rewards: from responses to one number each. A reward is anything that maps a Generation to [B]."""

from palm_rlhf.rewards.checkpoint import load_reward_model, reward_from_upstream, save_reward_model
from palm_rlhf.rewards.classifier import Classifier, ClassifierReward
from palm_rlhf.rewards.ensemble import Ensemble
from palm_rlhf.rewards.implicit import ImplicitReward
from palm_rlhf.rewards.model import ModelReward, RewardModel
from palm_rlhf.rewards.programmatic import ProgrammaticReward, RewardError
from palm_rlhf.rewards.text import Length, Lexicon, Matches, Sentiment

__all__ = [
    "Classifier",
    "ClassifierReward",
    "Ensemble",
    "ImplicitReward",
    "Length",
    "Lexicon",
    "Matches",
    "ModelReward",
    "ProgrammaticReward",
    "RewardError",
    "RewardModel",
    "Sentiment",
    "load_reward_model",
    "reward_from_upstream",
    "save_reward_model",
]
