"""OpenRLHF: GAE over values and rewards that are zeroed where masked, biased normalisation.

The package cannot be imported without flash-attn, DeepSpeed and Ray, so its functions are run from the
installed source.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
from torch import Tensor

from rlhf_kernels.stacks.peer import Peer
from rlhf_kernels.stacks.source import extract, extract_statements, find_source

UTILS = "openrlhf/models/utils.py"
MAKER = "openrlhf/trainer/ppo_utils/experience_maker.py"


def _namespace() -> dict[str, Any]:
    names = {"Optional": Optional, "Tuple": tuple, "Union": Union}
    return {"torch": torch, "F": torch.nn.functional, **names}


def source_functions(*names: str) -> dict[str, Any]:
    """Functions of openrlhf.models.utils, by name."""
    return extract(find_source(UTILS), *names, namespace=_namespace())


def advantages_and_returns() -> Callable[..., tuple[Tensor, Tensor]]:
    """RemoteExperienceMaker.get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd)."""
    method = "RemoteExperienceMaker.get_advantages_and_returns"
    return extract(find_source(MAKER), method, namespace=_namespace())["get_advantages_and_returns"]


def normalize_advantages() -> Callable[[Tensor, Tensor], Tensor]:
    """The normalisation over all experiences, which is the end of compute_advantages_and_returns."""
    statements = extract_statements(
        find_source(MAKER),
        "RemoteExperienceMaker.compute_advantages_and_returns",
        first="all_advantages",
        last=None,
        arguments=("experiences", "args"),
        namespace=_namespace(),
    )
    args = SimpleNamespace(algo=SimpleNamespace(advantage=SimpleNamespace(no_std_norm=False)))

    def normalize(advantages: Tensor, mask: Tensor) -> Tensor:
        experience = SimpleNamespace(advantages=advantages, action_mask=mask)
        statements([experience], args)
        return experience.advantages

    return normalize


def _masked_normalize() -> Callable[..., Tensor]:
    function = source_functions("masked_normalize")["masked_normalize"]

    def masked_normalize(
        x: Tensor, mask: Tensor | None = None, *, dim: int | None = None, eps: float = 1e-5, **_: Any
    ) -> Tensor:
        mask = torch.ones_like(x) if mask is None else mask
        return function(x, mask, dim=dim, eps=eps)

    return masked_normalize


def _gae() -> Callable[..., tuple[Tensor, Tensor]]:
    function = advantages_and_returns()

    def gae(
        rewards: Tensor,
        values: Tensor,
        *,
        mask: Tensor | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        return function(None, values, rewards, mask, gamma, lam)

    return gae


def _token_advantages() -> Callable[..., tuple[Tensor, Tensor]]:
    compute_reward = source_functions("compute_reward")["compute_reward"]
    function, normalize = advantages_and_returns(), normalize_advantages()

    def token_advantages(
        score: Tensor,
        kl: Tensor,
        values: Tensor,
        mask: Tensor,
        *,
        kl_coef: float,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        rewards = compute_reward(score, kl_coef, kl, action_mask=mask)
        advantages, returns = function(None, values, rewards, mask, gamma, lam)
        return normalize(advantages, mask), returns

    return token_advantages


def _logprob() -> Callable[..., tuple[Tensor, Tensor]]:
    functions = source_functions("_logsumexp_by_chunk", "log_probs_from_logits", "compute_entropy")

    def logprob(
        logits: Tensor, target: Tensor, *, temperature: float = 1.0, **_: Any
    ) -> tuple[Tensor, Tensor]:
        # log_probs_from_logits divides its argument in place, so the division is done before.
        logits = logits if temperature == 1.0 else logits / temperature
        return functions["log_probs_from_logits"](logits, target), functions["compute_entropy"](logits)

    return logprob


PEERS = [
    Peer(
        stack="openrlhf",
        op="masked_normalize",
        label="OpenRLHF",
        package="openrlhf",
        origin="openrlhf.models.utils.masked_normalize",
        adapter=_masked_normalize,
        semantics={
            "unbiased": False,
            "eps": 1e-8,
            "eps_mode": "clamp",
            "center": True,
            "zero_masked": True,
            "dim": 1,
        },
        options=frozenset({"mask", "dim", "eps"}),
        note="NaN in a masked slot makes its whole row NaN",
    ),
    Peer(
        stack="openrlhf",
        op="gae",
        label="OpenRLHF",
        package="openrlhf",
        origin="openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker.get_advantages_and_returns",
        adapter=_gae,
        semantics={"mask_mode": "zero"},
        options=frozenset({"mask", "gamma", "lam"}),
        directions=("forward",),
        note="NaN in a masked slot reaches the earlier ones",
    ),
    Peer(
        stack="openrlhf",
        op="token_advantages",
        label="OpenRLHF",
        package="openrlhf",
        origin="openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker.compute_advantages_and_returns",
        adapter=_token_advantages,
        semantics={"mask_mode": "zero", "normalize": "openrlhf"},
        options=frozenset({"mask", "kl_coef", "gamma", "lam"}),
        directions=("forward",),
    ),
    Peer(
        stack="openrlhf",
        op="logprob",
        label="OpenRLHF",
        package="openrlhf",
        origin="openrlhf.models.utils.{log_probs_from_logits, compute_entropy}",
        adapter=_logprob,
        options=frozenset({"temperature"}),
        note="compute_entropy is compiled with torch.compile",
    ),
]
