"""Records log-probabilities and entropies, from logits and from hidden states, of each stack."""

from __future__ import annotations

from typing import Any

import torch
from golden.inputs import generator, values
from torch import Tensor

from rlhf_kernels.stacks import openrlhf, peers

LOGITS = ((2, 3, 11), (1, 4, 50), (1, 1, 2), (1, 2, 1))


def source(stack: str, op: str, function: str) -> tuple[str, str, str]:
    """Package, version and the function's own name."""
    peer = peers(op, stack)[-1]
    return peer.package, peer.version() or "", function


def record_logprob(book: Any) -> None:
    """TRL, verl and OpenRLHF; logits are divided before where a function takes no temperature."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    from verl.utils import torch_functional as verl

    utils = openrlhf.source_functions("_logsumexp_by_chunk", "log_probs_from_logits")

    def trl_logprob(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        return selective_log_softmax(logits, target, temperature=temperature)

    def verl_logprob(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        return verl.logprobs_from_logits(logits / temperature, target)

    def openrlhf_logprob(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        return utils["log_probs_from_logits"](logits / temperature, target)

    def of_entropy(function: Any) -> Any:
        return lambda logits, target, temperature: function(logits / temperature)

    trl_module, verl_module, openrlhf_module = "trl.trainer.utils", verl.__name__, "openrlhf.models.utils"
    calls = (
        ("trl", f"{trl_module}.selective_log_softmax", trl_logprob, "logprob"),
        ("trl", f"{trl_module}.entropy_from_logits", of_entropy(entropy_from_logits), "entropy"),
        ("verl", f"{verl_module}.logprobs_from_logits", verl_logprob, "logprob"),
        ("verl", f"{verl_module}.entropy_from_logits", of_entropy(verl.entropy_from_logits), "entropy"),
        ("openrlhf", f"{openrlhf_module}.log_probs_from_logits", openrlhf_logprob, "logprob"),
    )
    for stack, function, call, output in calls:
        name = source(stack, "logprob", function)
        for i, shape in enumerate(LOGITS):
            for kind, scale in (("normal", 1.0), ("normal", 30.0), ("offset", 1.0)):
                for temperature in (1.0, 0.7):
                    logits = values(kind, shape, generator(i), torch.float32) * scale
                    target = torch.randint(0, shape[-1], shape[:-1], generator=generator(i, 1))
                    case = f"{'x'.join(map(str, shape))}/{kind}/times_{scale:g}"
                    inputs = {"logits": logits, "target": target}
                    kwargs = {"temperature": temperature}
                    book.add(name, case, call, inputs, kwargs, wrt=("logits",), outputs=(output,))


def record_linear_logprob(book: Any) -> None:
    """The loss heads of TRL, verl and Liger on a CPU, which is their PyTorch form."""
    for peer in peers("linear_logprob"):
        if "cpu" not in peer.devices:
            continue
        call = peer.load()
        for i, (n, e, v) in enumerate(((6, 8, 11), (3, 16, 50), (1, 4, 2))):
            hidden = values("normal", (n, e), generator(i, 2), torch.float32)
            weight = values("normal", (v, e), generator(i, 3), torch.float32) * 0.5
            target = torch.randint(0, v, (n,), generator=generator(i, 4))
            variants = [{"temperature": 1.0}, {"temperature": 0.7}]
            variants += [{"temperature": 1.0, "softcap": 5.0}] if "softcap" in peer.options else []
            for kwargs in variants:
                inputs = {"hidden": hidden, "weight": weight, "target": target}
                if "softcap" in kwargs:
                    inputs["bias"] = values("normal", (v,), generator(i, 5), torch.float32)
                wrt = tuple(name for name in inputs if name != "target")
                name = (peer.package, peer.version() or "", peer.origin)
                outputs = ("logprob", "entropy")
                book.add(name, f"{n}x{e}x{v}", call, inputs, kwargs, wrt=wrt, outputs=outputs)
