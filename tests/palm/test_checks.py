"""Options that cannot be are refused when they are made, in one sentence, and name themselves."""

import math

import pytest

from palm_rlhf.algorithms.estimators import adapted_kl_coef
from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.trainers.offline import OfflineConfig
from palm_rlhf.trainers.online import OnlineConfig
from palm_rlhf.trainers.reward import RewardConfig
from palm_rlhf.trainers.sft import SFTConfig

OPTIONS = {name: row.options for name, row in (ALGORITHMS | PAIR_ALGORITHMS).items()}


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        # A name that is none would have switched something off.
        (OPTIONS["grpo"], "kl_in", "rewards", "kl_in must be one of reward, loss, got 'rewards'"),
        (OPTIONS["grpo"], "kl", "k4", "kl must be one of k1, k2, k3, got 'k4'"),
        (OPTIONS["ppo"], "loss", "cilp", "loss must be one of clip, spo, got 'cilp'"),
        (OPTIONS["rloo"], "ratio", "sequence", "ratio must be one of token, response"),
        (OPTIONS["score-centering"], "average", "mean", "average must be one of token-mean, sequence-mean"),
        (OnlineConfig, "precision", "bfloat16", "precision must be one of float32, bf16, got 'bfloat16'"),
        (SFTConfig, "precision", None, "precision must be one of float32, bf16, got None"),
        # Numbers.
        (OPTIONS["grpo"], "kl_horizon", 0.0, "kl_horizon must be above 0, got 0.0"),
        (OPTIONS["grpo"], "kl_coef", -0.1, "kl_coef must be at least 0, got -0.1"),
        (OPTIONS["grpo"], "kl_coef", math.nan, "kl_coef must be at least 0, got nan"),
        (OPTIONS["ppo"], "entropy_coef", math.inf, "entropy_coef must be finite, got inf"),
        (OPTIONS["ppo"], "gamma", 1.5, "gamma must be from 0 to 1, got 1.5"),
        (OPTIONS["ppg"], "auxiliary_every", 0, "auxiliary_every must be at least 1, got 0"),
        (OPTIONS["tpo"], "eta", 0.0, "eta must be above 0"),
        (OPTIONS["ipo"], "tau", 0.0, "tau must be above 0, got 0.0"),
        (OPTIONS["dpo"], "smoothing", -0.5, "smoothing must be from 0 to 1, got -0.5"),
        (OPTIONS["rebel"], "eta", 0.0, "eta must be above 0"),
        (OnlineConfig, "policy_lr", -1e-3, "policy_lr must be above 0, got -0.001"),
        (OnlineConfig, "policy_lr", math.nan, "policy_lr must be above 0, got nan"),
        (OnlineConfig, "critic_lr", math.inf, "critic_lr must be finite, got inf"),
        (OnlineConfig, "warmup", -1, "warmup must be at least 0, got -1"),
        (OnlineConfig, "max_grad_norm", -1.0, "max_grad_norm must be above 0, got -1.0"),
        (OfflineConfig, "warmup", -1, "warmup must be at least 0, got -1"),
        (RewardConfig, "max_grad_norm", 0.0, "max_grad_norm must be above 0, got 0.0"),
        (SFTConfig, "weight_decay", -1.0, "weight_decay must be at least 0, got -1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(kind, name, value, message):
    with pytest.raises(ValueError, match=message):
        kind(**{name: value})


def test_defaults_are_in_range_and_bounds_may_be_infinite_or_left_out():
    for kind in (*OPTIONS.values(), OnlineConfig, OfflineConfig, RewardConfig, SFTConfig):
        kind()
    for bound in (None, math.inf):
        assert OnlineConfig(max_grad_norm=bound).max_grad_norm == bound


def test_a_short_horizon_moves_the_weight_of_the_kl_term_by_a_fifth_at_most():
    assert adapted_kl_coef(0.1, 0.0, target=6.0, responses=64, horizon=10.0) == pytest.approx(0.08)
    assert adapted_kl_coef(0.1, 99.0, target=6.0, responses=64, horizon=10.0) == pytest.approx(0.12)
