"""A scalar for each token or sequence: value models, and what reward models share with them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from palm_rlhf.models.protocol import IGNORED, CausalModel
from rlhf_kernels import linear_logprob


class ValueModel(nn.Module):
    """`head(hidden)` at every token, on a backbone that others may share.

    With a `scope` the backbone stays as it is and its adapters learn: actor, reference and critic are then
    one set of weights. Without, the whole backbone learns, and must be the critic's own.
    """

    def __init__(self, model: CausalModel, scope: str | None = None) -> None:
        """The head starts at 0 (Huang et al., 2024: every value is 0 before the first update)."""
        super().__init__()
        self.model, self.scope = model, scope
        weight = model.head.weight
        self.value_head = nn.Linear(model.dim, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T]: the value of the text up to and including each token: of the state before the next."""
        hidden = self.model.hidden_states(tokens, mask=mask, scope=self.scope)
        return self.value_head(hidden).squeeze(-1)

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        yield from self.value_head.parameters()
        yield from self.model.finetune_parameters(self.scope) if self.scope else self.model.parameters()


class Policy(nn.Module):
    """A model with one scope's adapters, or without any: what is trained, sampled from, or referred to."""

    def __init__(self, model: CausalModel, scope: str | None = None) -> None:
        super().__init__()
        self.model, self.scope = model, scope

    def forward(
        self, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, R] of the tokens after the first `prompt_width`; 0 where masked."""
        target, read = tokens[:, prompt_width:], mask
        if mask is not None:
            target = target.masked_fill(~mask[:, prompt_width:], IGNORED)
            read = None if bool(mask.all()) else mask[:, :-1]
        hidden = self.model.hidden_states(tokens[:, :-1], mask=read, scope=self.scope)[:, prompt_width - 1 :]
        head = self.model.head
        # Under autocast the hidden states have another dtype.
        weight, bias = (None if x is None else x.to(hidden.dtype) for x in head[:2])
        found = linear_logprob(
            hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1),
            bias=bias, temperature=temperature, softcap=head.softcap, ignore_index=IGNORED,
        )  # fmt: skip
        return tuple(x.view(target.shape) for x in found)

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        yield from self.model.finetune_parameters(self.scope) if self.scope else self.model.parameters()


def frozen(model: nn.Module) -> nn.Module:
    """The same module in evaluation mode, its parameters without gradients."""
    model.eval()
    return model.requires_grad_(False)


def set_dropout(dropout: float, *models: nn.Module) -> None:
    """Dropout of PaLM and of PyTorch's own modules, wherever they are in these."""
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            if hasattr(module, "set_dropout"):
                module.set_dropout(dropout)
