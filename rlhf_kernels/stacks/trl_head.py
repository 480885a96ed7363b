"""TRL's fused loss head, with which its trainers score tokens, by `linear_logprob`; of 1.16 and of 1.12."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks.peer import peers_root
from rlhf_kernels.stacks.rebind import Call, Rebinding
from rlhf_kernels.stacks.source import extract, find_source

OLD, NEW, UTILS = ("1.12.0",), ("1.16.0",), "trl.trainer.utils"


def old_function(name: str) -> Callable[[], Any]:
    """A function of TRL 1.12's trainer/utils.py, from the folder where `make peers` puts that release."""

    def source() -> Any:
        path = find_source("trl/trainer/utils.py", [peers_root() / "trl-1.12"])
        return extract(path, name, namespace={"torch": torch, "F": torch.nn.functional})[name]

    return source


def _head_pays(hidden: Tensor, weight: Tensor, softcap: float | None, scale: float) -> bool:
    """Whether `linear_logprob` can say this call: no scaled cap, no head that DeepSpeed has parted."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and not hasattr(weight, "ds_id")
    return plain and hidden.dim() == 2 and scale > 0 and (softcap is None or scale == 1.0)


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    softcap: float | None, scale: float, dtype: torch.dtype, outputs: tuple[str, ...] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    from rlhf_kernels import linear_logprob

    bias = None if bias is None else bias.to(dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    temperature = float(temperature / scale)
    options = {"temperature": temperature, "softcap": softcap, "outputs": outputs}
    return linear_logprob(hidden, weight, targets, bias=bias, **options)


# TRL's names of what it logs besides -> those of `outputs` of our `linear_logprob`.
_MORE = {"log_sum_sq_probs": "log_sum_p2", "mean_logits": "mean_logit", "is_top1": "is_top1"}


def _our_head(original: Any) -> Any:
    class _ChunkedLogProbFunction:
        """TRL 1.16's: log-probability, entropy, log sum p^2, mean logit, is_top1; None where not asked."""

        @staticmethod
        def apply(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
            chunk_size: int, final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> tuple[Tensor | None, ...]:  # fmt: skip
            softcap = final_logit_softcapping
            if not _head_pays(hidden, weight, softcap, logit_scale):
                return original.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
                )
            device = hidden.device.type
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
            more = [name for name in _MORE if name in outputs]
            names = tuple(_MORE[name] for name in more)
            found = _head(hidden, weight, bias, targets, temperature, softcap, logit_scale, dtype, names)
            logged = dict(zip(more, found[2:]))
            return found[0], found[1] if "entropy" in outputs else None, *map(logged.get, _MORE)

    return _ChunkedLogProbFunction


def _our_old_head(original: Any, entropy_gradient: bool = False) -> Any:
    class _ChunkedLogProbFunction:
        """TRL 1.12's: (log-probability, entropy); no gradient goes through its entropy."""

        @staticmethod
        def apply(
            last_hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int,
            final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            softcap = final_logit_softcapping
            if not _head_pays(last_hidden, weight, softcap, logit_scale):
                return original.apply(
                    last_hidden, weight, targets, temperature, chunk_size, softcap, logit_scale
                )
            dtype = last_hidden.dtype
            found = _head(last_hidden, weight, None, targets, temperature, softcap, logit_scale, dtype)
            return found[0], found[1] if entropy_gradient else found[1].detach()

    return _ChunkedLogProbFunction


def _head_call(large: bool) -> Call:
    hidden, weight, bias, targets = _head_inputs(large)
    chunk = 8192 if large else 40
    # As DPO asks, with WPO for the third too; GRPO for the first two.
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    args = (hidden, weight, bias, targets, 0.7, chunk, None, 0.5, outputs)
    return Call(args, {}, lambda function, *args: function.apply(*args))


def _old_head_call(large: bool) -> Call:
    hidden, weight, _, targets = _head_inputs(large)
    args = (hidden, weight, targets, 0.7, 8192 if large else 40)
    return Call(args, {}, lambda function, *args: function.apply(*args)[0])


def _head_inputs(large: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, E], weight [V, E] and bias [V] that require gradients; targets [N], some the likeliest."""
    rows, width, vocabulary = (128, 256, 50257) if large else (13, 8, 131)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw).mul_(0.3).requires_grad_()
    bias = torch.randn(vocabulary, generator=draw).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    with torch.no_grad():
        targets[::3] = torch.addmm(bias, hidden[::3], weight.t()).argmax(-1)
    return hidden, weight, bias, targets


HEAD = (
    Rebinding(
        name="loss_head",
        op="linear_logprob",
        place=f"{UTILS}:_ChunkedLogProbFunction",
        make=_our_head,
        call=_head_call,
        versions=NEW,
        note="a head that DeepSpeed's ZeRO-3 has parted goes to TRL's own",
    ),
    Rebinding(
        name="loss_head",
        op="linear_logprob",
        place=f"{UTILS}:_ChunkedLogProbFunction",
        make=_our_old_head,
        source=old_function("_ChunkedLogProbFunction"),
        call=_old_head_call,
        versions=OLD,
        note="as in TRL 1.12, the entropy passes no gradient on",
    ),
    Rebinding(
        name="loss_head:entropy_gradient",
        op="linear_logprob",
        place=f"{UTILS}:_ChunkedLogProbFunction",
        make=lambda original: _our_old_head(original, entropy_gradient=True),
        source=old_function("_ChunkedLogProbFunction"),
        call=_old_head_call,
        versions=OLD,
        chosen=False,
        note="TRL 1.12 drops the gradient of an entropy bonus; this has it",
    ),
)
