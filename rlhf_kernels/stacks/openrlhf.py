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

from rlhf_kernels.stacks import rebind
from rlhf_kernels.stacks.peer import Peer
from rlhf_kernels.stacks.rebind import Call, Rebinding, Target
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


def _our_advantages(original: Any) -> Any:
    from rlhf_kernels import gae

    @torch.no_grad()
    def get_advantages_and_returns(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        """OpenRLHF's: masked steps are steps of reward and value 0; action_mask may be None."""
        whole = rebind.floats(rewards, values) and values.dim() == 2 and rebind.is_number(gamma, lambd)
        mask = rebind.as_booleans(action_mask, values.shape) if whole else None
        if not whole or (mask is None and action_mask is not None):
            return original(self, values, rewards, action_mask, gamma, lambd)
        return gae(rewards, values, mask=mask, gamma=float(gamma), lam=float(lambd), mask_mode="zero")

    return get_advantages_and_returns


def _our_logprobs(original: Any) -> Any:
    from rlhf_kernels import logprob

    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """OpenRLHF's: divides the logits in place, which `Actor` counts on for the entropy."""
        if not rebind.picks_tokens(logits, labels):
            return original(logits, labels, temperature)
        if temperature != 1.0:
            logits.div_(temperature)
        return logprob(logits, labels)[0].to(logits.dtype)

    return log_probs_from_logits


def _our_entropy(original: Any) -> Any:
    from rlhf_kernels import logprob

    def compute_entropy(logits: Tensor) -> Tensor:
        if not (rebind.floats(logits) and logits.dim() > 1):
            return original(logits)
        anything = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
        return logprob(logits, anything)[1].to(logits.dtype)

    return compute_entropy


def _our_normalize(original: Any) -> Any:
    from rlhf_kernels import masked_normalize as normalize

    def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
        real = rebind.as_booleans(mask, tensor.shape) if rebind.floats(tensor) else None
        if real is None or real.device != tensor.device:
            return original(tensor, mask, dim, eps)
        return normalize(tensor, real, dim=dim, eps=eps, zero_masked=True)

    return masked_normalize


def _advantages_call(large: bool) -> Call:
    rewards, values, mask = rebind.left_padded(large)
    return Call((None, values, rewards, mask.long(), 0.99, 0.95))


def _logprobs_call(large: bool) -> Call:
    logits, labels = rebind.logits_and_labels(large)

    def invoke(function: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        divided = logits * 1  # what is divided in place cannot be a leaf
        return function(divided, labels, 0.7), divided

    return Call((logits, labels), {}, invoke)


def _normalize_call(large: bool) -> Call:
    values, _, mask = rebind.left_padded(large)
    return Call((values.requires_grad_(), mask.long()))


_UTILS, _LOGPROBS = "openrlhf.models.utils", "log_probs_from_logits"

PATCH = Target(
    name="openrlhf",
    package="openrlhf",
    root="openrlhf",
    checked=("0.11.2",),
    rebindings=(
        Rebinding(
            name="get_advantages_and_returns",
            op="gae",
            place="openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns",
            make=_our_advantages,
            source=advantages_and_returns,
            call=_advantages_call,
            backends=rebind.FAST | {"torch"},
            note="NaN in a masked slot reaches its own slot only",
        ),
        Rebinding(
            name="log_probs_from_logits",
            op="logprob",
            place=f"{_UTILS}:log_probs_from_logits",
            make=_our_logprobs,
            source=lambda: source_functions("_logsumexp_by_chunk", _LOGPROBS)[_LOGPROBS],
            call=_logprobs_call,
        ),
        Rebinding(
            name="compute_entropy",
            op="logprob",
            place=f"{_UTILS}:compute_entropy",
            make=_our_entropy,
            source=lambda: source_functions("compute_entropy")["compute_entropy"],
            call=lambda large: Call(rebind.logits_and_labels(large)[:1]),
            note="a logit of -inf adds 0, where OpenRLHF gives NaN; nothing is compiled",
        ),
        Rebinding(
            name="masked_normalize",
            op="masked_normalize",
            place=f"{_UTILS}:masked_normalize",
            make=_our_normalize,
            source=lambda: source_functions("masked_normalize")["masked_normalize"],
            call=_normalize_call,
            note="NaN in a masked slot reaches nothing, where OpenRLHF makes its whole row NaN",
        ),
    ),
    untouched={
        "compute_reward, compute_approx_kl and the losses": (
            "elementwise; a second copy of a loss is where patches go wrong"
        ),
        "the normalisation over all experiences": "statements inside compute_advantages_and_returns",
    },
)
