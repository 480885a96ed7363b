"""palm-rlhf-pytorch: the parts of its PaLM block, and the normalisation and log-probabilities of its PPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks import rebind
from rlhf_kernels.stacks.liger import full_width
from rlhf_kernels.stacks.palm_generation import cached_generate
from rlhf_kernels.stacks.palm_rollout import ROLLOUT
from rlhf_kernels.stacks.palm_training import TRAINING
from rlhf_kernels.stacks.peer import Peer, Unavailable
from rlhf_kernels.stacks.rebind import Call, Rebinding, Target


def _attention() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.attention import Attention

    modules = {causal: Attention(causal=causal).eval() for causal in (False, True)}

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        if k.shape[1] != 1:
            raise Unavailable("palm-rlhf-pytorch has multi-query attention only: one key head")
        if causal and q.shape[2] != k.shape[2]:
            raise Unavailable("palm-rlhf-pytorch has causal attention for as many queries as keys only")
        return modules[causal](q, k[:, 0], v[:, 0], mask=key_mask)

    return attention


def _rotary() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.palm import apply_rotary_pos_emb

    last: list[Any] = [None, None]  # the tables seen last and what they were turned into

    def angles(tables: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """The stack wants angles and a scale, and takes the cosine of the angles at every call."""
        cos, sin = (full_width(table, width) for table in tables)
        if cos.dim() == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.atan2(sin, cos), torch.hypot(sin, cos)

    def rotary(x: Tensor, tables: Sequence[Tensor], **_: Any) -> Tensor:
        if last[0] is not tables:
            last[:] = [tables, angles(tables, x.shape[-1])]
        positions, scale = last[1]
        return apply_rotary_pos_emb(positions, x, scale)

    return rotary


def _swiglu() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.palm import SwiGLU

    def swiglu(x: Tensor, gate: Tensor | None = None, **_: Any) -> Tensor:
        if gate is not None:
            raise Unavailable("palm-rlhf-pytorch takes values and gate in one tensor only")
        return module(x)

    module = SwiGLU()
    return swiglu


def _layer_norm() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.palm import LayerNorm

    def layer_norm(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return LayerNorm.forward(SimpleNamespace(gamma=weight, beta=torch.zeros_like(weight)), x)

    return layer_norm


def _masked_normalize() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.ppo import masked_normalize as function

    def masked_normalize(
        x: Tensor, mask: Tensor | None = None, *, dim: int | None = None, eps: float = 1e-5, **_: Any
    ) -> Tensor:
        if mask is None and dim is not None:
            raise Unavailable("palm-rlhf-pytorch drops the reduced dimension where there is no mask")
        return function(x, eps=eps, mask=None if mask is None else mask.bool(), dim=dim)

    return masked_normalize


def _logprob() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.ppo import log_prob

    def logprob(logits: Tensor, target: Tensor, *, temperature: float = 1.0, **_: Any) -> Tensor:
        if logits.dim() != 3:
            raise Unavailable("palm-rlhf-pytorch takes logits [B, T, V] only")
        logits = logits if temperature == 1.0 else logits / temperature
        return log_prob(logits.softmax(dim=-1), target)

    return logprob


_STACK = {"stack": "palm_rlhf_pytorch", "label": "palm-rlhf-pytorch", "package": "palm-rlhf-pytorch"}

PEERS = [
    Peer(
        **_STACK,
        op="attention",
        origin="palm_rlhf_pytorch.attention.Attention.forward",
        adapter=_attention,
        options=frozenset({"causal", "key_mask"}),
        note="a query with no key allowed gets the mean of all values",
    ),
    Peer(
        **_STACK,
        op="rotary",
        origin="palm_rlhf_pytorch.palm.apply_rotary_pos_emb",
        adapter=_rotary,
        semantics={"interleaved": False},
    ),
    Peer(
        **_STACK,
        op="swiglu",
        origin="palm_rlhf_pytorch.palm.SwiGLU.forward",
        adapter=_swiglu,
        semantics={"gate_first": False},
    ),
    Peer(
        **_STACK,
        op="layer_norm",
        origin="palm_rlhf_pytorch.palm.LayerNorm.forward",
        adapter=_layer_norm,
        semantics={"eps": 1e-5, "weight_offset": 1.0},
    ),
    Peer(
        **_STACK,
        op="masked_normalize",
        origin="palm_rlhf_pytorch.ppo.masked_normalize",
        adapter=_masked_normalize,
        semantics={"unbiased": False, "eps": 1e-5, "eps_mode": "clamp", "center": True, "zero_masked": False},
        options=frozenset({"mask", "dim", "eps"}),
        note="an empty mask gives mean 0 and variance 0, so the values times eps^-1/2",
    ),
    Peer(
        **_STACK,
        op="logprob",
        origin="palm_rlhf_pytorch.ppo.log_prob of a softmax",
        adapter=_logprob,
        options=frozenset({"temperature"}),
        outputs=("logprob",),
        note="goes through probabilities, so it cannot fall below log(1e-20)",
    ),
]


def _our_attend(original: Any) -> Any:
    from rlhf_kernels import attention

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention.forward: one key head. Dropout, a key mask and 16 bits on a CPU go to the original."""
        plain = self.attn_dropout.p == 0.0 or not self.training
        square = self.causal is False or q.shape[2] == k.shape[1]
        if not plain or not square or mask is not None or k.dim() != 3 or not rebind.floats(k, v):
            return original(self, q, k, v, mask)
        return attention(q, k[:, None], v[:, None], causal=self.causal)

    return forward


def _our_rotary(original: Any) -> Any:
    from rlhf_kernels import RotaryTable
    from rlhf_kernels import rotary as rotate

    def apply_rotary_pos_emb(pos: Tensor, t: Tensor, scale: Any = 1.0) -> Tensor:
        half, alike = pos.shape[-1] // 2, isinstance(scale, Tensor) and scale.shape == pos.shape
        fits = alike and pos.dim() == 2 and t.dim() > 2 and t.shape[-2:] == pos.shape
        if not fits or pos.dtype is not torch.float32 or t.dtype is not torch.float32:
            return original(pos, t, scale)
        # Both halves of angles and scales are the same numbers.
        angles, scale = pos[:, :half], scale[:, :half]
        return rotate(t, RotaryTable(angles.cos() * scale, angles.sin() * scale))

    return apply_rotary_pos_emb


def _our_swiglu(original: Any) -> Any:
    from rlhf_kernels import swiglu

    def forward(self: Any, x: Tensor) -> Tensor:
        return swiglu(x)

    return forward


def _our_norm(original: Any) -> Any:
    from rlhf_kernels import layer_norm

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.gamma.dtype != x.dtype and self.gamma.dtype != torch.float32:
            return original(self, x)
        return layer_norm(x, self.gamma, bias=self.beta, weight_offset=1.0)

    return forward


def _our_normalize(original: Any) -> Any:
    from rlhf_kernels import masked_normalize as normalize

    def masked_normalize(t: Tensor, eps: float = 1e-5, mask: Tensor | None = None, dim: Any = None) -> Tensor:
        """The stack's: clamps the variance. Without a mask it drops the dimension, which is left to it."""
        real = rebind.as_booleans(mask, t.shape) if rebind.floats(t) and mask is not None else None
        if real is None or real.device != t.device:
            return original(t, eps, mask, dim)
        return normalize(t, real, dim=dim, eps=eps)

    return masked_normalize


def _right_top_p(original: Any) -> Any:
    def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
        """The smallest set of tokens with at least `thres` of the mass; the stack keeps 1 - thres of it."""
        return original(logits, 1 - thres)

    return top_p


def _palm(large: bool, **options: Any) -> Any:
    from palm_rlhf_pytorch import PaLM

    torch.manual_seed(0)
    size = {"dim": 128, "depth": 2} if large else {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2}
    model = PaLM(num_tokens=256, **size, **options)
    model.add_finetune_params("actor")
    for parameter in model.finetune_modules.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def _generate_call(large: bool) -> Call:
    prompt = torch.randint(256, (4 if large else 2, 8), generator=torch.Generator().manual_seed(1))
    options = {"prompt": prompt, "finetune_scope": "actor", "temperature": 0.8, "eos_token": 7}
    return Call((_palm(large), 64 if large else 24), options)


def _attend_call(large: bool) -> Call:
    from palm_rlhf_pytorch.attention import Attention

    shape = (2, 8, 256, 64) if large else (2, 3, 17, 8)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    k, v = torch.randn(2, shape[0], *shape[2:], generator=torch.Generator().manual_seed(1))
    return Call((Attention(causal=True), q, k.requires_grad_(), v.requires_grad_()))


def _rotary_call(large: bool) -> Call:
    from palm_rlhf_pytorch.palm import RotaryEmbedding

    shape = (2, 8, 256, 64) if large else (2, 3, 17, 8)
    positions, scale = RotaryEmbedding(shape[-1])(shape[2], "cpu")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return Call((positions, x, scale))


def _module_call(name: str, width: int) -> Callable[[bool], Call]:
    def call(large: bool) -> Call:
        from palm_rlhf_pytorch import palm

        shape = (2048, width) if large else (5, 3, 24)
        module = palm.LayerNorm(shape[-1]) if name == "LayerNorm" else getattr(palm, name)()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        return Call((module, torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()))

    return call


def _normalize_call(large: bool) -> Call:
    values, _, mask = rebind.left_padded(large)
    return Call((values.requires_grad_(),), {"mask": mask})


_PALM = "palm_rlhf_pytorch.palm"


def _torch_norm(device: str) -> str | None:
    return "F.layer_norm is fused already, and faster on a CPU" if device == "cpu" else None


PATCH = Target(
    name="palm_rlhf_pytorch",
    package="palm-rlhf-pytorch",
    root="palm_rlhf_pytorch",
    checked=("0.8.0",),
    rebindings=(
        Rebinding(
            name="generate",
            op="decode_attention",
            place=f"{_PALM}:PaLM.generate",
            make=cached_generate,
            call=_generate_call,
            backends=rebind.FAST | {"torch"},
            note="the same random numbers, so the same tokens but for rounding; copies the blocks' weights",
        ),
        ROLLOUT,
        *TRAINING,
        Rebinding(
            name="attention",
            op="attention",
            place="palm_rlhf_pytorch.attention:Attention.forward",
            make=_our_attend,
            call=_attend_call,
            backends=rebind.FAST | {"torch"},
            note="dropout and key masks go to the stack's own",
        ),
        Rebinding(
            name="rotary",
            op="rotary",
            place=f"{_PALM}:apply_rotary_pos_emb",
            make=_our_rotary,
            call=_rotary_call,
            note="in 16 bits the stack's own",
        ),
        Rebinding(
            name="swiglu",
            op="swiglu",
            place=f"{_PALM}:SwiGLU.forward",
            make=_our_swiglu,
            call=_module_call("SwiGLU", 4096),
        ),
        Rebinding(
            name="layer_norm",
            op="layer_norm",
            place=f"{_PALM}:LayerNorm.forward",
            make=_our_norm,
            call=_module_call("LayerNorm", 512),
            leave=_torch_norm,
        ),
        Rebinding(
            name="masked_normalize",
            op="masked_normalize",
            place="palm_rlhf_pytorch.ppo:masked_normalize",
            make=_our_normalize,
            call=_normalize_call,
        ),
        Rebinding(
            name="top_p:right",
            op="",
            place="palm_rlhf_pytorch.utils:top_p",
            make=_right_top_p,
            call=lambda large: Call((rebind.logits_and_labels(large)[0][0].detach(),)),
            chosen=False,
            note="keeps the share that is asked for; the stack keeps what it should cut",
        ),
    ),
    untouched={
        "log_prob, masked_kl_div and masked_entropy": "they take probabilities, not logits",
    },
)
