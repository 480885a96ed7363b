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

from rlhf_kernels.stacks import rebind, verl
from rlhf_kernels.stacks.peer import Peer, peers_root
from rlhf_kernels.stacks.rebind import Call, Rebinding, Target
from rlhf_kernels.stacks.source import extract, extract_statements, find_source
from rlhf_kernels.stacks.trl_head import HEAD, NEW, OLD, UTILS, old_function

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


def _wide(logits: Any) -> bool:
    """Whether these are no 16-bit numbers, for which TRL's tests ask for its own rounding, to the bit."""
    return isinstance(logits, Tensor) and logits.dtype.itemsize >= 4


def _our_selective(original: Any) -> Any:
    from rlhf_kernels import logprob

    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if not (_wide(logits) and rebind.picks_tokens(logits, index)) or temperature <= 0:
            return original(logits, index, temperature, row_mask)
        found = logprob(logits, index, temperature=float(temperature))[0].to(logits.dtype)
        return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)

    return selective_log_softmax


def _our_old_selective(original: Any) -> Any:
    from rlhf_kernels import logprob

    def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
        if not (_wide(logits) and rebind.picks_tokens(logits, index)):
            return original(logits, index)
        return logprob(logits, index)[0].to(logits.dtype)

    return selective_log_softmax


def _our_entropy(original: Any) -> Any:
    from rlhf_kernels import logprob

    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        if not (_wide(logits) and rebind.floats(logits) and logits.dim() > 1):
            return original(logits, chunk_size)
        anything = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
        return logprob(logits, anything)[1].to(logits.dtype)

    return entropy_from_logits


def _our_both(original: Any) -> Any:
    from rlhf_kernels import logprob

    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not rebind.picks_tokens(logits, index) or temperature <= 0:
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        found = [x.to(logits.dtype) for x in logprob(logits, index, temperature=float(temperature))]
        if row_mask is not None:
            found = [x.masked_fill(row_mask == 0, 0.0) for x in found]
        return found[0], found[1] if entropy_requires_grad else found[1].detach()

    return selective_log_softmax_and_entropy


def _masked_call(large: bool) -> Call:
    logits, labels = rebind.logits_and_labels(large)
    return Call((logits, labels), {"temperature": 0.7, "row_mask": (labels % 3 > 0).long()})


PATCH = Target(
    name="trl",
    package="trl",
    root="trl",
    checked=(*OLD, *NEW),
    rebindings=(
        *HEAD,
        Rebinding(
            name="selective_log_softmax",
            op="logprob",
            place=f"{UTILS}:selective_log_softmax",
            make=_our_selective,
            call=_masked_call,
            versions=NEW,
            note="in 16 bits TRL's own",
        ),
        Rebinding(
            name="selective_log_softmax",
            op="logprob",
            place=f"{UTILS}:selective_log_softmax",
            make=_our_old_selective,
            source=old_function("selective_log_softmax"),
            call=lambda large: Call(rebind.logits_and_labels(large)),
            versions=OLD,
            note="in 16 bits TRL's own",
        ),
        Rebinding(
            name="entropy_from_logits",
            op="logprob",
            place=f"{UTILS}:entropy_from_logits",
            make=_our_entropy,
            call=lambda large: Call(rebind.logits_and_labels(large)[:1]),
            note="in 16 bits TRL's own; a logit of -inf adds 0, where TRL gives NaN",
        ),
        Rebinding(
            name="selective_log_softmax_and_entropy",
            op="logprob",
            place=f"{UTILS}:selective_log_softmax_and_entropy",
            make=_our_both,
            call=_masked_call,
            versions=NEW,
        ),
        Rebinding(
            name="masked_whiten",
            op="masked_normalize",
            place="trl.experimental.ppo.ppo_trainer:masked_whiten",
            make=verl.whitening,
            source=masked_whiten,
            call=verl.whiten_call,
            versions=OLD,
            note="fewer than two real elements go to TRL's own, which raises or gives NaN",
        ),
    ),
    untouched={
        "PPO's advantages (1.12)": "a loop inside PPOTrainer.train, which is no function",
        "chunked_divergence (1.16)": "no operator of ours computes it",
    },
)
