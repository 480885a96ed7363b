"""What was sampled, with everything that an update needs to know of it."""

from palm_rlhf.rollout.batch import Rollout

__all__ = ["Rollout"]
