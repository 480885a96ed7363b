"""TRL: the fused loss head of the current releases, and the PPO of 1.12, the last release that had one.

PPO's advantages are statements inside `PPOTrainer.train`; they are run from the installed source of the
release that `make peers` puts apart, or from an installed TRL that still has the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks.peer import Peer, peers_root
from rlhf_kernels.stacks.source import extract, extract_statements, find_source

PPO = "trl/experimental/ppo/ppo_trainer.py"


def _ppo_folder() -> Path | None:
    folder = peers_root() / "trl-1.12"
    return folder if (folder / PPO).is_file() else None


def _ppo_source() -> Path:
    folder = _ppo_folder()
    return find_source(PPO, [folder] if folder else [])


def masked_whiten() -> Callable[..., Tensor]:
    """masked_whiten(values, mask, shift_mean=True) of TRL's PPO."""
    names = ("masked_mean", "masked_var", "masked_whiten")
    return extract(_ppo_source(), *names, namespace={"torch": torch})["masked_whiten"]


def ppo_statements(first: str, last: str, arguments: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    """A part of PPOTrainer.train as a function that returns its local variables."""
    namespace = {"torch": torch, "masked_whiten": masked_whiten()}
    return extract_statements(
        _ppo_source(), "PPOTrainer.train", first=first, last=last, arguments=arguments, namespace=namespace
    )


def _masked_normalize() -> Callable[..., Tensor]:
    function = masked_whiten()

    def masked_normalize(x: Tensor, mask: Tensor | None = None, *, center: bool = True, **_: Any) -> Tensor:
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        return function(x, mask, shift_mean=center)

    return masked_normalize


def _gae() -> Callable[..., tuple[Tensor, Tensor]]:
    statements = ppo_statements("lastgaelam", "returns", ("rewards", "values", "responses", "args"))

    @torch.no_grad()
    def gae(
        rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 0.95, **_: Any
    ) -> tuple[Tensor, Tensor]:
        result = statements(rewards, values, rewards, SimpleNamespace(gamma=gamma, lam=lam))
        return result["advantages"], result["returns"]

    return gae


def _logprob() -> Callable[..., tuple[Tensor, Tensor]]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def logprob(
        logits: Tensor, target: Tensor, *, temperature: float = 1.0, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return selective_log_softmax_and_entropy(logits, target, temperature=temperature)

    return logprob


def _linear_logprob() -> Callable[..., tuple[Tensor, Tensor]]:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    def linear_logprob(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, bias, target)
        settings = (temperature, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, 1.0, ("entropy",))
        return _ChunkedLogProbFunction.apply(*inputs, *settings)[:2]

    return linear_logprob


PEERS = [
    Peer(
        stack="trl",
        op="masked_normalize",
        label="TRL PPO",
        package="trl",
        origin="trl.experimental.ppo.ppo_trainer.masked_whiten",
        adapter=_masked_normalize,
        semantics={"unbiased": True, "eps": 1e-8, "eps_mode": "add", "zero_masked": False, "dim": None},
        options=frozenset({"mask", "center"}),
        folder=_ppo_folder,
        note="NaN in a masked slot makes everything NaN; an empty mask raises; one real element gives NaN",
    ),
    Peer(
        stack="trl",
        op="gae",
        label="TRL PPO",
        package="trl",
        origin="trl.experimental.ppo.ppo_trainer.PPOTrainer.train, step 6",
        adapter=_gae,
        semantics={"mask_mode": "ignored"},
        options=frozenset({"gamma", "lam"}),
        directions=("forward",),
        folder=_ppo_folder,
        note="knows no mask: the trainer zeroes values past the response before, and advantages after",
    ),
    Peer(
        stack="trl",
        op="logprob",
        label="TRL",
        package="trl",
        origin="trl.trainer.utils.selective_log_softmax_and_entropy",
        adapter=_logprob,
        options=frozenset({"temperature"}),
        note="a Triton kernel on a GPU, a loop over rows on a CPU",
    ),
    Peer(
        stack="trl",
        op="linear_logprob",
        label="TRL",
        package="trl",
        origin="trl.trainer.utils._ChunkedLogProbFunction",
        adapter=_linear_logprob,
        options=frozenset({"bias", "temperature", "softcap"}),
        note="an ignored target has to be masked by the caller",
    ),
]
