"""TorchRL: GAE as a loop over time and as a convolution with a truncated filter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks.peer import Peer


def _gae(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    from torchrl.objectives.value import functional

    function = getattr(functional, name)

    def gae(
        rewards: Tensor,
        values: Tensor,
        *,
        done: Tensor | None = None,
        next_value: Tensor | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        last = torch.zeros_like(values[:, :1]) if next_value is None else next_value.reshape(-1, 1)
        following = torch.cat([values[:, 1:], last], dim=1)
        done = torch.zeros_like(rewards, dtype=torch.bool) if done is None else done.bool()
        columns = (values, following, rewards, done, done)
        advantages, returns = function(gamma, lam, *(column.unsqueeze(-1) for column in columns))
        return advantages.squeeze(-1), returns.squeeze(-1)

    return gae


PEERS = [
    Peer(
        stack="torchrl",
        op="gae",
        label="TorchRL loop",
        package="torchrl",
        origin="torchrl.objectives.value.functional.generalized_advantage_estimate",
        adapter=partial(_gae, "generalized_advantage_estimate"),
        options=frozenset({"done", "next_value", "gamma", "lam"}),
    ),
    Peer(
        stack="torchrl",
        op="gae",
        label="TorchRL vectorised",
        package="torchrl",
        origin="torchrl.objectives.value.functional.vec_generalized_advantage_estimate",
        adapter=partial(_gae, "vec_generalized_advantage_estimate"),
        options=frozenset({"done", "next_value", "gamma", "lam"}),
        note="the filter is cut where (gamma lam)^t falls below 1e-7, so it is not exact",
    ),
]
