"""Records the parts of palm-rlhf-pytorch's PaLM, and two whole models with their weights."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from golden.inputs import generator, masks, values
from torch import Tensor

PACKAGE = "palm-rlhf-pytorch"


def source(function: str) -> tuple[str, str, str]:
    """Package, version and the function's own name."""
    return PACKAGE, version(PACKAGE), f"palm_rlhf_pytorch.{function}"


def normal(shape: tuple[int, ...], *seed: int) -> Tensor:
    """Standard normal values in float32."""
    return values("normal", shape, generator(*seed), torch.float32)


def record_rotary(book: Any) -> None:
    """Tables of RotaryEmbedding (angles, scale), and queries and keys turned by them."""
    from palm_rlhf_pytorch.palm import RotaryEmbedding, apply_rotary_pos_emb

    for t, d, base, xpos in ((16, 8, 512, True), (5, 4, 16, True), (16, 8, 512, False), (1, 2, 512, True)):
        tables = RotaryEmbedding(d, scale_base=base, use_xpos=xpos)(t, device=torch.device("cpu"))
        kwargs = {"D": d, "T": t, "xpos_scale_base": base if xpos else None}
        book.add(source("palm.RotaryEmbedding"), f"{t}x{d}", lambda tables=tables, **_: tables, {}, kwargs,
                 outputs=("angles", "scale"))  # fmt: skip
        angles, scale = tables
        for name, factor, heads in (("queries", scale, 3), ("keys", scale**-1, None)):
            x = normal((2, heads, t, d) if heads else (2, t, d), t, d)
            book.add(
                source("palm.apply_rotary_pos_emb"),
                f"{t}x{d}/{name}",
                lambda x, angles, scale, **_: apply_rotary_pos_emb(angles, x, scale),
                {"x": x, "angles": angles, "scale": factor},
                kwargs,
                wrt=("x",),
            )


def record_swiglu(book: Any) -> None:
    """SwiGLU of values and gate in one tensor, the gate in the second half."""
    from palm_rlhf_pytorch.palm import SwiGLU

    for i, (shape, scale) in enumerate((((4, 14), 1.0), ((2, 3, 32), 1.0), ((1, 2), 1.0), ((3, 8), 40.0))):
        x = normal(shape, i) * scale
        book.add(source("palm.SwiGLU.forward"), "x".join(map(str, shape)), SwiGLU(), {"x": x}, wrt=("x",))


def record_layer_norm(book: Any) -> None:
    """LayerNorm without bias, its weight stored as gamma with the factor 1 + gamma."""
    from palm_rlhf_pytorch.palm import LayerNorm

    def call(x: Tensor, weight: Tensor) -> Tensor:
        module = LayerNorm(x.shape[-1])
        return torch.func.functional_call(module, {"gamma": weight}, (x,))

    for i, (shape, offset) in enumerate((((4, 7), 0.0), ((2, 3, 16), 0.0), ((3, 16), 50.0), ((2, 1), 0.0))):
        inputs = {"x": normal(shape, i) + offset, "weight": normal(shape[-1:], i, 1) * 0.3}
        name = f"{'x'.join(map(str, shape))}/offset_{offset:g}"
        book.add(source("palm.LayerNorm.forward"), name, call, inputs, wrt=("x", "weight"))
    constant = {"x": torch.full((2, 8), 0.5), "weight": torch.zeros(8)}
    book.add(source("palm.LayerNorm.forward"), "2x8/constant", call, constant, wrt=("x", "weight"))


def record_attention(book: Any) -> None:
    """Multi-query attention: q [B, H, T, D], k and v [B, T, D]; without any key the mean of all values."""
    from palm_rlhf_pytorch.attention import Attention

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool) -> Tensor:
        return Attention(causal=causal).eval()(q, k, v, mask=mask)

    for i, (b, h, t, d) in enumerate(((2, 3, 7, 8), (4, 2, 16, 4), (1, 1, 1, 2))):
        chosen = [(name, mask) for name, mask in masks(b, t) if name in ("tail", "head", "middle", "few")]
        for name, mask in [("no_mask", None), *chosen]:
            for causal in (True, False):
                k, v = normal((b, t, d), i, 1), normal((b, t, d), i, 2)
                inputs = {"q": normal((b, h, t, d), i), "k": k, "v": v}
                if mask is not None:
                    inputs["mask"] = mask
                book.add(source("attention.Attention.forward"), f"{b}x{h}x{t}x{d}/{name}", call, inputs,
                         {"causal": causal}, wrt=("q", "k", "v"))  # fmt: skip


def record_palm(book: Any) -> None:
    """Logits, embeddings, loss and gradients of two small models; inputs `weight.*` are the state dict."""
    from palm_rlhf_pytorch import PaLM

    for qk_rmsnorm in (False, True):
        torch.manual_seed(1)
        kwargs = {"dim": 12, "num_tokens": 17, "depth": 2, "heads": 2, "dim_head": 6, "ff_mult": 2}
        model = PaLM(**kwargs, qk_rmsnorm=qk_rmsnorm).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator(parameter.numel())))
        tokens = torch.randint(1, 17, (2, 9), generator=generator(7))
        parameters = {name: p for name, p in model.named_parameters() if name != "to_logits.weight"}

        def call(tokens: Tensor, model: Any = model, **_: Any) -> tuple[Tensor, ...]:
            embeds = model(tokens, return_only_embedding=True)
            return model(tokens), embeds, model(tokens, return_loss=True)

        inputs = {"tokens": tokens} | {f"weight.{name}": p for name, p in parameters.items()}
        book.add(source("palm.PaLM.forward"), f"qk_rmsnorm_{qk_rmsnorm}", call, inputs,
                 kwargs | {"qk_rmsnorm": qk_rmsnorm}, outputs=("logits", "embeds", "loss"))  # fmt: skip
        loss = model(tokens, return_loss=True)
        found = torch.autograd.grad(loss, list(parameters.values()))
        book.records[-1]["grads"] = book.store({f"weight.{n}": g for n, g in zip(parameters, found)})
