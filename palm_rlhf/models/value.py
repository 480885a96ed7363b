"""A scalar for each token or sequence: value models, and what reward models share with them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf.algorithms.critics import bin_centres
from palm_rlhf.algorithms.preferences import expected_value
from palm_rlhf.models.finetune import learned
from palm_rlhf.models.protocol import IGNORED, CausalModel
from rlhf_kernels import linear_logprob

# Logits that are held at a time where only a few of each row are wanted.
_LOGITS = 2**22


class ValueModel(nn.Module):
    """`head(hidden)` at every token, on a backbone that others may share.

    With a `scope` the backbone stays as it is and its adapters learn: actor, reference and critic are then
    one set of weights. Without, the whole backbone learns, and must be the critic's own.
    """

    def __init__(
        self,
        model: CausalModel,
        scope: str | None = None,
        *,
        bins: int = 0,
        low: float = -1.0,
        high: float = 1.0,
        last_layers: int | None = None,
    ) -> None:
        """The head starts at 0 (Huang et al., 2024: every value is 0 before the first update).

        Without a scope, `last_layers` says how many of the backbone's last layers learn beside the head.
        With `bins` a value is the mean of a distribution over as many equal parts of [low, high], and starts
        in the middle of them; ValueError for a single bin, or an empty range.
        """
        super().__init__()
        self.model, self.scope, self.last_layers = model, scope, last_layers
        weight = model.head.weight
        if bins and not (bins > 1 and low < high):
            raise ValueError(
                f"a critic needs at least 2 bins and low < high, got {bins} from {low} to {high}"
            )
        centres = bin_centres(low, high, bins).to(weight) if bins else None
        self.register_buffer("centres", centres, persistent=False)
        self.value_head = nn.Linear(model.dim, bins or 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T]: the value of the text up to and including each token: of the state before the next."""
        return self.scored(tokens, mask)[0]

    def scored(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The same, and the logits [B, T, bins] that the values are the means of, where there are bins."""
        hidden = self.model.hidden_states(tokens, mask=mask, scope=self.scope)
        with torch.autocast(hidden.device.type, enabled=False):  # a number wants all its digits
            found = self.value_head(hidden.to(self.value_head.weight.dtype))
        if self.centres is None:
            return found.squeeze(-1), None
        return expected_value(found, self.centres), found

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        yield from self.value_head.parameters()
        yield from learned(self.model, self.scope, self.last_layers)


class Policy(nn.Module):
    """A model with one scope's adapters, or without any: what is trained, sampled from, or referred to."""

    def __init__(self, model: CausalModel, scope: str | None = None, last_layers: int | None = None) -> None:
        """Without a scope all of the model learns, or so many of its last layers."""
        super().__init__()
        self.model, self.scope, self.last_layers = model, scope, last_layers

    def forward(
        self, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, R] of the tokens after the first `prompt_width`; 0 where masked."""
        hidden = self._hidden(tokens, mask, prompt_width)
        return self._scored(hidden, tokens, mask, prompt_width, temperature)

    def with_head(
        self, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the log-probabilities [B, R, K] of other tokens `ids` at each place."""
        hidden = self._hidden(tokens, mask, prompt_width)
        logprob, entropy = self._scored(hidden, tokens, mask, prompt_width, temperature)
        # In blocks whose logits are made again in the backward: [N, V] never exists.
        blocks = zip(*(x.flatten(0, 1).split(self._block) for x in (hidden, ids)))
        found = torch.cat(
            [checkpoint(self._picked, *block, temperature, use_reentrant=False) for block in blocks]
        )
        return logprob, entropy, found.view(ids.shape)

    @torch.no_grad()
    def most_probable(
        self, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float, count: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [B, R, K] of the `count` most probable tokens, at most all but one."""
        hidden = self._hidden(tokens, mask, prompt_width)
        count = min(count, self.model.num_tokens - 1)
        found = [
            self._logits(block, temperature).log_softmax(-1).topk(count)
            for block in hidden.flatten(0, 1).split(self._block)
        ]
        logprob, ids = (torch.cat(parts).view(*hidden.shape[:2], count) for parts in zip(*found))
        return ids, logprob

    def _picked(self, hidden: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """Log-probabilities [N, K] of the tokens `ids`."""
        return self._logits(hidden, temperature).log_softmax(-1).gather(1, ids)

    @property
    def _block(self) -> int:
        """Rows whose logits are held at a time."""
        return max(1, _LOGITS // self.model.num_tokens)

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        softcap = self.model.head.softcap
        weight, bias = (None if x is None else x.to(hidden.dtype) for x in self.model.head[:2])
        logits = nn.functional.linear(hidden, weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.float() / temperature if logits.dtype != torch.float64 else logits / temperature

    def _hidden(self, tokens: Tensor, mask: Tensor | None, prompt_width: int) -> Tensor:
        """[B, R, E]: from which each token of the response was drawn."""
        read = None if mask is None or bool(mask.all()) else mask[:, :-1]
        return self.model.hidden_states(tokens[:, :-1], mask=read, scope=self.scope)[:, prompt_width - 1 :]

    def _scored(
        self, hidden: Tensor, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        target = tokens[:, prompt_width:]
        if mask is not None:
            target = target.masked_fill(~mask[:, prompt_width:], IGNORED)
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
        yield from learned(self.model, self.scope, self.last_layers)


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
