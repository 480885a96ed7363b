"""TorchRL: GAE and lambda-returns as loops over time and as convolutions with truncated filters; V-trace."""

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
        following, ends = _columns(rewards, values, done, next_value)
        columns = (values, following, rewards, ends, ends)
        advantages, returns = function(gamma, lam, *(column.unsqueeze(-1) for column in columns))
        return advantages.squeeze(-1), returns.squeeze(-1)

    return gae


def _columns(
    x: Tensor, values: Tensor, done: Tensor | None, next_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What follows each step, and the ends of episodes, as TorchRL wants them."""
    last = torch.zeros_like(values[:, :1]) if next_value is None else next_value.reshape(-1, 1)
    ends = torch.zeros_like(x, dtype=torch.bool) if done is None else done.bool()
    return torch.cat([values[:, 1:], last], dim=1), ends


def _lambda_return(name: str) -> Callable[..., Tensor]:
    from torchrl.objectives.value import functional

    function = getattr(functional, name)

    def lambda_return(
        rewards: Tensor,
        values: Tensor,
        *,
        done: Tensor | None = None,
        next_value: Tensor | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> Tensor:
        following, ends = _columns(rewards, values, done, next_value)
        columns = (x.unsqueeze(-1) for x in (following, rewards, ends, ends))
        return function(gamma, lam, *columns).squeeze(-1)

    return lambda_return


def _vtrace() -> Callable[..., tuple[Tensor, Tensor]]:
    from torchrl.objectives.value.functional import vtrace_advantage_estimate

    def vtrace(
        log_ratio: Tensor,
        rewards: Tensor,
        values: Tensor,
        *,
        done: Tensor | None = None,
        next_value: Tensor | None = None,
        gamma: float = 1.0,
        rho_clip: float = 1.0,
        c_clip: float = 1.0,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        following, ends = _columns(rewards, values, done, next_value)
        columns = (log_ratio, torch.zeros_like(log_ratio), values, following, rewards, ends, ends)
        columns = (x.unsqueeze(-1) for x in columns)
        advantages, targets = vtrace_advantage_estimate(gamma, *columns, rho_thresh=rho_clip, c_thresh=c_clip)
        return targets.squeeze(-1), advantages.squeeze(-1)

    return vtrace


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
    *(
        Peer(
            stack="torchrl",
            op="lambda_return",
            label=label,
            package="torchrl",
            origin=f"torchrl.objectives.value.functional.{name}",
            adapter=partial(_lambda_return, name),
            options=frozenset({"done", "next_value", "gamma", "lam"}),
        )
        for label, name in (
            ("TorchRL loop", "td_lambda_return_estimate"),
            ("TorchRL vectorised", "vec_td_lambda_return_estimate"),
        )
    ),
    Peer(
        stack="torchrl",
        op="vtrace",
        label="TorchRL loop",
        package="torchrl",
        origin="torchrl.objectives.value.functional.vtrace_advantage_estimate",
        adapter=_vtrace,
        options=frozenset({"done", "next_value", "gamma", "rho_clip", "c_clip"}),
    ),
]
