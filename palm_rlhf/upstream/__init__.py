"""palm-rlhf-pytorch's names and arguments: thin doors onto PaLM, rewards and the table of algorithms.

    from palm_rlhf.upstream import PaLM, RewardModel, RLHFTrainer

Its README runs with the import changed. Where that library is wrong this is not, and differs (version 0.8.0):

- trainers sample from the whole distribution: theirs from a tenth of the vocabulary, and learn as if not;
- the KL divergence is from the model before training: theirs is from the policy of the last rollout;
- the critic reads the text before each token: theirs reads the answer it is to be a baseline for;
- prompts lose padding at their ends alone: theirs lose every token 0;
- Adam, with decoupled weight decay, in place of adam-atan2.
"""

from palm_rlhf.upstream.models import ActorCritic, ImplicitPRM, PaLM, RewardModel, top_k, top_p
from palm_rlhf.upstream.trainers import FlowRLTrainer, GRPOTrainer, RLHFTrainer, TPOTrainer

__all__ = [
    "ActorCritic",
    "FlowRLTrainer",
    "GRPOTrainer",
    "ImplicitPRM",
    "PaLM",
    "RLHFTrainer",
    "RewardModel",
    "TPOTrainer",
    "top_k",
    "top_p",
]
